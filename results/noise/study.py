"""When selection fails: noise planted in the responses, and what each method makes of it.

    python results/noise/study.py --model DIR --data rows.jsonl --out DIR

The oracle trains on clean tokens alone. results/README.md says what is recorded.
A training is a line of trainings.jsonl in --out, and is not run again.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import report
from planted import KINDS, TOKENS, plant

import data
import lora
import train
from model import load_model
from paper import auto, baselines
from paper.frozen import FrozenLosses, response_losses, signals
from paper.objectives import OBJECTIVES, probability_gain
from sstoken import excess_loss, normalize, retrospective_excess_loss, score
from support import command, machine
from support.files import check, write_lines
from support.start import run_script

GAMMA = 0.5  # train.py's default
ROWS, LENGTH = 48, 256  # to train on; as many more for the reference, half held out
METHODS = {name: f"--method {name}" for name in ("full", "random", *OBJECTIVES)}  # by their flags
METHODS |= {"sstoken": "", "probability": "--gain probability", "auto": "--rho auto"}
METHODS |= {"rho1": "--method rho1 --reference-data -", "oracle": "--method full"}
PLACE = ("model", "kind", "lr", "seed", "method")  # of a training
FOLLOWED = ("full", "sstoken", "probability", "auto")  # the scores, in trainings by these


def measure(nll: list, attention: list, history: list, reference: list, noise: list[Tensor]) -> dict[str, float]:
    """Of each score the AUROC of clean over noise, the mean over samples."""
    found = {}
    for current, att, his, ref, noisy in zip(nll, attention, history, reference, noise, strict=True):  # (L_resp,)
        rel = retrospective_excess_loss(current, his)
        scores = {
            "REL": normalize(rel),  # Eq. 8
            "attention": att,  # Eq. 7
            "ssToken": score(normalize(rel), att, GAMMA),  # Eq. 9
            "excess loss": excess_loss(his, ref),  # Eq. 2
            "probability": normalize(probability_gain(current, his)),
        }
        for name, values in scores.items() if noisy.any() else ():
            above = values[~noisy].unsqueeze(1) - values[noisy]  # ties count half
            found.setdefault(f"{name}, auroc", []).append((1 + above.sign().double().mean().item()) / 2)
    return {key: fmean(values) for key, values in found.items()}


class Setting:
    """One kind of data with one rate and one seed: what is known before any training."""

    def __init__(self, model, tokenizer, examples: list[data.Example], references: dict, kind: str, lr, seed: int):
        self.model, self.record = model, {"kind": kind, "lr": lr, "seed": seed}
        self.flags = ["--model", model.name_or_path, *f"--max-length {LENGTH} --epochs 2 --batch-size 8".split()]
        self.flags += ["--lr", str(lr), "--seed", str(seed)]
        self.examples, self.noise = plant(kind, examples[:ROWS], tokenizer, seed)
        self.held_out = examples[2 * ROWS :]
        with lora.disabled(model):
            self.described = response_losses(model, self.examples, described=True)
            others = response_losses(model, auto.behind_other_prompts(self.examples, seed))
            self.record["loss before"] = self.held_out_loss()
        self.base = [values[0] for values in self.described]
        self.filter = auto.filter_answers(self.examples, self.base, others)
        if (lr, seed) not in references:  # a model of other, clean rows: the same for all kinds
            self.fit("full", examples[ROWS : 2 * ROWS], FrozenLosses())
            layers = lora.lora_layers(model).values()
            references[lr, seed] = [(layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in layers]
        with lora.replaced(model, references[lr, seed]):
            self.reference = response_losses(model, self.examples)

    def held_out_loss(self) -> float:
        return torch.cat(response_losses(self.model, self.held_out)).mean().item()

    def fit(self, method: str, examples: list[data.Example], frozen: FrozenLosses, log=lambda line: None) -> Tensor:
        """Train new adapters. Returns the weight of every response token in the last epoch."""
        make_real, chosen = baselines.make_selection, {}

        def make_selection(model, sizes, run, frozen):
            selection = make_real(model, sizes, run, frozen) or train.SSToken(model, sizes, run, frozen.base)
            if method == "oracle":
                selection = baselines.PrecomputedSelection([~mask for mask in self.noise])
            choose = selection.choose

            def choose_and_keep(samples, response, nll):
                weights = choose(samples, response, nll)
                chosen.update(zip(samples, weights, strict=True))
                return weights

            selection.choose = choose_and_keep
            return selection

        run = train.parse_arguments(self.flags + METHODS[method].split())
        lora.new_adapters(self.model, run)
        with mock.patch.object(baselines, "make_selection", make_selection):
            train.train(self.model, examples, run, log, frozen=frozen)
        return torch.cat([chosen[i].float().cpu() for i in range(len(examples))])

    def train(self, method: str) -> dict:
        """A training's record: its loss, what its method kept, what the scores saw."""
        record, noise = self.record | {"method": method}, torch.cat(self.noise)

        def log(line):
            if method in FOLLOWED and record["kind"] in TOKENS and line["step"] in report.STEPS:
                nll, last_layer = zip(*signals(self.model, self.examples, [-1]), strict=True)
                for key, value in measure(nll, last_layer, self.base, self.reference, self.noise).items():
                    record.setdefault(key, []).append(value)
                fall = torch.cat(self.base) - torch.cat(nll)
                record["fall on clean"] = fall[~noise].mean().item()
                record["fall on noise"] = fall[noise].mean().item()
                self.model.train()

        base = self.described if method in OBJECTIVES else self.base
        reference = self.reference if method == "rho1" else None
        answers = self.filter.tokens(self.examples) if method == "auto" else None
        weights = self.fit(method, self.examples, FrozenLosses(base, reference, answers), log)
        record |= {"loss after": self.held_out_loss(), "kept": (weights != 0).float().mean().item()}
        record["noise in weight"] = (weights[noise].sum() / weights.sum()).item()
        if noise.any():
            record["noise"] = noise.float().mean().item()
            record["noise kept"] = (weights[noise] != 0).float().mean().item()
        elif record["seed"] == 0:
            record["weights"] = [round(weight, 3) for weight in weights.tolist()]
        if method == "auto":
            record |= {"answers dropped": int((~self.filter.mask).sum()), "reason": self.filter.reason}
        return record


