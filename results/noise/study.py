"""When selection fails: noise planted in the responses, and what each method makes of it.

    python results/noise/study.py --model DIR --data rows.jsonl --out DIR                  # which score sees noise
    python results/noise/study.py --model DIR --data rows.jsonl --out DIR --objectives     # every method side by side

Of each response 20 % of the tokens are replaced, the end token left out: by random entries of the vocabulary, or by
words of other responses. Then a model is trained on that, on all tokens (full), on ssToken's choice, also with `--gain
probability`, or with `--rho auto`, and at some steps every score is computed for every response token:

    REL           Normalize(REL), Eq. 8
    attention     AttnScore, Eq. 7
    ssToken       their Score at gamma 0.5, Eq. 9
    excess loss   of the base model over a reference that was trained on other, clean rows, Eq. 2
    probability   the gain in probability (an extension), normalized as REL
    relative      REL as a share of the history loss, normalized as REL

Reported are the AUROC of clean over noise within a sample (1: every clean token before every noisy one; 0.5: chance;
below: the score prefers the noise), and the share of noise among the best rho of each sample (by chance 20 %).
With --objectives every method is trained instead, at one rate, also on noise as real data has it (`plant_faults`), and
beside them the oracle, which is told which tokens are clean. Reported are the held-out loss before and after, the
share of the tokens that a method keeps, the share of its weight that lies on noise, and tokens that it alone keeps.

Each training is a JSON file in --out and is not run again; tables and figures are made from those files.
"""

import argparse
import contextlib
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.start import run_script

import data
import lora
import train
from model import load_model
from paper import baselines, visualize
from paper.objectives import OBJECTIVES, asks, under_other_prompts
from sstoken import excess_loss, normalize, probability_gain, retrospective_excess_loss, score, select
from support import command, machine
from support.files import UserError, read_json, write_json, write_whole
from support.kernels import Watch

matplotlib.use("Agg")
from matplotlib import pyplot

SHARE, RHO, GAMMA = 0.2, 0.6, 0.5
STEPS = (1, 3, 6, 12)  # at which the scores are computed
BATCH = 8
KINDS = {"vocabulary": "random entries of the vocabulary", "words": "words of other responses"}
FAULTS = {"faults": "wrong answers, cut ends, boilerplate"}
METHODS = {"full": ["--method", "full"], "sstoken": [], "probability": ["--gain", "probability"]}
METHODS |= {"auto": ["--rho", "auto"]}
ALL = METHODS | {"random": ["--method", "random"], "rho1": ["--method", "rho1", "--reference-data", "-"]}
ALL |= {name: ["--method", name] for name in OBJECTIVES} | {"oracle": ["--method", "full"]}
NAMES = {
    "sstoken": "ssToken",
    "auto": "ssToken, --rho auto",
    "oracle": "full, on clean tokens",
    "probability": "--gain probability",
}


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
OF_THE_STUDY = {name: ["--method", name] for name in VARIANTS} | {"own": ["--method", "full"], "ranked": []}
ALL |= OF_THE_STUDY


# ------------------------------------------------------------------------------------------------------ the noise


def plant_noise(
    examples: list[data.Example], kind: str, tokenizer: data.Tokenizer, seed: int
) -> tuple[list[data.Example], list[Tensor]]:
    """The samples with a share SHARE of their response tokens replaced, and for each a (L_resp,) bool: which are noise.

    An end token is never replaced, and none is planted.
    """
    rng, backend = random.Random(f"{kind} {seed}"), tokenizer.backend
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
    vocabulary = sorted(set(range(tokenizer.vocab_size)) - special)
    texts = {i: backend.decode([i]) for i in vocabulary}
    whole_words = {i for i, text in texts.items() if text[:1] == " " and text[1:].isalpha()}
    words = [[i for i in e.ids[e.response].tolist() if i in whole_words] for e in examples]
    noisy, masks = [], []
    for number, (ids, response) in enumerate(examples):
        ids = ids.clone()
        places = [i for i in response.nonzero().squeeze(1).tolist() if int(ids[i]) not in special]
        chosen = rng.sample(places, round(SHARE * len(places)))
        others = vocabulary if kind == "vocabulary" else [i for n, w in enumerate(words) if n != number for i in w]
        for place in chosen:
            old = int(ids[place])
            while int(ids[place]) == old:
                ids[place] = rng.choice(others)
        noise = torch.zeros(len(ids), dtype=torch.bool)
        noise[chosen] = True
        noisy.append(data.Example(ids, response))
        masks.append(noise[response])
    return noisy, masks


