"""Tables and figures of the study, from a record a training (`study.Setting.train`)."""

from collections import Counter
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure
from planted import KINDS

from support import command

STEPS = (1, 3, 6, 12)  # at which the scores are measured
GAP = "beside full or oracle"
OUTCOMES = ["loss before", "loss after", GAP, "kept", "noise in weight", "fall on clean", "fall on noise"]
LABELS = {"sstoken": "ssToken", "auto": "--rho auto", "oracle": "full, on clean tokens"}
COLOURS = {"full": "black", "oracle": "tab:green", "sstoken": "tab:orange", "auto": "tab:blue"}


def grouped(results: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The records by their values of `keys`."""
    groups = {}
    for record in results:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def cell(values: list[float]) -> str:
    """Mean, least and greatest; of one value, itself."""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.4f}{spread}" if values else ""


def markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def table(results: list[dict], columns: list[str]) -> str:
    """Markdown: a row for each kind of data, rate and method, the lowest loss first. A list gives its last value."""
    columns = [key for key in columns if any(key in r for r in results)]
    rows = [["data", "lr", "trained by", "seeds", *columns], ["---"] * (4 + len(columns))]
    groups, kinds = grouped(results, "kind", "lr", "method"), list(KINDS)
    loss = {key: mean(r["loss after"] for r in found) for key, found in groups.items()}
    for key in sorted(groups, key=lambda key: (kinds.index(key[0]), -key[1], loss[key])):
        cells = [cell([np.ravel(r[column])[-1] for r in groups[key] if column in r]) for column in columns]
        rows.append([*map(str, key), str(len(groups[key])), *cells])
    return markdown(rows)


def only_kept(results: list[dict], words: list[str]) -> str:
    """Markdown: the five tokens that each method alone keeps most often, of clean data, one seed.

    A method that weighs all keeps those of more than the mean weight. words: all response tokens.
    """
    kept = {}
    for record in results:
        if "weights" in record and record["method"] not in ("full", "random"):
            weights = np.array(record["weights"])
            least = 0 if {*weights} <= {0, 1} else weights.mean()
            kept[record["method"]] = {*np.flatnonzero(weights > least)}
    narrow = {name for name, places in kept.items() if len(places) < 0.9 * len(words)}
    text = "| trained by | tokens that it alone keeps, the most frequent first |\n| --- | --- |\n"
    for name, places in kept.items():
        others = set().union(*(kept[other] for other in narrow - {name}))
        told = places - others if name in narrow else set(range(len(words))) - places
        counts = Counter(words[place] for place in sorted(told)).most_common(5)
        found = ", ".join(f"{command.cell(repr(token))} ({count})" for token, count in counts)
        text += f"| {name} | {'' if name in narrow else 'leaves out: '}{found or 'none'} |\n"
    return text


def auroc_figure(results: list[dict]) -> Figure:
    """Each score's AUROC over the steps: a row for a model, kind of noise and rate, a column for a method."""
    rows, columns = sorted(grouped(results, "model", "kind", "lr")), [*grouped(results, "method")]
    figure = Figure((3.3 * len(columns), 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for (*row, method), found in grouped(results, "model", "kind", "lr", "method").items():
        ax = axes[rows.index(tuple(row)), columns.index((method,))]
        ax.set_title("{}\n{}, lr {}".format(*row) + f", trained by {method}", fontsize="small")
        ax.axhline(0.5, color="gray", linewidth=0.8, linestyle="--")
        for key in [key for key in found[0] if key.endswith("auroc")]:
            curves = np.array([r[key] for r in found])
            (line,) = ax.plot(STEPS, curves.mean(0), marker="o", markersize=3, label=key)
            ax.fill_between(STEPS, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15)
    axes[-1, 0].set_xlabel("optimizer step")
    axes[0, 0].legend(fontsize="x-small", ncols=2)
    return figure


def outcome_figure(results: list[dict]) -> Figure:
    """The change of the held-out loss at each model's highest rate, a dot for a seed. On top: the best worst kind."""
    models = grouped(results, "model")
    figure = Figure((3 * len(KINDS), 4.5 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(KINDS), sharex=True, sharey="row", squeeze=False)
    axes[0, 0].set_xscale("symlog", linthresh=0.1)
    axes[0, 0].set_xticks(ticks := [-0.05, 0, 0.05, 0.1, 0.3, 1], ticks)
    for row, ((model,), found) in zip(axes, models.items(), strict=True):
        highest = max(r["lr"] for r in found)
        places = grouped([r for r in found if r["lr"] == highest], "method", "kind")
        change = {key: [r["loss after"] - r["loss before"] for r in records] for key, records in places.items()}
        worst = {name: max(mean(x) for (other, _), x in change.items() if other == name) for name, _ in change}
        names = sorted(worst, key=worst.get, reverse=True)
        for ax, kind in zip(row, KINDS, strict=True):
            ax.set_title(f"{model}\n{KINDS[kind]}", fontsize="small")
            ax.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
            ax.grid(alpha=0.3)
            for place, name in enumerate(names):
                values, colour = change.get((name, kind), []), COLOURS.get(name, "gray")
                ax.plot(values, [place] * len(values), "o", color=colour, alpha=0.7, markersize=5)
                if values and name in ("full", "oracle"):
                    ax.axvline(mean(values), color=colour, linewidth=1)
    figure.supxlabel("loss on held-out clean rows: change in nats a token, logarithmic from 0.1 on")
    return figure


def beside(results: list[dict], method: str) -> str:
    """Markdown: the loss of a method less the lower of full training's and the oracle's, by kind, model and rate."""
    places, compared = sorted(grouped(results, "model", "lr"), reverse=True), [r for r in results if GAP in r]
    found = grouped([r for r in compared if r["method"] == method], "kind", "model", "lr")
    rows = [[method, *(f"{model}, lr {lr}" for model, lr in places)], ["---"] * (1 + len(places))]
    for kind in KINDS:
        gaps = [[r[GAP] for r in found.get((kind, *place), [])] for place in places]
        rows.append([kind, *(f"{cell(x)}, n = {len(x)}" if x else "" for x in gaps)])
    return markdown(rows)


def write_report(results: list[dict], methods: list[str], words: dict[str, list[str]], folder: Path):
    """tables.md and the figures. methods: those in `outcome_figure` and in `only_kept`. words: of each model."""
    for found in grouped(results, "model", "kind", "lr", "seed").values():
        best = [r["loss after"] for r in found if r["method"] in ("full", "oracle")]
        for record in found if best else ():
            record[GAP] = record["loss after"] - min(best)
    text, shown = beside(results, "auto"), [r for r in results if r["method"] in methods]
    for (model,), found in grouped(results, "model").items():
        text += f"\n## {model}\n\n" + table(found, OUTCOMES)
        text += "\n" + only_kept([r for r in shown if r["model"] == model], words[model]) if model in words else ""
        if scored := [r for r in found if "REL, auroc" in r]:
            text += f"\nAfter {STEPS[-1]} steps:\n\n" + table(scored, [k for k in scored[0] if k.endswith("auroc")])
    if scored := [r for r in shown if "REL, auroc" in r]:
        auroc_figure(scored).savefig(folder / "auroc.png", dpi=130)
    outcome_figure(shown).savefig(folder / "objectives.png", dpi=130)
    (folder / "tables.md").write_text(text, encoding="utf-8")
