"""The paper's tables and figures: methods x seeds, each trained, evaluated and averaged.

    python -m paper.reproduce --table 1 --model meta-llama/Llama-3.2-3B --out results/llama [-- flags of train.py]

A cell is one method with one seed: a run of train.py in a folder of its own under --out, with evaluate.py's results
beside it. A cell that is complete is not run again, so the same command goes on where it was stopped, and tables that
share a cell share its run. All cells share every setting but what their row's name says.
"""

import argparse
import math
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from support.start import run_script

import numpy as np

from data import RELEASED_POOL, load_tokenizer
from evaluate import prepare
from model import read_config
from paper.baselines import WITH_REFERENCE
from paper.benchmarks import GROUPS, TABLE, forget_rows, loader, task_names
from paper.objectives import OBJECTIVES
from support import command, machine, runs, templates
from support.checkpoint import find_checkpoint
from support.files import UserError, check_writable, read_json, write_json, write_whole
from support.losses import Report, files_key, model_key
from support.sources import Account, find_files, source_names

ROOT = Path(__file__).parents[1]
PAPER = Path(__file__).with_name("paper.json")

# ------------------------------------------------------------------------------------------------- rows of a table


class Row(NamedTuple):
    """A row of a table: its label, and the flags of train.py that tell it from the others (None: the base model)."""

    label: str
    flags: tuple[str, ...] | None

    @property
    def method(self) -> str:
        return self.flags[1] if self.flags else "base"

    @property
    def name(self) -> str:
        """What its cells' folders begin with: the same in every table that has this row."""
        return "-".join(flag.removeprefix("--") for flag in self.flags or ("base",)).removeprefix("method-")


BASE = Row("BASE", None)
FULL = Row("FULL", ("--method", "full"))
LABELS = {
    "random": "RANDOM",
    "rho1": "RHO-1",
    "tokencleaning": "TOKENCLEANING, fixed-model",
    "self-evolving": "TOKENCLEANING, self-evolving",
    "sstoken": "SSTOKEN",
}


def method(name: str, rho: float, gamma: float | None = None, layer: int | None = None, label: str = "") -> Row:
    """The row of a method that selects; gamma and layer are written out where they are not train.py's defaults."""
    flags = ("--method", name, "--rho", str(rho))
    flags += ("--gamma", str(gamma)) if gamma not in (None, 0.5) else ()
    flags += ("--layer", str(layer)) if layer not in (None, -1) else ()
    return Row(label or LABELS[name], flags)


