"""Table 1 in small: models x recipes x methods x seeds, the cheapest informative cells first.

    python results/table1/cells.py --models DIR,DIR --data rows.jsonl,... --benchmarks DIR --out DIR --hours 2

A cell is a run of train.py and its answers to the benchmarks: a line of cells.jsonl in --out, which is not computed
again. A training that was stopped goes on in its folder under --out. results/README.md says what is recorded.
"""

import hashlib
import itertools
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import compare

import evaluate
import lora
import train
from data import load_tokenizer
from model import load_model, read_config
from paper.baselines import WITH_REFERENCE
from paper.benchmarks import GROUPS, OWN_ROWS, TABLE, TASKS, loader
from paper.reproduce import BASE, FULL, Row, row
from support import command, machine, runs
from support.files import check, write_lines
from support.losses import files_key
from support.schemas import conversations
from support.sources import read_file
from support.start import run_script

RHO, SHORT = 0.6, 8  # train.py's share; an answer of so many words is a question of `instructions`
FIRST = [FULL, row("sstoken", RHO), row("auto", RHO), row("random", RHO)]  # the comparison that is asked for
THEN = [row("sstoken", 0.8), row("sstoken", 0.4)]  # Figure 3b
THEN += [row("sstoken", RHO, "", "--gamma", gamma) for gamma in (1.0, 0.0)]  # Figure 3a
THEN += [row("rho1", RHO), row("tokencleaning", RHO)]
METRICS = {name: metric for _, task, metric in [*TABLE, OWN_ROWS] for name in GROUPS.get(task, [[task]])[0]}
KEY = ("model", "epochs", "lr", "method", "seed")


class Cell(NamedTuple):
    """A row of the table in one recipe with one seed; epochs 0: the base model."""

    model: str  # its folder
    epochs: int
    lr: float
    row: Row
    seed: int

    def key(self) -> dict:
        """What tells its line of cells.jsonl from others."""
        values = Path(self.model).name, self.epochs, self.lr, self.row.name or "base", self.seed
        return dict(zip(KEY, values, strict=True))


def size(model: str) -> int:
    """What a model's time goes with: the weights of its layers' MLPs, but for a factor."""
    config = read_config(Path(model))
    return config.num_hidden_layers * config.hidden_size * config.intermediate_size


def all_cells(models: list[str], seeds: int) -> list[Cell]:
    """The cheapest first. The n-th seed tells less: it counts as n times its cost. A method of THEN counts twice."""
    found = [(0, Cell(model, 0, 0.0, BASE, 0)) for model in models]
    for model, epochs, lr, seed in itertools.product(models, (1, 3), (3e-4, 1e-4), range(seeds)):
        for tier, rows in enumerate((FIRST, THEN), 1):
            cost = epochs * size(model) * tier * (1 + seed)
            found += [(cost, Cell(model, epochs, lr, row, 42 + seed)) for row in rows]
    return [cell for _, cell in sorted(found, key=lambda place: place[0])]


def expected_seconds(cell: Cell, done: list[dict]) -> float:
    """What a cell takes, by epochs and size: medians over the same model's cells, else over all. 0 without any."""
    same = [record for record in done if record["model"] == Path(cell.model).name] or done
    trained = [r["seconds"]["training"] / r["size"] / r["epochs"] for r in same if r["epochs"]]
    asked = [r["seconds"]["questions"] / r["size"] for r in same]
    return size(cell.model) * (cell.epochs * median(trained or [0]) + median(asked or [0]))