def trainings(args, folder: str, tokenizer, examples: list[data.Example], done: list[dict]) -> Iterator[dict]:
    """The records of the trainings that are asked for and not done, seed by seed."""
    device, references, model = machine.find_device("auto"), {}, None  # references by rate and seed
    for seed, lr, kind in itertools.product(range(args.seeds), map(float, args.lrs.split(",")), args.kinds.split(",")):
        had = {r["method"] for r in done if (r["kind"], r["lr"], r["seed"]) == (kind, lr, seed)}
        had |= {"oracle"} if kind == "clean" else set()  # there it is full training
        if missing := [name for name in args.only.split(",") if name not in had]:
            model = model or load_model(folder, getattr(torch, machine.usual_dtype(device)), device)
            known = Setting(model, tokenizer, examples, references, kind, lr, seed)
            yield from map(known.train, missing)


def main():
    parser = command.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    for flag, text in {"--model": "folders, comma-separated", "--data": None, "--out": None}.items():
        add(flag, required=True, help=text)
    add("--only", default=",".join(METHODS), help="these alone")
    add("--kinds", default=",".join(KINDS), help="these alone")
    add("--lrs", default="1e-3")
    add("--seeds", type=int, default=3, help="0: only write tables and figures from what is there")
    args = parser.parse_args()
    path, words = Path(args.out) / "trainings.jsonl", {}
    path.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for folder in args.model.split(","):
        tokenizer, of_model = data.load_tokenizer(folder), {"model": Path(folder).name, "data": Path(args.data).name}
        examples, _ = data.load_examples(args.data, tokenizer, LENGTH, ROWS * 5 // 2)
        check(len(examples) == ROWS * 5 // 2, f"{args.data} has {len(examples)} rows, the study needs {ROWS * 5 // 2}")
        words[of_model["model"]] = [tokenizer.decode([i]) for e in examples[:ROWS] for i in e.ids[e.response].tolist()]
        done = [record for record in results if of_model.items() <= record.items()]
        for record in trainings(args, folder, tokenizer, examples, done):
            results.append(of_model | record)
            write_lines(path, results)
            print(*map(results[-1].get, PLACE), f"held-out loss {results[-1]['loss after']:.3f}", flush=True)
    report.write_report(results, list(METHODS), words, Path(args.out))


if __name__ == "__main__":
    run_script(main)
