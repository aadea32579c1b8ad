"""When selection fails: noise planted in the responses, and which of the scores can tell it from clean tokens.

    python results/noise/study.py --model DIR --data rows.jsonl --out DIR

Of each response 20 % of the tokens are replaced, the end token left out: by random entries of the vocabulary, or by
words of other responses. Then a model is trained on that, on all tokens (full), on ssToken's choice, or on ssToken's
choice with `--gain probability`, and at some steps every score is computed for every response token:

    REL           Normalize(REL), Eq. 8
    attention     AttnScore, Eq. 7
    ssToken       their Score at gamma 0.5, Eq. 9
    excess loss   of the base model over a reference that was trained on other, clean rows, Eq. 2
    probability   the gain in probability (an extension), normalized as REL
    relative      REL as a share of the history loss, normalized as REL

Reported are the AUROC of clean over noise within a sample (1: every clean token before every noisy one; 0.5: chance;
below: the score prefers the noise), and the share of noise among the best rho of each sample (by chance 20 %).
Each training is a JSON file in --out and is not run again; tables and figures are made from those files.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.start import run_script

import data
import lora
import train
from model import load_model
from paper import baselines, visualize
from sstoken import excess_loss, normalize, probability_gain, retrospective_excess_loss, score, select
from support import command
from support.files import UserError, read_json, write_json, write_whole

matplotlib.use("Agg")
from matplotlib import pyplot

KINDS = {"vocabulary": "random entries of the vocabulary", "words": "words of other responses"}
METHODS = {"full": ["--method", "full"], "sstoken": [], "probability": ["--gain", "probability"]}
SHARE, RHO, GAMMA = 0.2, 0.6, 0.5
STEPS = (1, 3, 6, 12)  # at which the scores are computed
BATCH = 8


# ------------------------------------------------------------------------------------------------------ the noise


def plant_noise(
    examples: list[data.Example], kind: str, tokenizer: data.Tokenizer, seed: int
) -> tuple[list[data.Example], list[Tensor]]:
    """The samples with a share SHARE of their response tokens replaced, and for each a (L_resp,) bool: which are noise.

    An end token is never replaced, and none is planted.
    """
    rng, backend = random.Random(f"{kind} {seed}"), tokenizer.backend
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
    vocabulary = sorted(set(range(tokenizer.vocab_size)) - special)
    texts = {i: backend.decode([i]) for i in vocabulary}
    whole_words = {i for i, text in texts.items() if text[:1] == " " and text[1:].isalpha()}
    words = [[i for i in e.ids[e.response].tolist() if i in whole_words] for e in examples]
    noisy, masks = [], []
    for number, (ids, response) in enumerate(examples):
        ids = ids.clone()
        places = [i for i in response.nonzero().squeeze(1).tolist() if int(ids[i]) not in special]
        chosen = rng.sample(places, round(SHARE * len(places)))
        others = vocabulary if kind == "vocabulary" else [i for n, w in enumerate(words) if n != number for i in w]
        for place in chosen:
            old = int(ids[place])
            while int(ids[place]) == old:
                ids[place] = rng.choice(others)
        noise = torch.zeros(len(ids), dtype=torch.bool)
        noise[chosen] = True
        noisy.append(data.Example(ids, response))
        masks.append(noise[response])
    return noisy, masks


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
    flags = ["--model", args.model, "--data", args.data, "--max-length", str(args.max_length), "--epochs", "2"]
    flags += ["--batch-size", str(BATCH), "--lr", str(lr), "--seed", str(seed)]
    return train.parse_arguments(flags + ["--rho", str(RHO), "--gamma", str(GAMMA), *METHODS[method]])


def fit(model, examples, run: argparse.Namespace, base=None, at_step=lambda step: None) -> list[dict]:
    """Train new adapters on `examples`; at_step is called after each optimizer step. Returns the log."""
    lines = []

    def log(line):
        lines.append(line)
        at_step(line["step"])
        model.train()

    lora.new_adapters(model, run)
    train.train(model, examples, run, log, frozen=baselines.Frozen(base))
    return lines


def study(args, model, tokenizer, rows: dict[str, list], kind: str, lr: float, seed: int):
    """All trainings on one kind of data ("clean": no noise) with one learning rate and seed, each into its file."""
    files = {method: Path(args.out) / f"{kind}-{method}-lr{lr}-seed{seed}.json" for method in METHODS}
    if all(file.exists() for file in files.values()):
        return
    examples, noise, reference = rows["train"], None, None
    if kind != "clean":
        examples, noise = plant_noise(examples, kind, tokenizer, seed)
    lora.remove_lora(model)
    history = baselines.response_losses(model, examples)
    before = torch.cat(baselines.response_losses(model, rows["held out"])).mean().item()
    if noise:
        fit(model, rows["reference"], arguments(args, "full", lr, seed))
        reference = baselines.response_losses(model, examples)
    for method, file in files.items():
        if file.exists():
            continue
        found = {}

        def at_step(step, found=found):
            if noise and step in STEPS:
                nll, attention = zip(*visualize.signals(model, examples, [-1]), strict=True)
                found[step] = measure(nll, [layers[0] for layers in attention], history, reference, noise)
                if step == STEPS[-1]:
                    drop = torch.cat(history) - torch.cat(nll)
                    found["fall"] = {
                        "clean": drop[~torch.cat(noise)].mean().item(),
                        "noise": drop[torch.cat(noise)].mean().item(),
                    }

        lines = fit(model, examples, arguments(args, method, lr, seed), history, at_step)
        fall = found.pop("fall", None)
        write_json(
            file,
            {
                **{"kind": kind, "method": method, "lr": lr, "seed": seed, "scores": found, "fall_of_loss": fall},
                **{"held_out_before": before, "loss": [line["loss"] for line in lines]},
                "held_out_after": torch.cat(baselines.response_losses(model, rows["held out"])).mean().item(),
            },
        )
        print(file.name, json.dumps(found.get(STEPS[-1])), flush=True)


# ------------------------------------------------------------------------------------------------- tables and figures


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
        len(places), len(METHODS), figsize=(10, 2.5 * len(places)), sharex=True, sharey=True, layout="constrained"
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
    add("--report", action="store_true", help="only write tables and figures from what is there")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
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
        model = load_model(args.model, torch.bfloat16)
        for seed in range(args.seeds):
            for lr in map(float, args.lrs.split(",")):
                for kind in (*KINDS, "clean"):
                    study(args, model, tokenizer, rows, kind, lr, seed)
    results = [json.loads(path.read_text()) for path in sorted(Path(args.out).glob("*-seed*.json"))]
    write_whole(Path(args.out) / "tables.md", lambda path: path.write_text(tables(results), encoding="utf-8"))
    figure(results, "auroc", "AUROC", 0.5, Path(args.out) / "auroc.png")
    figure(results, "noise_selected", "share of noise", SHARE, Path(args.out) / "noise_selected.png")


if __name__ == "__main__":
    run_script(main)
