"""The paper's tables and figures: methods x seeds, each trained, evaluated and averaged.

    python -m paper.reproduce --table 1 --model meta-llama/Llama-3.2-3B --out results/llama [-- flags of train.py]

A cell is one method with one seed: a run of train.py in a folder under --out, with evaluate.py's results beside it. A
complete cell is not run again. So the same command goes on after a stop, and tables share their cells.
"""

import argparse
import functools
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from data import RELEASED_POOL, load_tokenizer
from evaluate import prepare
from model import read_config
from paper.baselines import WITH_REFERENCE, reads
from paper.benchmarks import GROUPS, TABLE, forget_rows, loader, task_names
from paper.objectives import OBJECTIVES
from paper.tables import Line, find_matplotlib, paper_rho, report
from support import command, runs, templates
from support.checkpoint import find_checkpoint
from support.files import check, check_writable, read_json, write_json
from support.losses import Report, files_key, model_key
from support.sources import Account, find_files, source_names
from support.start import run_script

ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """A row of a table: its label, its name in --methods, and the flags of train.py that tell it from the others."""

    label: str
    method: str
    flags: tuple[str, ...]  # none: the base model

    @property
    def name(self) -> str:
        """How its cells' folders begin, the same in every table that has this row."""
        return "-".join(flag.removeprefix("--") for flag in self.flags).removeprefix("method-")


BASE = Row("BASE", "base", ())
FULL = Row("FULL", "full", ("--method", "full"))
LABELS = {"random": "RANDOM", "rho1": "RHO-1", "tokencleaning": "TOKENCLEANING, fixed-model"}
LABELS |= {"self-evolving": "TOKENCLEANING, self-evolving", "sstoken": "SSTOKEN"}
EXTRA = ("auto", *OBJECTIVES)  # not in the paper; auto: --method sstoken --rho auto


def row(name: str, rho: float, label: str = "", *more) -> Row:
    """The row of a method that selects: its flags of train.py, --rho where it reads one, and `more`."""
    method, rho = ("sstoken", "auto") if name == "auto" else (name, rho)
    share = ("--rho", rho) if reads(name, "--rho") else ()
    return Row(label or LABELS.get(name) or name.upper(), name, ("--method", method, *map(str, (*share, *more))))


