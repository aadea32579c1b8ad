"""What the trainings of the study say: tables and figures, from a JSON file a training."""

import json
import math
from collections import Counter
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
from methods import ALL, METHODS, OF_THE_STUDY
from planted import FAULTS, KINDS, SHARE

from support import command

matplotlib.use("Agg")
from matplotlib import pyplot

STEPS = (1, 3, 6, 12)  # at which the scores are computed
NAMES = {
    "sstoken": "ssToken",
    "auto": "ssToken, --rho auto",
    "oracle": "full, on clean tokens",
    "probability": "--gain probability",
}


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