SWAPPED, CUT, WRAPPED = 0.2, 0.1, 0.2  # shares of the rows
BOILERPLATE = ["As an AI language model, I am happy to help with that. ", "Sure! Here is the answer to your question: "]


def plant_faults(examples: list[data.Example], tokenizer, seed: int) -> tuple[list[data.Example], list[Tensor]]:
    """Noise as real data has it: answers to another row, answers cut in the middle, phrases in front that say nothing.

    Noise is all of a swapped answer, the end token that comes too early, and the phrase.
    """
    rng, eos = random.Random(f"faults {seed}"), tokenizer.eos_id
    order = rng.sample(range(len(examples)), len(examples))
    counts = [round(share * len(order)) for share in (SWAPPED, CUT, WRAPPED)]
    swapped, cut, wrapped = (order[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(3))
    faulty, masks = [], []
    for number, (ids, response) in enumerate(examples):
        prompt, answer = ids[~response].tolist(), ids[response].tolist()
        noise = [False] * len(answer)
        if number in swapped:
            other = examples[swapped[(swapped.index(number) + 1) % len(swapped)]]
            answer = other.ids[other.response].tolist()
            noise = [True] * len(answer)
        elif number in cut:
            answer = [*answer[: max(1, len(answer) // 2)], eos]
            noise = [False] * (len(answer) - 1) + [True]
        elif number in wrapped:
            phrase, _ = tokenizer.encode(rng.choice(BOILERPLATE).rstrip())
            answer, noise = [*phrase, *answer], [True] * len(phrase) + noise
        supervised = torch.tensor([False] * len(prompt) + [True] * len(answer))
        faulty.append(data.Example(torch.tensor(prompt + answer), supervised))
        masks.append(torch.tensor(noise))
    return faulty, masks


# ----------------------------------------------------------------------------------------------------- the scores


def auroc(clean: Tensor, noise: Tensor) -> float:
    """The chance that a clean token scores above a noisy one, ties counted half: (n,), (m,) -> a number in [0, 1]."""
    ordered, asked = np.sort(noise.numpy()), clean.numpy()
    below = np.searchsorted(ordered, asked, "left") + np.searchsorted(ordered, asked, "right")
    return float(below.mean() / 2 / len(ordered))


def measure(nll: list, attention: list, history: list, reference: list, noise: list[Tensor]) -> dict[str, dict]:
    """For each score, over the samples: the mean AUROC of clean over noise, and the share of noise in the selection."""
    aurocs, chosen, planted = {}, {}, {}
    for current, att, his, ref, noisy in zip(nll, attention, history, reference, noise, strict=True):
        rel = retrospective_excess_loss(current, his)
        scores = {
            "REL": normalize(rel),
            "attention": att,
            "ssToken": score(normalize(rel), att, GAMMA),
            "excess loss": excess_loss(his, ref),
            "probability": normalize(probability_gain(current, his)),
            "relative": normalize(rel / his.clamp(min=1e-6)),
        }
        for name, values in scores.items():
            selected = select(values, RHO)
            chosen[name] = chosen.get(name, 0) + int(selected.sum())
            planted[name] = planted.get(name, 0) + int((selected & noisy).sum())
            if noisy.any():
                aurocs.setdefault(name, []).append(auroc(values[~noisy], values[noisy]))
    return {name: {"auroc": mean(aurocs[name]), "noise_selected": planted[name] / chosen[name]} for name in aurocs}


# ---------------------------------------------------------------------------------------------------- the trainings


def arguments(args, method: str, lr: float, seed: int) -> argparse.Namespace:
    """train.py's, for one of ALL."""
    flags = ["--model", args.model, "--data", args.data, "--max-length", str(args.max_length), "--epochs", "2"]
    flags += ["--batch-size", str(BATCH), "--lr", str(lr), "--seed", str(seed)]
    return train.parse_arguments(flags + ["--rho", str(RHO), "--gamma", str(GAMMA), *ALL[method]])


class Ranked(train.SSToken):
    """ssToken's choice within bounds: as many as the base model can account for, none that the current one cannot."""

    def __init__(self, model, sizes: list[int], run: argparse.Namespace, described: list[Tensor]):
        super().__init__(model, sizes, run, [values[0] for values in described])
        self.counts = [int(OBJECTIVES["base-3-0"](*values).sum()) for values in described]
        self.watch = Watch(["entropy", "spread"])

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        never = ~OBJECTIVES["surprise"](nll, *self.watch.take(nll).values())
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
def watched(chosen: dict[int, Tensor], masks: list[Tensor] | None = None, described: list[Tensor] | None = None):
    """A context in which the loop's selection leaves in `chosen` each sample's last weights.

    masks: to train on instead. described: for `Ranked`.
    """

    def make(model, sizes, run, frozen):
        made = real(model, sizes, run, frozen) or train.SSToken(model, sizes, run, frozen.base)
        selection = baselines.Fixed(masks) if masks else Ranked(model, sizes, run, described) if described else made
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


def fit(
    model, examples, run: argparse.Namespace, base=None, at_step=lambda step: None, reference=None, elsewhere=None
) -> list[dict]:
    """Train new adapters on `examples`; at_step is called after each optimizer step. Returns the log."""
    lines = []

    def log(line):
        lines.append(line)
        at_step(line["step"])
        model.train()

    lora.new_adapters(model, run)
    train.train(model, examples, run, log, frozen=baselines.Frozen(base, reference, elsewhere))
    return lines


def study(args, model, tokenizer, rows: dict[str, list], kind: str, lr: float, seed: int):
    """All trainings on one kind of data ("clean": no noise) with one learning rate and seed, each into its file."""
    files = {method: Path(args.out) / f"{kind}-{method}-lr{lr}-seed{seed}.json" for method in METHODS}
    if all(file.exists() for file in files.values()):
        return
    examples, noise, reference = rows["train"], None, None
    if kind != "clean":
        examples, noise = plant_noise(examples, kind, tokenizer, seed)
    lora.remove_lora(model)
    history = baselines.response_losses(model, examples)
    elsewhere = baselines.response_losses(model, under_other_prompts(examples, seed))
    before = torch.cat(baselines.response_losses(model, rows["held out"])).mean().item()
    if noise:
        fit(model, rows["reference"], arguments(args, "full", lr, seed))
        reference = baselines.response_losses(model, examples)
    for method, file in files.items():
        if file.exists():
            continue
        found = {}

        def at_step(step, found=found):
            if noise and step in STEPS:
                nll, attention, _ = zip(*visualize.signals(model, examples, [-1]), strict=True)
                found[step] = measure(nll, [layers[0] for layers in attention], history, reference, noise)
                if step == STEPS[-1]:
                    drop = torch.cat(history) - torch.cat(nll)
                    found["fall"] = {
                        "clean": drop[~torch.cat(noise)].mean().item(),
                        "noise": drop[torch.cat(noise)].mean().item(),
                    }

        lines = fit(model, examples, arguments(args, method, lr, seed), history, at_step, elsewhere=elsewhere)
        fall = found.pop("fall", None)
        write_json(
            file,
            {
                **{"kind": kind, "method": method, "lr": lr, "seed": seed, "scores": found, "fall_of_loss": fall},
                **{"held_out_before": before, "loss": [line["loss"] for line in lines]},
                "held_out_after": torch.cat(baselines.response_losses(model, rows["held out"])).mean().item(),
            },
        )
        print(file.name, json.dumps(found.get(STEPS[-1])), flush=True)


def compare(args, model, tokenizer, rows: dict[str, list], kind: str, lr: float, seed: int):
    """Every method on one kind of data, each into its file: what it keeps, and the held-out loss."""
    names = [name for name in args.only.split(",") if kind != "clean" or name != "oracle"]
    files = {method: Path(args.out) / f"{kind}-{method}-lr{lr}-seed{seed}.json" for method in names}
    if all(file.exists() for file in files.values()):
        return
    examples, noise = rows["train"], [torch.zeros(int(e.response.sum()), dtype=torch.bool) for e in rows["train"]]
    if kind == "faults":
        examples, noise = plant_faults(examples, tokenizer, seed)
    elif kind != "clean":
        examples, noise = plant_noise(examples, kind, tokenizer, seed)
    lora.remove_lora(model)
    described = baselines.response_losses(model, examples, described=True)
    losses = [values[0] for values in described]
    before = torch.cat(baselines.response_losses(model, rows["held out"])).mean().item()
    elsewhere = baselines.response_losses(model, under_other_prompts(examples, seed))
    belongs, reference = baselines.Frozen(losses, elsewhere=elsewhere).belong(), None
    for method, file in files.items():
        if file.exists():
            continue
        if method == "rho1" and reference is None:
            fit(model, rows["reference"], arguments(args, "full", lr, seed))
            reference = baselines.response_losses(model, examples)
        run, chosen = arguments(args, method, lr, seed), {}
        better = reference if method == "rho1" else None
        base = described if "history_entropy" in asks(run.method) else losses
        masks = [~mask for mask in noise] if method == "oracle" else None
        if method == "own":
            masks = [torch.full_like(mask, yes) for mask, yes in zip(noise, belongs, strict=True)]
        with watched(chosen, masks, described if method == "ranked" else None):
            lines = fit(model, examples, run, base, reference=better, elsewhere=elsewhere)
        weights = torch.cat([chosen[i] for i in range(len(examples))])
        planted = torch.cat(noise)
        found = {"kept": (weights != 0).float().mean().item(), "noise": planted.float().mean().item()}
        found["noise_kept"] = (weights[planted] != 0).float().mean().item() if planted.any() else None
        found["noise_weight"] = (weights[planted].sum() / weights.sum()).item()
        found |= {"kind": kind, "method": method, "lr": lr, "seed": seed, "loss": [line["loss"] for line in lines]}
        if kind == "clean" and seed == 0:
            found |= {"weights": [[round(w, 3) for w in chosen[i].tolist()] for i in range(len(examples))]}
        after = torch.cat(baselines.response_losses(model, rows["held out"])).mean().item()
        write_json(file, found | {"held_out_before": before, "held_out_after": after})
        print(
            file.name,
            f"kept {found['kept']:.3f}, noise {found['noise_weight']:.3f}, {before:.4f} -> {after:.4f}",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------- tables and figures


def of_seeds(results: list[dict], kind: str, method: str, lr: float) -> list[dict]:
    return [r for r in results if (r["kind"], r["method"], r["lr"]) == (kind, method, lr)]


def spread(values: list[float], digits: int) -> str:
    """The mean over seeds and, in brackets, the least and the greatest."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tables(results: list[dict]) -> str:
    """AUROC and share of noise at the last step, and the held-out loss, as markdown."""
    lrs, text = sorted({r["lr"] for r in results}), []
    names = ["REL", "attention", "ssToken", "excess loss", "probability", "relative"]
    for what, title, digits in (
        ("auroc", "AUROC of clean over noise", 3),
        ("noise_selected", "share of noise among the selected", 3),
    ):
        text += [f"| {title}, step {STEPS[-1]} | lr | trained on | " + " | ".join(names) + " |"]
        text += ["| --- | --- | --- |" + " ---: |" * len(names)]
        for kind in KINDS:
            for lr in lrs:
                for method in METHODS:
                    found = of_seeds(results, kind, method, lr)
                    if found:
                        cells = [spread([r["scores"][str(STEPS[-1])][n][what] for r in found], digits) for n in names]
                        text.append(f"| {kind} | {lr} | {method} | " + " | ".join(cells) + " |")
        text.append("")
    heads = "data | lr | trained on | seeds | held-out clean loss, before | after | fall on clean tokens | on noise"
    text += [f"| {heads} |"]
    text += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for kind in ("clean", *KINDS):
        for lr in lrs:
            for method in METHODS:
                found = of_seeds(results, kind, method, lr)
                if found:
                    held_out = [[r[f"held_out_{when}"] for r in found] for when in ("before", "after")]
                    cells = [str(len(found)), *(spread(values, 3) for values in held_out)]
                    for part in ("clean", "noise"):
                        fall = [r["fall_of_loss"][part] for r in found if r["fall_of_loss"]]
                        cells.append(spread(fall, 2) if fall else "")
                    text.append(f"| {kind} | {lr} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def figure(results: list[dict], what: str, label: str, chance: float, path: Path):
    """Each score over the training steps: a row for each kind of noise and learning rate, a column a trained method."""
    lrs = sorted({r["lr"] for r in results})
    places = [(kind, lr) for kind in KINDS for lr in lrs]
    grid, axes = pyplot.subplots(
        len(places),
        len(METHODS),
        figsize=(3.3 * len(METHODS), 2.5 * len(places)),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for (kind, lr), row in zip(places, axes, strict=True):
        for method, ax in zip(METHODS, row, strict=True):
            found = of_seeds(results, kind, method, lr)
            ax.axhline(chance, color="gray", linewidth=0.8, linestyle="--")
            for name in found[0]["scores"][str(STEPS[0])] if found else ():
                curves = np.array([[r["scores"][str(step)][name][what] for step in STEPS] for r in found])
                (line,) = ax.plot(STEPS, curves.mean(0), marker="o", markersize=3, label=name)
                ax.fill_between(STEPS, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15)
            ax.set_title(f"{kind}, lr {lr}, trained on {method}", fontsize="small")
    axes[-1][0].set(xlabel="optimizer step", ylabel=label)
    axes[0][0].legend(fontsize="x-small", ncols=2)
    grid.savefig(path, dpi=130)
    pyplot.close(grid)


def compared(results: list[dict]) -> str:
    """What each method keeps and what comes of it, as markdown: a row a method, for each kind of data and rate."""
    heads = ["data", "lr", "trained by", "seeds", "held-out clean loss, before", "after", "beside full and oracle"]
    heads += ["tokens kept", "of what it trains on, noise"]
    text = ["| " + " | ".join(heads) + " |", "| --- | --- | --- |" + " ---: |" * (len(heads) - 3)]
    for kind in ("clean", *KINDS, *FAULTS):
        for lr in sorted({r["lr"] for r in results}, reverse=True):
            by = {method: of_seeds(results, kind, method, lr) for method in ALL}
            best = dict.fromkeys({r["seed"] for r in results}, math.inf)
            for r in by["full"] + by["oracle"]:
                best[r["seed"]] = min(best[r["seed"]], r["held_out_after"])
            for method in sorted(filter(by.get, by), key=lambda name: mean(r["held_out_after"] for r in by[name])):
                found = by[method]
                cells = [spread([r[f"held_out_{when}"] for r in found], 3) for when in ("before", "after")]
                cells.append(f"{mean(r['held_out_after'] - best[r['seed']] for r in found):+.4f}")
                cells += [spread([r[key] for r in found], 3) for key in ("kept", "noise_weight")]
                text.append(f"| {kind} | {lr} | {method} | {len(found)} | " + " | ".join(cells) + " |")
    return (
        "\n".join(text) + "\n\nBeside full and oracle: the loss after, less the better of these two, mean over seeds.\n"
    )


def only_kept(results: list[dict], texts: list[list[str]]) -> str:
    """For each method the five tokens that it alone keeps most often, of clean data with the first seed, as markdown.

    texts: each sample's response tokens. A method that weighs all tokens keeps those of more than the mean weight. One
    that keeps nine in ten is told by what it leaves out; full training, chance and variants take no part.
    """
    lr = max(r["lr"] for r in results)
    first = {r["method"]: r["weights"] for r in results if (r["kind"], r["seed"], r["lr"]) == ("clean", 0, lr)}
    places = {(i, k) for i, sample in enumerate(texts) for k in range(len(sample))}
    kept = {}
    for name, weights in first.items():
        if name not in ("full", "random", *OF_THE_STUDY):
            every = [w for sample in weights for w in sample]
            middle = 0 if set(every) <= {0, 1} else mean(every)
            kept[name] = {(i, k) for i, k in places if weights[i][k] > middle}
    narrow = {name for name, its in kept.items() if len(its) < 0.9 * len(places)}
    text = ["| trained by | tokens that it alone keeps, the most frequent first |", "| --- | --- |"]
    for name, its in kept.items():
        others = set().union(*(kept[other] for other in narrow - {name}))
        counts = Counter(texts[i][k] for i, k in sorted(its - others if name in narrow else places - its))
        found = ", ".join(f"{command.cell(repr(token))} ({count})" for token, count in counts.most_common(5))
        text.append(f"| {name} | {'' if name in narrow else 'leaves out: '}{found or 'none'} |")
    return "\n".join(text) + "\n"


def compared_figure(results: list[dict], path: Path):
    """The change of the held-out loss by every method, a dot a seed, at the highest rate; a panel a kind of data.

    The methods stand in one order in all panels: that of their worst kind, the best on top.
    """
    lr = max(r["lr"] for r in results)
    kinds = [kind for kind in ("clean", *KINDS, *FAULTS) if any(r["kind"] == kind for r in results)]
    change = {}
    for r in results:
        if r["lr"] == lr and r["method"] not in OF_THE_STUDY:
            by_kind = change.setdefault(r["method"], {})
            by_kind.setdefault(r["kind"], []).append(r["held_out_after"] - r["held_out_before"])
    order = sorted(change, key=lambda name: -max(map(mean, change[name].values())))
    grid, axes = pyplot.subplots(
        1, len(kinds), figsize=(3 * len(kinds), 4.5), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    titles = {"clean": "clean rows"} | {kind: f"{SHARE:.0%} {what}" for kind, what in KINDS.items()} | FAULTS
    for kind, ax in zip(kinds, axes[0], strict=True):
        ax.axvspan(-0.3, 0, color="tab:green", alpha=0.08)
        for name, colour in (("full", "black"), ("oracle", "tab:green")):
            if values := change.get(name, {}).get(kind):
                ax.axvline(mean(values), color=colour, linewidth=1)
        for place, name in enumerate(order):
            colour = {"full": "black", "oracle": "tab:green", "sstoken": "tab:orange", "auto": "tab:blue"}.get(
                name, "gray"
            )
            values = change[name].get(kind, [])
            ax.plot(values, [place] * len(values), "o", color=colour, alpha=0.7, markersize=5)
        ax.set_title(titles[kind], fontsize="small")
        ax.set(yticks=range(len(order)), yticklabels=[NAMES.get(name, name) for name in order])
        ax.grid(axis="y", alpha=0.3)
    worst = max(x for by_kind in change.values() for values in by_kind.values() for x in values)
    axes[0][0].set_xlim(min(x for by in change.values() for xs in by.values() for x in xs) - 0.02, worst + 0.02)
    grid.supxlabel(
        "\u2190 learned    loss on held-out clean rows, change in nats a token    unlearned \u2192", fontsize="small"
    )
    grid.savefig(path, dpi=130)
    pyplot.close(grid)


def read_results(folder: Path) -> list[dict]:
    """Every training in --out: a file each, or gathered, a line each, in trainings.jsonl."""
    gathered = folder / "trainings.jsonl"
    lines = gathered.read_text().splitlines() if gathered.exists() else []
    return [json.loads(text) for text in [*lines, *(path.read_text() for path in sorted(folder.glob("*-seed*.json")))]]


def main():
    parser = command.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--data", required=True)
    add("--out", required=True)
    add("--samples", type=int, default=48, help="to train on; as many more for the reference, half as many held out")
    add("--max-length", type=int, default=256)
    add("--lrs", default="1e-4,1e-3")
    add("--seeds", type=int, default=3)
    add("--objectives", action="store_true", help="train with every method, on every kind of data")
    methods = [name for name in ALL if name not in OF_THE_STUDY]
    add("--only", default=",".join(methods), help=f"with --objectives: these methods alone, of {', '.join(ALL)}")
    add("--report", action="store_true", help="only write tables and figures from what is there")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for registry in (OBJECTIVES, baselines.METHODS):
        registry.update(VARIANTS)
    if not args.report:
        tokenizer = data.load_tokenizer(args.model)
        n = args.samples
        examples, _ = data.load_examples(args.data, tokenizer, args.max_length, n * 5 // 2)
        if len(examples) < n * 5 // 2 or 2 * n // BATCH < STEPS[-1]:
            raise UserError(f"--samples {n}: {n * 5 // 2} rows and {STEPS[-1]} steps in two epochs are needed")
        given = Path(args.out) / "settings.json"
        settings = {"--data": Path(args.data).name, "--samples": n, "--max-length": args.max_length}
        settings |= {"--model": Path(args.model).name}
        if given.exists() and read_json(given) != settings:
            raise UserError(f"{args.out} holds trainings of another setting: {read_json(given)}")
        write_json(given, settings)
        rows = {"train": examples[:n], "reference": examples[n : 2 * n], "held out": examples[2 * n :]}
        device = machine.find_device("auto")
        model = load_model(args.model, getattr(torch, machine.usual_dtype(device)), device)
        for seed in range(args.seeds):
            for lr in map(float, args.lrs.split(",")):
                for kind in (*KINDS, *FAULTS, "clean") if args.objectives else (*KINDS, "clean"):
                    (compare if args.objectives else study)(args, model, tokenizer, rows, kind, lr, seed)
    results = read_results(Path(args.out))
    text = tables(results) if not args.objectives else compared(results)
    if args.objectives:
        tokenizer = data.load_tokenizer(args.model)
        examples, _ = data.load_examples(args.data, tokenizer, args.max_length, args.samples * 5 // 2)
        answers = [e.ids[e.response].tolist() for e in examples[: args.samples]]
        text += "\n" + only_kept(results, [[tokenizer.decode([token]) for token in answer] for answer in answers])
    write_whole(Path(args.out) / "tables.md", lambda path: path.write_text(text, encoding="utf-8"))
    if args.objectives:
        return compared_figure(results, Path(args.out) / "objectives.png")
    figure(results, "auroc", "AUROC", 0.5, Path(args.out) / "auroc.png")
    figure(results, "noise_selected", "share of noise", SHARE, Path(args.out) / "noise_selected.png")


if __name__ == "__main__":
    run_script(main)