def table_rows(table: int, rho: float, layers: int) -> list[Row]:
    """The rows of one of the paper's tables, for a model of so many layers. rho: of the tables that do not vary it."""
    if table == 1:
        return [BASE, FULL, *(method(name, rho) for name in LABELS)]
    if table == 2:
        depths = {"SHALLOW": 0, "MEDIUM": layers // 2, "DEEP": -1}
        return [BASE, FULL, *(method("sstoken", rho, layer=layer, label=label) for label, layer in depths.items())]
    if table == 3:
        gammas = (1.0, 0.75, 0.5, 0.25, 0.0)
        return [BASE, FULL, *(method("sstoken", rho, gamma, label=f"SSTOKEN (gamma {gamma})") for gamma in gammas)]
    if table == 4:
        shares = (0.2, 0.4, 0.6, 0.8)
        return [BASE, FULL, *(method("sstoken", share, label=f"SSTOKEN (rho {share})") for share in shares)]
    return [BASE, FULL] + [
        method(name, share, label=f"{label} (rho {share})") for name, label in LABELS.items() for share in (0.6, 0.8)
    ]


def asked_rows(args: argparse.Namespace, layers: int) -> list[Row]:
    """The rows of --table that --methods names; in table 1, behind the paper's, other objectives too."""
    everything = table_rows(args.table, args.rho, layers)
    if args.table == 1:
        everything += [method(name, args.rho, label=name.upper()) for name in OBJECTIVES]
    rows = [row for row in everything if row.method in args.methods]
    if not rows:
        of_table = ", ".join(dict.fromkeys(row.method for row in everything))
        raise UserError(f"--table {args.table} has none of the rows of --methods; it has {of_table}")
    return rows


def plain_name(model: str) -> str:
    """A model's name as hub, folder and paper have it in common: without owner, case and hyphens, or "Instruct"."""
    return Path(model).name.lower().replace("-", "").replace("instruct", "")


def paper_rho(model: str) -> float:
    """Sec. 4.2: 0.8 for Qwen-2.5-14B, 0.6 for the others."""
    return 0.8 if plain_name(model).startswith(plain_name("Qwen-2.5-14B")) else 0.6


# ----------------------------------------------------------------------------------------------------------- cells


def call(command: list[str]):
    """Run a command to its end. A signal ends it first, so that it leaves its checkpoint; its failure is ours too."""
    print("$", shlex.join(map(str, command)), flush=True)

    def stop(number, frame):
        raise runs.Stopped(number, "stopped; the same command goes on from here")

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    process = subprocess.Popen(list(map(str, command)))
    try:
        status = process.wait()
    except runs.Stopped:
        process.terminate()
        process.wait()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if status < 0:
        raise UserError(f"{command[1]} was ended by signal {-status}; the same command goes on from here")
    if status:
        raise SystemExit(status)


class Cells:
    """What trains and evaluates, in folders under --out."""

    def __init__(self, args: argparse.Namespace, model: Path):
        """model: the folder of --model."""
        self.args, self.out, self.model = args, Path(args.out).resolve(), model
        forget_rows()
        rows, tokenizer = args.benchmarks and Path(args.benchmarks), load_tokenizer(model)
        asked = {name: prepare(name, loader(name, rows), tokenizer, args.eval_limit) for name in task_names(args.tasks)}
        self.keys = {name: questions.key for name, questions in asked.items()}
        self.launcher = shlex.split(args.launcher) if args.launcher else [sys.executable]
        if not shutil.which(self.launcher[0]):
            raise UserError(f"--launcher {self.launcher[0]} is no command of this machine")

    def train(self, row: Row, seed: int) -> Path:
        """The folder of a row's run with this seed, which is made unless it is there."""
        args, folder = self.args, self.out / f"{row.name}-seed{seed}"
        flags = [*row.flags, "--data", args.data]
        if row.method in WITH_REFERENCE:
            flags += ["--reference", self.reference(seed)]
        self._train(folder, seed, flags, args.limit)
        return folder

    def reference(self, seed: int) -> Path:
        """The reference model of a seed, one for all methods that ask for one."""
        args, folder = self.args, self.out / f"reference-seed{seed}"
        rows, limit = args.reference_data or args.data, args.reference_limit
        if args.reference_by:
            rows, limit = self.rated(rows, limit or args.limit), None
        flags = ["--method", "full", "--data", rows]
        if args.reference_top:
            flags += ["--reference-top", args.reference_top, "--rating-field", args.rating_field]
        self._train(folder, seed, flags, limit)
        return folder

    def rated(self, rows: str, limit: int | None) -> Path:
        """The rows with DS2's columns, rated by the model itself; made unless they are there."""
        args, file = self.args, self.out / "rated.jsonl"
        if not file.exists():
            flags = ["--data", rows, "--top", args.reference_top, "--out", file, *args.machine]
            flags += ["--limit", limit] if limit else []
            call([*self.launcher, "-m", "paper.ds2", "--model", args.model, *flags])
        return file

    def _train(self, folder: Path, seed: int, flags: list, limit: int | None):
        args = self.args
        if "seconds" in runs.read_record(folder):
            return
        flags += ["--limit", limit] if limit else []
        flags += ["--max-steps", args.max_steps] if args.max_steps else []
        flags += ["--loss-mean", "batch", "--seed", seed, "--cache", self.out / "cache", *args.machine, *args.flags]
        call([*self.launcher, ROOT / "train.py", "--model", args.model, *flags, "--out", folder, "--resume"])
        for checkpoint in folder.rglob("checkpoint-*.safetensors"):  # it goes on from nowhere any more
            checkpoint.unlink()

    def evaluate(self, adapter: Path | None) -> dict:
        """evaluate.py's record of an adapter, or of the base model, made unless it is there."""
        args = self.args
        file = (adapter or self.out) / ("evaluation.json" if adapter else "base.json")
        if not self.answered(file, adapter):
            flags = ["--tasks", args.tasks, "--out", file, *args.machine]
            flags += ["--adapter", adapter] if adapter else []
            flags += ["--data", args.benchmarks] if args.benchmarks else []
            flags += ["--limit", args.eval_limit] if args.eval_limit else []
            call([*self.launcher, ROOT / "evaluate.py", "--model", args.model, *flags])
        if not (found := self.answered(file, adapter)):
            raise UserError(f"{file} has no answers of this model to these rows: another process may have replaced it")
        return found[0]

    def answered(self, file: Path, adapter: Path | None) -> list[dict]:
        """Of a report, the records with the answers of these very files to all that is asked; there is one or none."""
        asked = (model_key(self.model, adapter), templates.trained_in([adapter] if adapter else []))
        found = [held for held in Report(file).records().values() if (held.get("key"), held.get("template")) == asked]
        return [held for held in found if self.keys.items() <= held["keys"].items()]

    def seconds(self, row: Row, seed: int, folder: Path) -> dict[str, float]:
        """What a cell took in all, as Figure 2 counts it: loading, reference, losses of frozen models, training."""
        taken = dict(runs.read_record(folder)["seconds"])
        if row.method in WITH_REFERENCE:
            taken["reference"] = sum(runs.read_record(self.reference(seed))["seconds"].values())
        return taken


# --------------------------------------------------------------------------------------------------------- results


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Student's t: the value that a share `probability` of the distribution lies below, for 95 % intervals 0.975.

    Its density integrated by the trapezoid rule over t = tan(x), where it falls to zero at a finite place.
    """
    x = np.linspace(0, np.pi / 2, 200_001)[:-1]
    t = np.tan(x)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(t**2 / freedom)) * (1 + t**2)
    below = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (x[1] - x[0])
    return float(np.interp(probability, below, t))


def interval(values: list[float]) -> float | None:
    """Half the width of the mean's 95 % interval over seeds; None for a single one."""
    if len(values) < 2:
        return None
    return t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def percentages(record: dict, columns: list[tuple[str, str, str]]) -> list[float]:
    """A record's scores in the order of the table's columns, and their average, in percent."""
    values = [100 * record["results"][task][metric] for _, task, metric in columns]
    return [*values, mean(values)]


class Line(NamedTuple):
    """A row with what its cells came to: for each column the mean over seeds and half the width of its interval."""

    label: str
    seeds: list[int]
    scores: list[list[float]]  # a list for each seed, the average last
    seconds: list[dict[str, float]]  # empty for the base model

    def column(self, i: int) -> tuple[float, float | None]:
        values = [score[i] for score in self.scores]
        return mean(values), interval(values)

    def total_seconds(self) -> tuple[float, float, float]:
        """Median, least and greatest over seeds: whatever else a machine did once moves the median little."""
        totals = [sum(taken.values()) for taken in self.seconds]
        return median(totals), min(totals), max(totals)


def markdown(lines: list[Line], columns: list[str], paper: dict[str, list[float]], heading: str) -> str:
    """The paper's table of our lines, the best mean of each column bold, and the paper's own lines under it."""

    def cell(value, error, best):
        text = f"{value:.2f}" + (f" ± {error:.2f}" if error is not None else "")
        return f"**{text}**" if best else text

    def row(cells):
        return "| " + " | ".join(cells) + " |"

    best = [max(round(line.column(i)[0], 2) for line in lines) for i in range(len(columns))]
    text = [row(["Methods", *columns, "seeds"]), row(["---"] + ["---:"] * (len(columns) + 1))]
    for line in lines:
        means = [line.column(i) for i in range(len(columns))]
        cells = [cell(*m, round(m[0], 2) == top) for m, top in zip(means, best, strict=True)]
        text.append(row([line.label, *cells, str(len(line.seeds))]))
    text.append(row([heading, *[""] * (len(columns) + 1)]))
    for label, values in paper.items():
        top = [max(column) for column in zip(*paper.values(), strict=True)]
        cells = [cell(value, None, value == most) for value, most in zip(values, top, strict=True)]
        text.append(row([label, *cells, ""]))
    return "\n".join(text)


def paper_lines(table: int, model: str, columns: list[str]) -> tuple[str, dict[str, list[float]]]:
    """The paper's own numbers for a table: those of the same model, else of the first that the table has."""
    given = read_json(PAPER)
    parts = given["tables"][str(table)]
    base = next((name for name in parts if plain_name(name) == plain_name(model)), next(iter(parts)))
    places = [given["columns"].index(column.split(" ")[0]) for column in columns]
    return base, {label: [values[i] for i in places] for label, values in parts[base].items()}


# --------------------------------------------------------------------------------------------------------- figures


def find_pyplot():
    """matplotlib's pyplot; UserError where matplotlib, which nothing else needs, is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # files, no window
    from matplotlib import pyplot

    return pyplot


def new_figure(**settings):
    return find_pyplot().subplots(**settings, layout="constrained")


def save_figure(figure, path: Path):
    figure.savefig(path, dpi=150)
    find_pyplot().close(figure)


def plot_time(lines: list[Line], path: Path):
    """Figure 2: the average score with its interval against the total time, the base model's score as a line."""
    figure, axes = new_figure(figsize=(7, 4.5))
    for line in lines:
        score, error = line.column(-1)
        if not line.seconds:
            axes.axhline(score, color="gray", linestyle="--", linewidth=1, label=f"{line.label}: {score:.2f}")
            continue
        middle, least, most = (seconds / 60 for seconds in line.total_seconds())
        spread = [[middle - least], [most - middle]]
        axes.errorbar(middle, score, error, spread, marker="o", capsize=3, label=line.label)
    axes.set(xlabel="total time in minutes, reference model and loading counted: median, least, most")
    axes.set(ylabel="average score, percent")
    axes.legend(fontsize="small")
    save_figure(figure, path)


def plot_sweep(lines: list[Line], name: str, path: Path):
    """Figure 3: the average score over gamma (a) or rho (b), full training as a dashed line or as rho = 1."""
    points = {}
    for line in lines:
        if f"({name} " in line.label:
            points[float(line.label.split(f"({name} ")[1].rstrip(")"))] = line.column(-1)
        elif name == "rho":
            points[{"BASE": 0.0, "FULL": 1.0}[line.label]] = line.column(-1)
    figure, axes = new_figure(figsize=(5, 3.5))
    x = sorted(points)
    errors = [points[value][1] or 0.0 for value in x]
    axes.errorbar(x, [points[value][0] for value in x], errors, marker="o", capsize=3, label="SSTOKEN")
    for line in lines:
        if name == "gamma" and line.label == "FULL":
            axes.axhline(line.column(-1)[0], color="gray", linestyle="--", linewidth=1, label="FULL")
    axes.set(xlabel=name, ylabel="average score, percent")
    axes.legend(fontsize="small")
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `flags` is what follows a lone --, for train.py."""
    argv = sys.argv[1:] if argv is None else argv
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = command.ArgumentParser("The paper's tables and figures: methods x seeds, trained and evaluated.")
    # fmt: off
    add = parser.group("table (Sec. 4)")
    add("--table", type=int, choices=(1, 2, 3, 4, 5), default=1,
        help="1: methods, with Figure 2. 2: the attention's layer. 3: gamma, with Figure 3a. 4: rho, with Figure 3b. "
        "5: methods x rho")
    add("--methods", metavar="ROW[,ROW...]", help="only these rows, by their methods (base, full, sstoken, ...); "
        "table 1 takes those of paper/objectives.py too")
    add("--seeds", type=int, bound="above 0", default=3, metavar="N", help="runs of each row, with seeds 42, 43, ...")
    add("--rho", type=float, bound="in (0, 1]",
        help="share of tokens where a table does not vary it; default: 0.8 for Qwen-2.5-14B, 0.6 for others, as in "
        "Sec. 4.2")
    add("--out", required=True, help="folder of the cells, table.md, table.json and the figures")
    add = parser.group("training")
    add("--model", required=True, help="checkpoint: a folder in Hugging Face layout, or a name on the hub")
    add("--revision", help="branch, tag or commit of a --model on the hub")
    add("--data", default=RELEASED_POOL, metavar="SOURCE[,SOURCE...]", help="what is trained on, as train.py takes it")
    add("--limit", type=int, bound="above 0", metavar="N", help="train on the first N rows of each source")
    add("--max-steps", type=int, bound="above 0", metavar="N", help="stop each training after N optimizer steps")
    add("--reference-data", metavar="SOURCE[,SOURCE...]", help="rows of the reference model; default: those of --data")
    add("--reference-limit", type=int, bound="above 0", metavar="N",
        help="train the reference on the first N rows of each source")
    add("--reference-top", type=int, bound="above 0", metavar="K",
        help="or on the K best-rated rows; default, of the released pool as a whole: 10000, as in Sec. 4.1")
    add("--rating-field", default="score", metavar="COLUMN", help="the column that --reference-top reads")
    add("--reference-by", choices=("ds2",), help="have the model rate the rows first, and take DS2's --reference-top "
        "(10000) of them")
    add = parser.group("evaluation (Appendix A.2)")
    add("--tasks", default="all", help="benchmarks, as evaluate.py takes them")
    add("--benchmarks", metavar="DIR", help="folder of the benchmarks' rows; default: the hub's data sets")
    add("--eval-limit", type=float, bound="above 0", metavar="N",
        help="the first N rows of each task; below 1: this share of them")
    add = parser.group("machine")
    add("--launcher", metavar="COMMAND", help="what starts train.py and evaluate.py instead of Python, such as "
        "'torchrun --nproc_per_node 8'")
    # fmt: on
    command.add_flags(parser)
    args = parser.parse_args(argv)
    args.flags = flags
    args.machine = ["--dtype", args.dtype, "--device", args.device]
    args.machine += ["--revision", args.revision] if args.revision else []
    if taken := [flag for flag in flags if flag.split("=")[0] in OURS]:
        raise UserError(f"{taken[0]} after -- would undo what reproduce.py sets for each cell")
    args.rho = paper_rho(args.model) if args.rho is None else args.rho
    names = task_names(args.tasks)
    args.asked = [task for _, task, _ in TABLE if all(part in names for part in GROUPS.get(task, [[task]])[0])]
    if not args.asked:
        raise UserError(f"--tasks {args.tasks} holds none of the table's columns as a whole")
    known = ("base", "full", *LABELS, *OBJECTIVES)
    args.methods = args.methods.split(",") if args.methods else ["base", "full", *LABELS]
    if args.benchmarks and not Path(args.benchmarks).is_dir():
        raise UserError(f"--benchmarks {args.benchmarks} is no folder")
    if unknown := sorted(set(args.methods) - set(known)):
        raise UserError(f"--methods {unknown[0]!r} is not one of {', '.join(known)}")
    if set(args.methods) & set(WITH_REFERENCE) and args.table in (1, 5):
        whole_pool = args.data == RELEASED_POOL and not args.limit
        if not (args.reference_data or args.reference_limit or args.reference_top or args.reference_by or whole_pool):
            raise UserError("say what the reference model is trained on: --reference-data, -limit or -top")
        if whole_pool and not (args.reference_data or args.reference_limit):
            args.reference_top = args.reference_top or 10_000
    if args.reference_by:
        args.reference_top, args.rating_field = args.reference_top or 10_000, "curated"
    return args


# Flags of train.py that a cell gets from its row, its seed or the command
OURS = {
    *("--method", "--rho", "--gamma", "--layer", "--loss-mean", "--seed", "--cache", "--out", "--resume"),
    *("--model", "--data", "--limit", "--max-steps", "--reference", "--reference-data", "--reference-top"),
    *("--rating-field", "--revision", "--dtype", "--device", "--overwrite"),
}
# What may differ between one command and the next on the same folder: it adds cells, or says how to run them.
FREE = {
    *("table", "methods", "seeds", "tasks", "asked", "eval_limit", "benchmarks", "launcher", "out", "rho", "machine"),
    "debug",
}


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    out = Path(args.out)
    check_writable(out / "settings.json")
    if args.table in (1, 3, 4):
        find_pyplot()
    sources = source_names(f"{args.data},{args.reference_data or args.data}")
    files = [file for source in sources if source != "pool" for file in find_files(source, Account())]
    folder = find_checkpoint(args.model, args.revision)
    shared = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in FREE}
    shared |= {"what follows --": shared.pop("--flags"), "the content of --data": files_key(files)}
    shared["the content of --model"] = model_key(folder, whole=True)  # a cell is known by its name alone
    settings = out / "settings.json"
    held = read_json(settings) if settings.exists() and any(out.glob("*/run.json")) else shared
    for name in sorted(held.keys() | shared.keys()):
        if held.get(name) != shared.get(name):
            raise UserError(f"{out} has cells of another setting: {name} was {held.get(name)}, now {shared.get(name)}")
    write_json(settings, shared)

    rows = asked_rows(args, read_config(folder).num_hidden_layers)
    columns = [column for column in TABLE if column[1] in args.asked]
    cells, lines = Cells(args, folder), {row: Line(row.label, [], [], []) for row in rows}
    for seed in range(42, 42 + args.seeds):
        for row in rows:
            line = lines[row]
            if row is BASE:
                if not line.seeds:
                    line.seeds.append(seed)
                    line.scores.append(percentages(cells.evaluate(None), columns))
            else:
                folder = cells.train(row, seed)
                line.scores.append(percentages(cells.evaluate(folder), columns))
                line.seconds.append(cells.seconds(row, seed, folder))
                line.seeds.append(seed)
            report(args, [line for line in lines.values() if line.seeds], columns)
    print((out / f"table{args.table}.md").read_text(encoding="utf-8"))


def report(args: argparse.Namespace, lines: list[Line], columns: list[tuple[str, str, str]]):
    """Write the table so far, as text and as JSON, and its figure."""
    out, names = Path(args.out), [column for column, _, _ in columns]
    names.append("AVG" if len(names) == len(TABLE) else f"AVG of {len(names)}")
    base, paper = paper_lines(args.table, args.model, names if len(columns) == len(TABLE) else names[:-1])
    if len(columns) < len(TABLE):
        paper = {label: [*values, mean(values)] for label, values in paper.items()}
    notes = [f"- {note}" for note in read_json(PAPER)["notes"]]
    variants = [line for line in lines if line.label.startswith("TOKENCLEANING,")]
    if len(variants) > 1 and args.table == 1:
        better = max(variants, key=lambda line: line.column(-1)[0])
        place = lines.index(variants[-1]) + 1
        lines = [*lines[:place], better._replace(label="TOKENCLEANING, the better"), *lines[place:]]
    text = markdown(lines, names, paper, f"*the paper, {base}*")
    head = f"Table {args.table}, {command.cell(Path(args.model).name)}: mean ± 95 % interval over seeds, percent.\n\n"
    write_whole(
        out / f"table{args.table}.md",
        lambda path: path.write_text(head + text + "\n\n" + "\n".join(notes) + "\n", encoding="utf-8"),
    )
    record = {"arguments": vars(args), "versions": machine.versions(), "columns": names, "rows": {}}
    for line in lines:
        means = [line.column(i) for i in range(len(names))]
        record["rows"][line.label] = {
            **{"seeds": line.seeds, "scores": line.scores, "seconds": line.seconds},
            **{"mean": [m for m, _ in means], "interval": [half for _, half in means]},
        }
    write_json(out / f"table{args.table}.json", record | {"paper": {base: paper}})
    if args.table == 1:
        plot_time([line for line in lines if not line.label.endswith("the better")], out / "figure2.png")
    elif args.table in (3, 4):
        name, letter = ("gamma", "a") if args.table == 3 else ("rho", "b")
        plot_sweep(lines, name, out / f"figure3{letter}.png")


if __name__ == "__main__":
    run_script(main)