def table_rows(table: int, rho: float, layers: int) -> list[Row]:
    """The rows of one of the paper's tables, for a model of so many layers. rho: for tables that do not vary it."""
    # what is train.py's default needs no flag
    depths = {"SHALLOW": ("--layer", 0), "MEDIUM": ("--layer", layers // 2), "DEEP": ()}
    gammas = {gamma: ("--gamma", gamma) if gamma != 0.5 else () for gamma in (1.0, 0.75, 0.5, 0.25, 0.0)}
    of_table = {
        1: [row(name, rho) for name in LABELS],
        2: [row("sstoken", rho, label, *flags) for label, flags in depths.items()],
        3: [row("sstoken", rho, f"SSTOKEN (gamma {gamma})", *flags) for gamma, flags in gammas.items()],
        4: [row("sstoken", share, f"SSTOKEN (rho {share})") for share in (0.2, 0.4, 0.6, 0.8)],
        5: [row(name, share, f"{LABELS[name]} (rho {share})") for name in LABELS for share in (0.6, 0.8)],
    }
    return [BASE, FULL, *of_table[table]]


def asked_rows(args: argparse.Namespace, layers: int) -> list[Row]:
    """The rows of --table that --methods names; in table 1, behind the paper's, --rho auto and the objectives too."""
    rows = table_rows(args.table, args.rho, layers) + [row(name, args.rho) for name in EXTRA if args.table == 1]
    asked = [row for row in rows if row.method in args.methods]
    names = ", ".join(dict.fromkeys(row.method for row in rows))
    check(asked, f"--table {args.table} has none of the rows of --methods; it has {names}")
    return asked


def call(command: list[str]):
    """Run a command to its end. A signal is passed on to it, so that it leaves its checkpoint; its failure is ours."""
    print("$", shlex.join(map(str, command)), flush=True)

    def stop(number, frame):
        raise runs.Stopped(number, "stopped; the same command goes on from here")

    with runs.on_signals(stop):
        process = subprocess.Popen(list(map(str, command)))
        try:
            status = process.wait()
        except runs.Stopped:
            process.terminate()
            process.wait()
            raise
    check(status >= 0, f"{command[1]} was ended by signal {-status}; the same command goes on from here")
    if status:
        raise SystemExit(status)


def given(**values) -> list:
    """A command's flags with their values; a flag without a value is left out."""
    flags = []
    for name, value in values.items():
        flags += [f"--{name.replace('_', '-')}", value] if value else []
    return flags


class Cells:
    """What trains and evaluates, in folders under --out."""

    def __init__(self, args: argparse.Namespace, model: Path):
        self.args, self.out, self.model = args, Path(args.out).resolve(), model
        forget_rows()
        rows, tokenizer, self.keys = args.benchmarks and Path(args.benchmarks), load_tokenizer(model), {}
        for name in task_names(args.tasks):
            self.keys[name] = prepare(name, loader(name, rows), tokenizer, args.eval_limit).key
        self.launcher = shlex.split(args.launcher) if args.launcher else [sys.executable]
        check(shutil.which(self.launcher[0]), f"--launcher {self.launcher[0]} is no command of this machine")
        self.same = given(model=args.model, revision=args.revision, dtype=args.dtype, device=args.device)

    def train(self, row: Row, seed: int) -> Path:
        """The folder of a row's run with this seed, which is made unless it is there."""
        reference = self.reference(seed) if row.method in WITH_REFERENCE else None
        flags = given(data=self.args.data, limit=self.args.limit, reference=reference)
        return self.trained(f"{row.name}-seed{seed}", seed, row.method, [*row.flags, *flags])

    def reference(self, seed: int) -> Path:
        """The reference model of a seed, the same for all methods."""
        args = self.args
        flags = given(method="full", data=args.reference_data or args.data, limit=args.reference_limit)
        flags += given(reference_top=args.reference_top, rating_field=args.reference_top and args.rating_field)
        return self.trained(f"reference-seed{seed}", seed, "full", flags)

    def trained(self, name: str, seed: int, method: str, flags: list) -> Path:
        """The folder of a run of train.py, which is made unless it is complete."""
        folder, words = self.out / name, iter(self.args.flags)
        if "seconds" in runs.read_record(folder):
            return folder
        flags += given(loss_mean="batch", seed=seed, cache=self.out / "cache")
        for word in words:  # what follows --, for the methods that read it
            if reads(method, word.split("=")[0]):
                flags.append(word)
            elif "=" not in word:
                next(words, None)  # its value
        call([*self.launcher, ROOT / "train.py", *self.same, *flags, "--out", folder, "--resume"])
        for checkpoint in folder.rglob("checkpoint-*.safetensors"):  # a complete run needs none
            checkpoint.unlink()
        return folder

    def evaluate(self, adapter: Path | None) -> dict:
        """evaluate.py's record of an adapter, or of the base model, made unless it is there."""
        args, file = self.args, adapter / "evaluation.json" if adapter else self.out / "base.json"
        if not self.answered(file, adapter):
            flags = given(tasks=args.tasks, out=file, adapter=adapter, data=args.benchmarks, limit=args.eval_limit)
            call([*self.launcher, ROOT / "evaluate.py", *self.same, *flags])
        found = self.answered(file, adapter)
        check(found, f"{file} has no answers of this model to these rows: another process may have replaced it")
        return found

    def answered(self, file: Path, adapter: Path | None) -> dict | None:
        """A report's record with the answers of these very files to all that is asked, if there is one."""
        key, template = model_key(self.model, adapter), templates.trained_in([adapter] if adapter else [])
        for held in Report(file).records().values():
            same = held.get("key") == key and held.get("template") == template
            if same and self.keys.items() <= held["keys"].items():
                return held

    def seconds(self, row: Row, seed: int, folder: Path) -> dict[str, float]:
        """What a cell took in all, as Figure 2 counts it: loading, reference, losses of frozen models, training."""
        taken = dict(runs.read_record(folder)["seconds"])
        if row.method in WITH_REFERENCE:
            taken["reference"] = sum(runs.read_record(self.reference(seed))["seconds"].values())
        return taken


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `flags` is what follows a lone --, for train.py."""
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    parser = command.ArgumentParser("The paper's tables and figures: methods x seeds, trained and evaluated.")
    # fmt: off
    add = parser.group("table (Sec. 4)")
    add("--table", type=int, choices=(1, 2, 3, 4, 5), default=1,
        help="1: methods, Figure 2. 2: the attention's layer. 3: gamma, Figure 3a. 4: rho, Figure 3b. 5: methods x rho")
    add("--methods", metavar="ROW[,ROW...]", help=f"only these rows; table 1 also has {', '.join(EXTRA)}")
    add("--seeds", type=int, bound="above 0", default=3, metavar="N", help="runs of each row, with seeds 42, 43, ...")
    add("--rho", type=float, bound="in (0, 1]", help="of tables that do not vary it (default: as in Sec. 4.2)")
    add("--out", required=True, help="folder of the cells, table.md, table.json and the figures")
    add = parser.group("training")
    count = functools.partial(add, type=int, bound="above 0", metavar="N")
    add("--model", required=True, help="a folder in Hugging Face layout, or a name on the hub")
    add("--revision", help="branch, tag or commit of --model on the hub")
    add("--data", default=RELEASED_POOL, metavar="SOURCE[,SOURCE...]", help="rows, as train.py takes them")
    count("--limit", help="train on the first N rows of each source")
    add("--reference-data", metavar="SOURCE[,SOURCE...]", help="rows of the reference model (default: --data)")
    count("--reference-limit", help="train the reference on the first N rows of each source")
    count("--reference-top", help="or on the N best-rated rows (default for the released pool: 10000, Sec. 4.1)")
    add("--rating-field", default="score", metavar="COLUMN", help="the column that --reference-top reads")
    add = parser.group("evaluation (Appendix A.2)")
    add("--tasks", default="all", help="benchmarks, as evaluate.py takes them")
    add("--benchmarks", metavar="DIR", help="folder of the benchmarks' rows (default: the data sets on the hub)")
    add("--eval-limit", type=float, bound="above 0", metavar="N", help="evaluate.py's --limit")
    add = parser.group("machine")
    add("--launcher", metavar="COMMAND", help="instead of Python, such as 'torchrun --nproc_per_node 8'")
    # fmt: on
    command.add_flags(parser)
    args = parser.parse_args(argv[:end])
    args.flags, tasks = argv[end + 1 :], task_names(args.tasks)
    for word in args.flags:
        check(word.split("=")[0] not in OURS, f"{word} after -- would undo what reproduce.py sets for each cell")
    args.rho = paper_rho(args.model) if args.rho is None else args.rho
    args.asked = [task for _, task, _ in TABLE if {*GROUPS.get(task, [[task]])[0]} <= {*tasks}]
    check(args.asked, f"--tasks {args.tasks} holds none of the table's columns as a whole")
    check(not args.benchmarks or Path(args.benchmarks).is_dir(), f"--benchmarks {args.benchmarks} is no folder")
    known = ["base", "full", *LABELS]
    args.methods = args.methods.split(",") if args.methods else known
    for name in args.methods:
        check(name in [*known, *EXTRA], f"--methods {name!r} is not one of {', '.join([*known, *EXTRA])}")
    pool = args.data == RELEASED_POOL and not args.limit
    chosen = args.reference_data or args.reference_limit or args.reference_top
    if pool and not chosen:
        args.reference_top = 10_000
    elif not chosen and args.table in (1, 5):
        trains = {*args.methods} & {*WITH_REFERENCE}
        check(not trains, "say what the reference model is trained on: --reference-data, -limit or -top")
    return args


# Flags of train.py that a cell gets from its row, its seed or the command
OURS = """
--method --rho --gamma --layer --loss-mean --seed --cache --out --resume --model --data --limit --overwrite
--reference --reference-data --reference-top --rating-field --revision --dtype --device
""".split()
# What may differ from one command to the next on the same folder: it adds cells, or says how to run them
FREE = "table methods seeds tasks asked eval_limit benchmarks launcher out rho debug".split()


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    out = Path(args.out)
    check_writable(settings := out / "settings.json")
    if args.table in (1, 3, 4):
        find_matplotlib()
    sources = source_names(f"{args.data},{args.reference_data or args.data}")
    files = [file for source in sources if source != "pool" for file in find_files(source, Account())]
    folder = find_checkpoint(args.model, args.revision)
    shared = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in FREE}
    shared |= {"what follows --": shared.pop("--flags"), "the content of --data": files_key(files)}
    shared["the content of --model"] = model_key(folder, whole=True)  # a cell is known by its name alone
    held = read_json(settings) if settings.exists() and any(out.glob("*/run.json")) else shared
    runs.check_same(f"{out} holds cells", held, shared)
    write_json(settings, shared)

    columns = [column for column in TABLE if column[1] in args.asked]
    rows = asked_rows(args, read_config(folder).num_hidden_layers)
    cells, lines = Cells(args, folder), {row: Line(row.label, [], [], []) for row in rows}
    for seed in range(42, 42 + args.seeds):
        for row, line in lines.items():
            if row is BASE and line.seeds:
                continue
            cell = None if row is BASE else cells.train(row, seed)
            results = cells.evaluate(cell)["results"]
            scores = [100 * results[task][metric] for _, task, metric in columns]
            line.scores.append([*scores, mean(scores)])
            line.seconds.extend([cells.seconds(row, seed, cell)] if cell else [])
            line.seeds.append(seed)
            report(args, [line for line in lines.values() if line.seeds], columns)
    print((out / f"table{args.table}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
