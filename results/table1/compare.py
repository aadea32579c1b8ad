"""Tables and figures of the cells: intervals over seeds, and over questions by a paired bootstrap against full."""

from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from paper.benchmarks import GROUPS, OWN_ROWS, TABLE
from paper.tables import DASHED, PAPER, Line, interval, paper_lines
from paper.tables import markdown as paper_table

RECIPE = ("model", "epochs", "lr")
SHARES = {"sstoken-rho-0.4": 0.4, "sstoken-rho-0.6": 0.6, "sstoken-rho-0.8": 0.8, "full": 1.0}
GAMMAS = {"sstoken-rho-0.6-gamma-0.0": 0.0, "sstoken-rho-0.6": 0.5, "sstoken-rho-0.6-gamma-1.0": 1.0}


def column_score(tasks: dict[str, np.ndarray], task: str) -> np.ndarray:
    """Table 1's score of a task or a group, from its tasks' mean scores: (..., questions) -> (...)."""
    names, _, by_rows = GROUPS.get(task, ([task], [], False))
    sizes = [tasks[name].shape[-1] for name in names]
    return np.average([tasks[name].mean(-1) for name in names], axis=0, weights=sizes if by_rows else None)


def scores(tasks: dict[str, np.ndarray]) -> np.ndarray:
    """In percent: the ten columns, their average, the user's own rows: (..., 12)."""
    columns = [100 * column_score(tasks, task) for _, task, _ in [*TABLE, OWN_ROWS]]
    return np.stack([*columns[:-1], np.mean(columns[:-1], axis=0), columns[-1]], axis=-1)


def bootstrap(difference: dict[str, np.ndarray], draws: int = 2000) -> np.ndarray:
    """95 % interval of `scores` of differences between two models, over other questions: (2, 12).

    difference: (questions,) for each task; a draw takes as many questions of each task, with replacement.
    """
    rng = np.random.default_rng(0)
    drawn = {name: values[rng.integers(len(values), size=(draws, len(values)))] for name, values in difference.items()}
    return np.percentile(scores(drawn), [2.5, 97.5], axis=0)


def mean_values(records: list[dict]) -> dict[str, np.ndarray]:
    """Of each task what every question is worth, (questions,): the mean over the records' seeds."""
    return {name: np.mean([record["scores"][name] for record in records], axis=0) for name in records[0]["scores"]}


def beside_full(found: list[dict], full: list[dict]) -> tuple[np.ndarray, np.ndarray, list[tuple[dict, dict]]]:
    """`scores` of a method less those of full training, their interval (2, 12), and both records of each seed."""
    pairs = [(ours, other) for ours in found for other in full if ours["seed"] == other["seed"]]
    ours, others = (mean_values(records) for records in zip(*pairs, strict=True))
    difference = {name: ours[name] - others[name] for name in ours}
    return scores(difference), bootstrap(difference), pairs


def over_seeds(values: list[float], digits: int = 2) -> str:
    """The mean, and where there are several its 95 % interval."""
    half = interval(values)
    return f"{fmean(values):+.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


HEADING = "First table: beside full training, mean over seeds ± 95 %, 95 % interval over questions.\n\n"
HEADS = "trained by|seeds|AVG|over questions|instructions|over questions|held-out loss|of full|kept|minutes of training"


def differences(methods: dict[str, list[dict]]) -> str:
    """Markdown of one recipe: each method beside full training, on the seeds that both have."""
    rows = [HEADS.split("|"), ["---"] + ["---:"] * HEADS.count("|")]
    for name, found in methods.items():
        _, ends, pairs = beside_full(found, methods["full"])
        gaps = np.array([scores(mean_values([ours])) - scores(mean_values([other])) for ours, other in pairs])
        rows.append([name, str(len(pairs))])
        for i in (-2, -1):
            rows[-1] += [over_seeds(gaps[:, i].tolist()), "{:+.2f} to {:+.2f}".format(*ends[:, i])]
        rows[-1].append(over_seeds([ours["after"] - other["after"] for ours, other in pairs], 4))
        rows[-1] += [f"{fmean(other['after'] for _, other in pairs):.4f}", f"{fmean(r['kept'] for r in found):.3f}"]
        rows[-1].append(f"{fmean(r['seconds']['training'] for r in found) / 60:.1f}")
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def curves(groups: dict[tuple, dict], named: dict[str, float], number: str, title: str, ax):
    """AVG beside full training over rho or gamma: the paper's lines dashed (Figure 3), and one for each recipe."""
    for model, rows in PAPER["tables"][number].items():
        told = {label: values[-1] - rows["FULL"][-1] for label, values in rows.items() if title in label}
        x = [float(label.split()[-1].rstrip(")")) for label in told]
        ax.plot(x, list(told.values()), "--", linewidth=1, label=f"the paper, {model}")
    for i, (recipe, methods) in enumerate(groups.items(), len(ax.lines)):
        points = {x: beside_full(methods[name], methods["full"]) for name, x in named.items() if name in methods}
        if len(points) > 1:
            value, low, high = np.array([[found[-2], *ends[:, -2]] for found, ends, _ in points.values()]).T
            style = {"color": f"C{i}", "marker": "o", "capsize": 3, "label": "{}, epochs {}, lr {}".format(*recipe)}
            ax.errorbar(list(points), value, [value - low, high - value], **style)
    ax.axhline(0, **DASHED)
    ax.set(xlabel=title, ylabel="average beside full training, points")
    ax.legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def write_report(records: list[dict], folder: Path):
    """tables.md and rho.png, of the recipes that full training has a cell of."""
    groups, text, columns = {}, HEADING, [column for column, _, _ in TABLE]
    for record in records:
        methods = groups.setdefault(tuple(record[key] for key in RECIPE), {})
        methods.setdefault(record["method"], []).append(record)
    bases = {recipe[0]: methods for recipe, methods in groups.items() if "base" in methods}
    groups = {recipe: methods for recipe, methods in sorted(groups.items()) if "full" in methods}
    for recipe, methods in groups.items():
        base, paper = paper_lines(1, recipe[0], columns)
        text += "## {}, epochs {}, learning rate {}\n\n".format(*recipe) + differences(methods) + "\n"
        shown = []
        for name, found in (bases.get(recipe[0], {}) | methods).items():
            values = [scores(mean_values([record]))[:-1].tolist() for record in found]
            shown.append(Line(name, [record["seed"] for record in found], values, []))
        text += paper_table(shown, [*columns, "AVG"], paper, f"*the paper, {base}*") + "\n\n"
    (folder / "tables.md").write_text(text, encoding="utf-8")
    figure = Figure((11, 5), layout="constrained")
    for ax, asked in zip(figure.subplots(1, 2), ((SHARES, "4", "rho"), (GAMMAS, "3", "gamma")), strict=True):
        curves(groups, *asked, ax)
    figure.savefig(folder / "rho.png", dpi=130)
