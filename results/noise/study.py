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
import json
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from support.start import run_script

import report
from methods import ALL, GAMMA, METHODS, OF_THE_STUDY, RHO, VARIANTS, watched
from planted import FAULTS, KINDS, SHARE, plant

import data
import lora
import train
from model import load_model
from paper import auto, baselines, visualize
from paper.frozen import FrozenLosses, response_losses
from paper.objectives import OBJECTIVES, inputs_of, probability_gain
from sstoken import excess_loss, normalize, retrospective_excess_loss, score, select
from support import command, machine
from support.files import UserError, read_json, write_json, write_whole

STEPS, BATCH = report.STEPS, 8


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
    return train.parse_arguments(flags + ALL[method])


def fit(model, examples, run: argparse.Namespace, frozen: FrozenLosses, at_step=lambda step: None) -> list[dict]:
    """Train new adapters on `examples`; at_step is called after each optimizer step. Returns the log."""
    lines = []

    def log(line):
        lines.append(line)
        at_step(line["step"])
        model.train()

    lora.new_adapters(model, run)
    train.train(model, examples, run, log, frozen=frozen)
    return lines


class Setting:
    """One kind of data with one seed: what is known of it before any training, computed once."""

    def __init__(self, args, model, tokenizer, rows: dict[str, list], kind: str, lr: float, seed: int):
        self.args, self.model, self.rows, self.place = args, model, rows, (kind, lr, seed)
        self.examples, self.noise = plant(kind, rows["train"], tokenizer, seed)
        lora.remove_lora(model)
        self.described = response_losses(model, self.examples, described=True)
        self.losses = [values[0] for values in self.described]
        self.before, self.reference = self.held_out(), None
        others = auto.behind_other_prompts(self.examples, seed)
        self.found = auto.filter_answers(self.examples, self.losses, response_losses(model, others))
        self.own = self.found.tokens(self.examples)

    def held_out(self) -> float:
        return torch.cat(response_losses(self.model, self.rows["held out"])).mean().item()

    def excess(self) -> list[Tensor]:
        """The losses of a model that was trained on clean rows, made when first asked for."""
        if self.reference is None:
            _, lr, seed = self.place
            fit(self.model, self.rows["reference"], arguments(self.args, "full", lr, seed), FrozenLosses())
            self.reference = response_losses(self.model, self.examples)
        return self.reference

    def frozen(self, method: str) -> FrozenLosses:
        """What a method is given."""
        base = self.described if "history_entropy" in inputs_of(method) else self.losses
        own = self.own if method == "auto" else None
        return FrozenLosses(base, self.excess() if method == "rho1" else None, own)

    def write(self, file: Path, method: str, found: dict, lines: list[dict]):
        """A training's file: what was found, the losses of its steps, and those of held-out rows."""
        about = dict(zip(("kind", "lr", "seed"), self.place, strict=True)) | {"method": method}
        about |= found | {"loss": [line["loss"] for line in lines]}
        write_json(file, about | {"held_out_before": self.before, "held_out_after": self.held_out()})


def study(setting: Setting, method: str, file: Path):
    """A training, and what every score sees of the noise at some of its steps."""
    noise, found = setting.noise, {"scores": {}, "fall_of_loss": None}
    reference = setting.excess() if torch.cat(noise).any() else None

    def at_step(step):
        if reference and step in STEPS:
            nll, attention, _ = zip(*visualize.signals(setting.model, setting.examples, [-1]), strict=True)
            attention = [layers[0] for layers in attention]
            found["scores"][step] = measure(nll, attention, setting.losses, reference, noise)
            drop, planted = torch.cat(setting.losses) - torch.cat(nll), torch.cat(noise)
            found["fall_of_loss"] = {"clean": drop[~planted].mean().item(), "noise": drop[planted].mean().item()}

    run = arguments(setting.args, method, *setting.place[1:])
    lines = fit(setting.model, setting.examples, run, setting.frozen(method), at_step)
    setting.write(file, method, found, lines)
    print(file.name, json.dumps(found["scores"].get(STEPS[-1])), flush=True)


def compare(setting: Setting, method: str, file: Path):
    """A training, and what its method kept."""
    masks = {"oracle": [~mask for mask in setting.noise], "own": setting.own}.get(method)
    run, frozen, chosen = arguments(setting.args, method, *setting.place[1:]), setting.frozen(method), {}
    with watched(chosen, masks, setting.described if method == "ranked" else None):
        lines = fit(setting.model, setting.examples, run, frozen)
    weights, planted = torch.cat([chosen[i] for i in range(len(setting.examples))]), torch.cat(setting.noise)
    found = {"kept": (weights != 0).float().mean().item(), "noise": planted.float().mean().item()}
    found["noise_kept"] = (weights[planted] != 0).float().mean().item() if planted.any() else None
    found["noise_weight"] = (weights[planted].sum() / weights.sum()).item()
    if method == "auto":
        found |= {"answers dropped": int((~setting.found.mask).sum()), "reason": setting.found.reason}
    if setting.place[0] == "clean" and run.seed == 0:
        found |= {"weights": [[round(w, 3) for w in chosen[i].tolist()] for i in range(len(setting.examples))]}
    setting.write(file, method, found, lines)
    print(file.name, f"kept {found['kept']:.3f}, noise {found['noise_weight']:.3f}", flush=True)


def train_all(args, model, tokenizer, rows: dict[str, list]):
    """Every training that --out does not hold yet."""
    for seed in range(args.seeds):
        for lr in map(float, args.lrs.split(",")):
            for kind in args.kinds.split(","):
                names = [name for name in args.only.split(",") if kind != "clean" or name != "oracle"]
                files = {name: Path(args.out) / f"{kind}-{name}-lr{lr}-seed{seed}.json" for name in names}
                missing = {name: file for name, file in files.items() if not file.exists()}
                setting = Setting(args, model, tokenizer, rows, kind, lr, seed) if missing else None
                for name, file in missing.items():
                    (compare if args.objectives else study)(setting, name, file)


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
    add("--only", help=f"these methods alone, of {', '.join(ALL)}")
    add("--kinds", help=f"these kinds of data alone, of clean, {', '.join((*KINDS, *FAULTS))}")
    add("--report", action="store_true", help="only write tables and figures from what is there")
    args = parser.parse_args()
    usual = [name for name in ALL if name not in OF_THE_STUDY] if args.objectives else METHODS
    args.only = args.only or ",".join(usual)
    args.kinds = args.kinds or ",".join((*KINDS, *(FAULTS if args.objectives else ()), "clean"))
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
        train_all(args, model, tokenizer, rows)
    results = report.read_results(Path(args.out))
    text = report.tables(results) if not args.objectives else report.compared(results)
    if args.objectives:
        tokenizer = data.load_tokenizer(args.model)
        examples, _ = data.load_examples(args.data, tokenizer, args.max_length, args.samples * 5 // 2)
        answers = [e.ids[e.response].tolist() for e in examples[: args.samples]]
        words = [[tokenizer.decode([token]) for token in answer] for answer in answers]
        text += "\n" + report.only_kept(results, words)
    write_whole(Path(args.out) / "tables.md", lambda path: path.write_text(text, encoding="utf-8"))
    if args.objectives:
        return report.compared_figure(results, Path(args.out) / "objectives.png")
    report.figure(results, "auroc", "AUROC", 0.5, Path(args.out) / "auroc.png")
    report.figure(results, "noise_selected", "share of noise", SHARE, Path(args.out) / "noise_selected.png")


if __name__ == "__main__":
    run_script(main)
