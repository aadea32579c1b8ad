"""What the study trains: every method by its flags of train.py, its own variants, and how a training is watched."""

import argparse
import contextlib
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

import train
from paper import baselines
from paper.objectives import OBJECTIVES
from support.kernels import PredictionStatistics

RHO, GAMMA = 0.6, 0.5
SHARE, SCORE = ["--rho", str(RHO)], ["--gamma", str(GAMMA)]
METHODS = {
    "full": ["--method", "full"],
    "sstoken": [*SHARE, *SCORE],
    "probability": [*SHARE, *SCORE, "--gain", "probability"],
    "auto": ["--rho", "auto"],
}
ALL = METHODS | {"random": ["--method", "random", *SHARE]}
ALL |= {"rho1": ["--method", "rho1", "--reference-data", "-", *SHARE]}
ALL |= {name: ["--method", name, *(SHARE if baselines.reads(name, "--rho") else [])] for name in OBJECTIVES}
ALL |= {"oracle": ["--method", "full"]}  # on clean tokens


def accountable(c: float, slack: float, by: str) -> Callable:
    """`objectives.surprise` with other numbers: nll - H <= c sigma + slack, by the base model too, or alone."""

    def base(history_nll, history_entropy, history_spread):
        return history_nll - history_entropy <= c * history_spread + slack

    def current(nll, entropy, spread):
        return nll - entropy <= c * spread + slack

    def both(nll, entropy, spread, history_nll, history_entropy, history_spread):
        return current(nll, entropy, spread) & base(history_nll, history_entropy, history_spread)

    return {"base": base, "current": current, "both": both}[by]


VARIANTS = {f"base-{c}-{slack}": accountable(c, slack, "base") for c in (1, 2, 3, 4, 5) for slack in (0, 0.5)}
VARIANTS["both-3-0"] = accountable(3, 0, "both")
OF_THE_STUDY = {name: ["--method", name] for name in VARIANTS} | {
    "own": ["--method", "full"],
    "ranked": [*SHARE, *SCORE],
}
ALL |= OF_THE_STUDY


class Ranked(train.SSToken):
    """ssToken's choice within bounds: as many as the base model can account for, none that the current one cannot."""

    def __init__(self, model, sizes: list[int], run: argparse.Namespace, described: list[Tensor]):
        super().__init__(model, sizes, run, [values[0] for values in described])
        self.counts = [int(OBJECTIVES["base-3-0"](*values).sum()) for values in described]
        self.statistics = PredictionStatistics(["entropy", "spread"])

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        never = ~OBJECTIVES["surprise"](nll, *self.statistics.collect(nll).values())
        todo = zip(samples, never.split([self.sizes[i] for i in samples]), strict=True)

        def pick(scores, rho):
            i, never_i = next(todo)
            chosen = real(scores.masked_fill(never_i, -torch.inf), Fraction(max(1, self.counts[i]), self.sizes[i]))
            return chosen & ~never_i if (chosen & ~never_i).any() else chosen

        real, train.select = train.select, pick
        try:
            return super().choose(samples, response, nll)
        finally:
            train.select = real


@contextlib.contextmanager
def watched(chosen: dict[int, Tensor], masks: list[Tensor] | None, described: list[Tensor] | None = None):
    """A context in which the loop's selection leaves in `chosen` each sample's last weights.

    masks: to train on instead. described: for `Ranked`.
    """

    def make(model, sizes, run, frozen):
        made = real(model, sizes, run, frozen) or train.SSToken(model, sizes, run, frozen.base)
        selection = (
            baselines.PrecomputedSelection(masks)
            if masks
            else Ranked(model, sizes, run, described)
            if described
            else made
        )
        choose = selection.choose

        def record(samples, response, nll):
            weights = choose(samples, response, nll)
            chosen.update(zip(samples, [w.float().cpu() for w in weights], strict=True))
            return weights

        selection.choose = record
        return selection

    real, baselines.make_selection = baselines.make_selection, make
    try:
        yield
    finally:
        baselines.make_selection = real
