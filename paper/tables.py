"""What a table says: means over seeds with their intervals, beside the paper's numbers; text, JSON, Figures 2 and 3."""

import argparse
import contextlib
import math
import re
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import numpy as np

from paper.benchmarks import TABLE
from support import command, machine
from support.files import read_json, told, write_json, write_whole

PAPER = read_json(Path(__file__).with_name("paper.json"))
DASHED = {"color": "gray", "linestyle": "--", "linewidth": 1}


def interval(values: list[float]) -> float | None:
    """Half the width of the mean's 95 % interval over seeds; None for a single one. More than 31 seeds count as 31."""
    if len(values) < 2:
        return None
    t = PAPER["student_t"][: len(values) - 1][-1]  # what 97.5 % lie below, for 1 to 30 degrees of freedom
    return t * stdev(values) / math.sqrt(len(values))


class Line(NamedTuple):
    """A row with what its cells came to."""

    label: str
    seeds: list[int]
    scores: list[list[float]]  # a list for each seed, in percent, the average last
    seconds: list[dict[str, float]]  # empty for the base model

    def means(self) -> list[tuple[float, float | None]]:
        """For each column the mean over seeds and half the width of its interval."""
        return [(mean(values), interval(values)) for values in zip(*self.scores, strict=True)]


def plain_name(model: str) -> str:
    """A model's name as hub, folder and paper have it in common: without owner, case and hyphens, or "Instruct"."""
    return Path(model).name.lower().replace("-", "").replace("instruct", "")


def paper_rho(model: str) -> float:
    """Sec. 4.2: 0.8 for Qwen-2.5-14B, 0.6 for the others."""
    return 0.8 if plain_name(model).startswith(plain_name("Qwen-2.5-14B")) else 0.6


def paper_lines(table: int, model: str, columns: list[str]) -> tuple[str, dict[str, list[float]]]:
    """The paper's own numbers and their average: those of the same model, else of the first that the table has."""
    models, found = PAPER["tables"][str(table)], {}
    base = next((name for name in models if plain_name(name) == plain_name(model)), next(iter(models)))
    for label, (*values, average) in models[base].items():
        asked = [values[PAPER["columns"].index(column)] for column in columns]
        found[label] = [*asked, average if len(asked) == len(values) else mean(asked)]
    return base, found


def markdown(lines: list[Line], columns: list[str], paper: dict[str, list[float]], heading: str) -> str:
    """The paper's table of our lines, the best mean of each column bold, and the paper's own lines under it."""

    def cell(value, half, best):
        text = f"{value:.2f}" + (f" ± {half:.2f}" if half is not None else "")
        return f"**{text}**" if round(value, 2) == best else text

    def block(rows):
        best = [max(round(value, 2) for value, _ in column) for column in zip(*(row[1] for row in rows), strict=True)]
        return [[label, *(cell(*means[i], best[i]) for i in range(len(best))), seeds] for label, means, seeds in rows]

    rows = [["Methods", *columns, "seeds"], ["---"] + ["---:"] * (len(columns) + 1)]
    rows += block([(line.label, line.means(), str(len(line.seeds))) for line in lines])
    rows += [[heading] + [""] * (len(columns) + 1)]
    rows += block([(label, [(value, None) for value in values], "") for label, values in paper.items()])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def report(args: argparse.Namespace, lines: list[Line], columns: list[tuple[str, str, str]]):
    """Write the table so far, as text and as JSON, and its figure."""
    out, names = Path(args.out), [column for column, _, _ in columns]
    if args.table == 1:
        plot_time(lines, out / "figure2.png")
    elif args.table in (3, 4):
        plot_sweep(lines, *{3: ("gamma", out / "figure3a.png"), 4: ("rho", out / "figure3b.png")}[args.table])
    base, paper = paper_lines(args.table, args.model, names)
    names.append("AVG" if len(names) == len(TABLE) else f"AVG of {len(names)}")
    variants = [line for line in lines if line.label.startswith("TOKENCLEANING,")]
    if len(variants) == 2 and args.table == 1:
        better = max(variants, key=lambda line: line.means()[-1][0])
        place = lines.index(variants[1]) + 1
        lines = [*lines[:place], better._replace(label="TOKENCLEANING, the better"), *lines[place:]]
    text = f"Table {args.table}, {command.cell(Path(args.model).name)}: mean ± 95 % interval over seeds, percent.\n\n"
    text += markdown(lines, names, paper, f"*the paper, {base}*") + "\n\n"
    text += "".join(f"- {note}\n" for note in PAPER["notes"])
    write_whole(out / f"table{args.table}.md", lambda path: path.write_text(text, encoding="utf-8"))
    record = {"arguments": vars(args), "versions": machine.versions(), "columns": names, "rows": {}}
    for line in lines:
        means, halves = zip(*line.means(), strict=True)
        record["rows"][line.label] = {"seeds": line.seeds, "scores": line.scores, "seconds": line.seconds}
        record["rows"][line.label] |= {"mean": means, "interval": halves}
    write_json(out / f"table{args.table}.json", record | {"paper": {base: paper}})


def find_matplotlib() -> type:
    """matplotlib's Figure; UserError where matplotlib, which nothing else needs, is not installed."""
    with told("figures need matplotlib: pip install matplotlib"):
        from matplotlib.figure import Figure
    return Figure


@contextlib.contextmanager
def figure(path: Path, size: tuple[float, float], xlabel: str):
    """The axes of a figure of the average score, which is saved when all is drawn."""
    made = find_matplotlib()(figsize=size, layout="constrained")
    yield (axes := made.subplots())
    axes.set(xlabel=xlabel, ylabel="average score, percent")
    axes.legend(fontsize="small")
    made.savefig(path, dpi=150)


def plot_time(lines: list[Line], path: Path):
    """Figure 2: the average score with its interval against the total time, the base model's score as a line."""
    about = "total time in minutes, reference model and loading counted: median, least, most"
    with figure(path, (7, 4.5), about) as axes:
        for line in lines:
            score, half = line.means()[-1]
            if minutes := [sum(taken.values()) / 60 for taken in line.seconds]:
                middle = median(minutes)  # a single slow run hardly moves it
                spread = [[middle - min(minutes)], [max(minutes) - middle]]
                axes.errorbar(middle, score, half, spread, marker="o", capsize=3, label=line.label)
            else:
                axes.axhline(score, label=f"{line.label}: {score:.2f}", **DASHED)


def plot_sweep(lines: list[Line], name: str, path: Path):
    """Figure 3: the average score over gamma (a) or rho (b), full training as a dashed line or as rho = 1."""
    ends, points = {"BASE": "(rho 0)", "FULL": "(rho 1)"}, []
    for line in lines:
        if found := re.search(rf"\({name} ([\d.]+)\)", ends.get(line.label, line.label)):
            points.append([float(found[1]), *line.means()[-1]])
    with figure(path, (5, 3.5), name) as axes:
        x, scores, halves = np.array(sorted(points), dtype=float).reshape(-1, 3).T  # no interval: nan
        axes.errorbar(x, scores, halves, marker="o", capsize=3, label="SSTOKEN")
        for line in (line for line in lines if (name, line.label) == ("gamma", "FULL")):
            axes.axhline(line.means()[-1][0], label="FULL", **DASHED)
