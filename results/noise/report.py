"""Tables and figures of the study, from a record a training (`study.Setting.train`)."""

from collections import Counter
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure
from planted import KINDS

from support import command

STEPS = (1, 3, 6, 12)  # at which the scores are measured
MEASURES = {"auroc": 0.5, "noise_selected": 0.2}  # and what chance has
OUTCOMES = ["loss before", "loss after", "beside", "kept", "noise in weight"]
OUTCOMES += ["fall on clean", "fall on noise"]
NOTE = "\nBeside: the loss after, less the lower one of full and oracle.\n\n"
LABELS = {"sstoken": "ssToken", "auto": "ssToken, --rho auto", "oracle": "full, on clean tokens"}
COLOURS = {"full": "black", "oracle": "tab:green", "sstoken": "tab:orange", "auto": "tab:blue"}


def grouped(results: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The records by their values of `keys`."""
    groups = {}
    for record in results:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def table(results: list[dict], columns: list[str]) -> str:
    """Markdown: a row for the seeds of each kind of data, rate and method, the lowest loss first.

    columns: keys of the records; one that no record has is left out. A cell has the mean over seeds and, in brackets,
    the least and the greatest; of a list, one value a step, the last counts.
    """
    columns = [key for key in columns if any(key in record for record in results)]
    heads, groups, kinds = ["data", "lr", "trained by", "seeds"], grouped(results, "kind", "lr", "method"), list(KINDS)
    loss = {group: mean(record["loss after"] for record in found) for group, found in groups.items()}
    rows = [heads + columns, ["---"] * 3 + ["---:"] * (len(columns) + 1)]
    for group in sorted(groups, key=lambda group: (kinds.index(group[0]), -group[1], loss[group])):
        rows.append([*map(str, group), str(len(groups[group]))])
        for key in columns:
            values = [np.ravel(record[key])[-1] for record in groups[group] if key in record]
            rows[-1].append(f"{mean(values):.4f} ({min(values):.3f} to {max(values):.3f})" if values else "")
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def only_kept(results: list[dict], words: list[str]) -> str:
    """Markdown: for each method the five tokens that it alone keeps most often, of clean data with the first seed.

    words: all response tokens. A method that weighs all keeps those of more than the mean weight. Of one that keeps
    nine in ten this is what it leaves out. Full training and chance take no part.
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


def score_figure(results: list[dict], scores: list[str], chance: float) -> Figure:
    """Each score over the steps: a row for each kind of noise and rate, a column for each method."""
    rows, columns = sorted(grouped(results, "kind", "lr")), [*grouped(results, "method")]
    figure = Figure((3.3 * len(columns), 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for (kind, lr, method), found in grouped(results, "kind", "lr", "method").items():
        ax = axes[rows.index((kind, lr)), columns.index((method,))]
        ax.set_title(f"{kind}, lr {lr}, trained by {method}", fontsize="small")
        ax.axhline(chance, color="gray", linewidth=0.8, linestyle="--")
        for key in scores:
            curves = np.array([record[key] for record in found])
            (line,) = ax.plot(STEPS, curves.mean(0), marker="o", markersize=3, label=key)
            ax.fill_between(STEPS, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15)
    axes[-1, 0].set_xlabel("optimizer step")
    axes[0, 0].legend(fontsize="x-small", ncols=2)
    return figure


def outcome_figure(results: list[dict]) -> Figure:
    """The change of the held-out loss, a dot a seed. On top is the method whose worst kind is best."""
    change = {}
    for record in results:
        of_method = change.setdefault(record["method"], {kind: [] for kind in KINDS})
        of_method[record["kind"]].append(record["loss after"] - record["loss before"])
    names = sorted(change, key=lambda name: -max(mean(values) for values in change[name].values() if values))
    figure = Figure((3 * len(KINDS), 4.5), layout="constrained")
    for ax, kind in zip(figure.subplots(1, len(KINDS), sharex=True, sharey=True), KINDS, strict=True):
        ax.set_title(KINDS[kind], fontsize="small")
        ax.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
        ax.grid(alpha=0.3)
        for place, name in enumerate(names):
            values, colour = change[name][kind], COLOURS.get(name, "gray")
            ax.plot(values, [place] * len(values), "o", color=colour, alpha=0.7, markersize=5)
            if values and name in ("full", "oracle"):
                ax.axvline(mean(values), color=colour, linewidth=1)
    figure.supxlabel("\u2190 learned    loss on held-out clean rows, change in nats a token    unlearned \u2192")
    return figure


def write_report(results: list[dict], methods: list[str], words: list[str], folder: Path):
    """tables.md and the figures; of the outcomes a figure, and `only_kept`, of `methods` alone."""
    for found in grouped(results, "kind", "lr", "seed").values():
        best = [record["loss after"] for record in found if record["method"] in ("full", "oracle")]
        for record in found if best else ():
            record["beside"] = record["loss after"] - min(best)
    shown = [record for record in results if record["method"] in methods]
    text = table(results, OUTCOMES) + NOTE + only_kept(shown, words)
    for measure, chance in MEASURES.items():
        scored = [record for record in results if f"REL, {measure}" in record]
        if scored:
            scores = [key for key in scored[0] if key.endswith(measure)]
            text += f"\nAfter {STEPS[-1]} steps:\n\n" + table(scored, scores)
            score_figure(scored, scores, chance).savefig(folder / f"{measure}.png", dpi=130)
    highest = max(record["lr"] for record in shown)
    outcome_figure([r for r in shown if r["lr"] == highest]).savefig(folder / "objectives.png", dpi=130)
    (folder / "tables.md").write_text(text, encoding="utf-8")