def split_rows(sources: str, folder: Path) -> dict[str, Path]:
    """The rows as files: "train", a fifth of it for the "reference", "held_out", and its short answers, "instructions".

    Half of the rows with an answer of up to SHORT words are held out, and a tenth of the others: by a digest of the
    prompt, so that rows with the same prompt stay together.
    """
    parts = {"train": [], "reference": [], "held_out": [], "instructions.test": []}
    for source in sources.split(","):
        for turns in conversations(list(read_file(Path(source))), source):
            if turns[-1]["role"] != "assistant":
                continue
            prompt = json.dumps(turns[:-1], ensure_ascii=False).encode()
            number, short = int(hashlib.sha256(prompt).hexdigest(), 16), len(turns[-1]["content"].split()) <= SHORT
            held_out = number % 10 < (5 if short else 1)
            names = ["held_out"] + ["instructions.test"] * short if held_out else ["train"]
            names += ["reference"] * (not held_out and number // 10 % 5 == 0)
            for name in names:
                parts[name].append({"messages": turns})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        check(rows, f"{sources} leave no rows for {name}")
        write_lines(folder / f"{name}.jsonl", rows)
    return {name: folder / f"{name}.jsonl" for name in parts}


class Workshop:
    """What trains and asks a cell."""

    def __init__(self, args):
        self.args, self.out, self.questions = args, Path(args.out), {}
        self.rows = split_rows(args.data, self.out / "rows")
        self.setting = [files_key([self.rows["train"]]), args.max_length, args.eval_limit]

    def train(self, cell: Cell) -> Path:
        """The folder of the cell's run, which is complete."""
        recipe = self.out / Path(cell.model).name / f"epochs{cell.epochs}-lr{cell.lr}"
        flags = ["--model", cell.model, "--max-length", self.args.max_length, "--lr", cell.lr, "--epochs", cell.epochs]
        flags += ["--seed", cell.seed, "--cache", self.out / "cache", "--resume"]
        run = flags + ["--data", self.rows["train"], "--eval-data", self.rows["held_out"], *cell.row.flags]
        if cell.row.method in WITH_REFERENCE:
            reference = recipe / f"reference-seed{cell.seed}"
            run += ["--reference", self.fit(flags + ["--data", self.rows["reference"], "--method", "full"], reference)]
        return self.fit(run, recipe / f"{cell.row.name}-seed{cell.seed}")

    def fit(self, flags: list, folder: Path) -> Path:
        if "seconds" not in runs.read_record(folder):
            train.main(list(map(str, [*flags, "--out", folder])))
        return folder

    def ask(self, cell: Cell, adapter: Path | None) -> dict[str, list[float]]:
        """Of each task what every question is worth, by the metric of Table 1."""
        device, tokenizer = machine.find_device("auto"), load_tokenizer(cell.model)
        if cell.model not in self.questions:
            folders = {name: Path(self.args.benchmarks) for name in METRICS} | {OWN_ROWS[1]: self.out / "rows"}
            limits = dict.fromkeys(METRICS, self.args.eval_limit) | {OWN_ROWS[1]: None}
            self.questions[cell.model] = {
                name: evaluate.prepare(name, loader(name, folder), tokenizer, limits[name])
                for name, folder in folders.items()
            }
        questions = self.questions[cell.model]
        model = load_model(cell.model, getattr(torch, machine.usual_dtype(device)), device)
        if adapter:
            lora.load_adapter(model, adapter)
        answers = evaluate.answer(model, tokenizer, questions, 1024 if device.type == "cpu" else 4096)
        return {
            name: [
                round(TASKS[name]["metrics"](*graded)[METRICS[name]], 4)
                for graded in zip(asked.rows, answers[name], strict=True)
            ]
            for name, asked in questions.items()
        }

    def record(self, cell: Cell) -> dict:
        """A cell's line of cells.jsonl. Its folder is removed: it would hold an adapter."""
        start, record = time.perf_counter(), cell.key() | {"size": size(cell.model)}
        folder = self.train(cell) if cell.epochs else None
        if folder:
            lines, of_run = runs.read_log(folder), runs.read_record(folder)
            record |= {name: of_run[f"held_out_loss_{name}"] for name in ("before", "after")}
            record["kept"] = sum(r["selected_tokens"] for r in lines) / sum(r["response_tokens"] for r in lines)
        trained = time.perf_counter()
        record["scores"] = self.ask(cell, folder)
        record["seconds"] = {"training": trained - start, "questions": time.perf_counter() - trained}
        if folder:
            shutil.rmtree(folder)
        return record


def main():
    parser = command.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    for flag in ("--models", "--data", "--benchmarks", "--out"):
        add(flag, required=True)
    add("--hours", type=float, default=0.0, help="start no cell that would end later; 0: only write the tables")
    add("--seeds", type=int, default=3)
    add("--max-length", type=int, default=512)
    add("--eval-limit", type=float, help="evaluate.py's --limit, for the benchmarks")
    args = parser.parse_args()
    path, end = Path(args.out) / "cells.jsonl", time.perf_counter() + 3600 * args.hours
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    plan = all_cells(args.models.split(","), args.seeds)
    left = [cell for cell in plan if not any(cell.key().items() <= record.items() for record in done)]
    workshop = Workshop(args) if args.hours else None
    same = not workshop or all(record["setting"] == workshop.setting for record in done)
    check(same, f"{path} holds cells of other rows or limits")  # before hours are spent
    while fitting := [cell for cell in left if time.perf_counter() + expected_seconds(cell, done) < end]:
        left.remove(cell := fitting[0])
        done.append({"setting": workshop.setting} | workshop.record(cell))
        write_lines(path, done)
        print(*cell.key().values(), f"{sum(done[-1]['seconds'].values()):.0f} s", flush=True)
    compare.write_report(done, Path(args.out))


if __name__ == "__main__":
    run_script(main)
