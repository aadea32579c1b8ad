"""Token losses of models that stay as they are while another trains: of the base model and of a reference."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import data
from model import Transformer, response_nll, response_places
from sstoken import AttentionProbe
from support import ranks
from support.files import check
from support.kernels import PredictionStatistics
from support.losses import kept_losses, losses_key

SCORING = {"micro_batch_size": 64, "pass_tokens": 2048}  # samples and tokens a pass, at most
HISTORY = ("history_nll", "history_entropy", "history_spread")  # of the base model, as objectives name them


class FrozenLosses(NamedTuple):
    """What models that stay as they are say of each sample's response tokens: (L_resp,) on the host, or None.

    base: losses before training, or (3, L_resp), all of HISTORY. reference: L_ref of Eq. 2.
    answer_masks: bool, no losses: which tokens are of an answer that --rho auto keeps.
    """

    base: list[Tensor] | None = None
    reference: list[Tensor] | None = None
    answer_masks: list[Tensor] | None = None

    def known(self, sample: int, device) -> dict[str, Tensor]:
        """All of one sample, on `device`: of HISTORY what there is, "reference_nll", "answers"."""
        found = {}
        if self.base:
            found |= zip(HISTORY, torch.atleast_2d(self.base[sample]), strict=False)
        if self.reference:
            found["reference_nll"] = self.reference[sample]
        if self.answer_masks:
            found["answers"] = self.answer_masks[sample]
        return {name: values.to(device, non_blocking=True) for name, values in found.items()}


def scoring_passes(examples: list[data.Example]) -> list[list[int]]:
    """Passes within SCORING, by indices. They depend on `examples` alone, so bits stay the same."""
    lengths = [len(e.ids) for e in examples]
    return next(data.plan_batches(lengths, max(1, len(lengths)), seed=0, **SCORING), [])


@torch.no_grad()
def signals(model: Transformer, examples: list[data.Example], layers=(), names=()) -> list[Tensor]:
    """Of each sample's response tokens L_theta, AttnScore at `layers`, and the kernels.STATISTICS called `names`.

    Adapters on, dropout off: a (1 + layers + names, L_resp) float32 tensor a sample, on the host. All ranks share the
    passes, and each returns all. UserError for a loss that is no finite number.
    """
    training, device, found = model.training, model.lm_head.weight.device, {}
    statistics, probes = PredictionStatistics(names), [AttentionProbe(model, layer) for layer in layers]
    model.eval()
    passes = ranks.share_passes(scoring_passes(examples))
    for samples in tqdm(passes, "losses", leave=False, disable=not ranks.first_rank()):
        batch = [examples[i] for i in samples]
        ids, response = data.collate(batch, device)
        nll = response_nll(model, ids, response, statistics if names else None)
        places = response_places(response, device)
        attention = [probe.scores(response).flatten()[places] for probe in probes]
        known = torch.stack([nll, *attention, *statistics.collect(nll).values()]).cpu()
        found |= zip(samples, known.split([int(e.response.sum()) for e in batch], 1), strict=True) if batch else {}
    for probe in probes:
        probe.remove()
    model.train(training)
    found = {i: known for part in ranks.gather(found) for i, known in part.items()}
    broken = ", ".join(str(i) for i in sorted(found) if not found[i][0].isfinite().all())
    check(not broken, f"{model.name_or_path}: the loss of samples {broken} (from 0) is no finite number")
    return [found[i] for i in range(len(examples))]


def response_losses(model: Transformer, examples: list[data.Example], described: bool = False) -> list[Tensor]:
    """The loss of every response token: (L_resp,) for each sample; described: (3, L_resp), all of HISTORY."""
    found = signals(model, examples, names=("entropy", "spread") if described else ())
    return found if described else [known[0] for known in found]


def cached_losses(model, adapter: Path | None, examples, args, described=False) -> tuple[list[Tensor], float]:
    """`response_losses` of a frozen model, by way of --cache, and their seconds; adapter: the folder of its adapter."""
    cache, key = Path(args.cache) if args.cache else None, ""
    if cache and ranks.first_rank():
        key = losses_key(model.folder, adapter, examples, args.dtype, torch.device(args.device).type)
        key += "-described" * described
    sizes = [int(example.response.sum()) for example in examples]

    def compute() -> Tensor:
        return torch.cat(response_losses(model, examples, described), -1).flatten()

    found, seconds = kept_losses(cache, key, compute)
    return list((found.view(3, -1) if described else found).split(sizes, -1)), seconds
