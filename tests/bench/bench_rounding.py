"""How much of REL survives rounding, and how many selections it changes.

    python tests/bench/bench_rounding.py --model DIR --adapter DIR --data rows.jsonl [--samples 8]
    python tests/bench/bench_rounding.py --model DIR --adapter DIR --data rows.jsonl --kept [--samples 48]
    python tests/bench/bench_rounding.py --model DIR --adapter DIR --data rows.jsonl --scores [--samples 48]

First: token_nll against plain bfloat16 logits, both compared with float32 logits. All three see the same bfloat16
hidden states; only the step from there to the loss differs. Second (--kept): history losses as --cache keeps them, in
passes of their own, against those of the same micro-batch, in both dtypes. Third (--scores): a whole bfloat16 model's
scores against those of the same model in float32.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))
import data
import lora
from model import load_model, response_nll, response_places, token_nll
from paper.frozen import response_losses
from sstoken import AttentionProbe, normalize, retrospective_excess_loss, score, select
from support import machine

LOSSES = {
    "token_nll": lambda hidden, weight, targets: token_nll(hidden, weight, targets),
    "bfloat16 logits": lambda hidden, weight, targets: F.cross_entropy(
        (hidden @ weight.T).float(), targets, reduction="none"
    ),
    "float32 logits": lambda hidden, weight, targets: F.cross_entropy(
        hidden.float() @ weight.float().T, targets, reduction="none"
    ),
}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--model", "--adapter", "--data"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--scores", action="store_true")
    args = parser.parse_args()
    if args.scores:
        compare_scores(args)
        return
    if args.kept:
        for dtype in (torch.float32, torch.bfloat16):
            compare_kept(args, dtype)
        return

    model = lora.load_adapter(load_model(args.model, torch.bfloat16), args.adapter)
    examples, _ = data.load_examples(args.data, data.load_tokenizer(args.model), 512, args.samples)
    ids, response = data.collate(examples)

    def losses():
        hidden, targets = model(ids)[:, :-1][response[:, 1:]], ids[:, 1:][response[:, 1:]]
        return {name: loss(hidden, model.lm_head.weight, targets) for name, loss in LOSSES.items()}

    current = losses()
    with lora.disabled(model):
        history = losses()
    rel = {name: retrospective_excess_loss(current[name], history[name]) for name in LOSSES}
    exact, sizes = rel["float32 logits"], response.sum(1).tolist()
    print(f"{len(exact)} tokens, median |REL| {exact.abs().median():.4f} nats")
    for name in list(LOSSES)[:2]:
        pairs = zip(rel[name].split(sizes), exact.split(sizes), strict=True)
        same = sum(int((select(a, 0.6) & select(b, 0.6)).sum()) for a, b in pairs)
        chosen = sum(int(select(b, 0.6).sum()) for b in exact.split(sizes))
        error = (rel[name] - exact).abs().mean()
        print(
            f"{name}: mean error of REL {error:.4f} nats, {same / chosen:.1%} of the selected tokens agree at gamma 1"
        )


def compare_scores(args):
    """A bfloat16 model's scores against a float32 model's: the share of selected tokens that differ, at rho 0.6."""
    examples, _ = data.load_examples(args.data, data.load_tokenizer(args.model), 512, args.samples)
    found, gammas = {}, (0.0, 0.5, 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        model = lora.load_adapter(load_model(args.model, dtype), args.adapter)
        probe, found[dtype] = AttentionProbe(model), []
        for example in examples:
            ids, response = data.collate([example])
            nll = response_nll(model, ids, response)
            attention = probe.scores(response)[response]
            with lora.disabled(model):
                rel = normalize(retrospective_excess_loss(nll, response_nll(model, ids, response)))
            found[dtype].append([select(score(rel, attention, gamma), 0.6) for gamma in gammas])
    chosen = sum(int(selected[0].sum()) for selected in found[torch.float32])
    for number, gamma in enumerate(gammas):
        pairs = zip(found[torch.float32], found[torch.bfloat16], strict=True)
        differ = sum(int((exact[number] & ~rounded[number]).sum()) for exact, rounded in pairs)
        print(f"gamma {gamma}: {differ / chosen:.2%} of {chosen} selected tokens are others in bfloat16")


def compare_kept(args, dtype: torch.dtype):
    """Kept history losses against computed ones: their difference, and the share of selected tokens that differ."""
    model = lora.load_adapter(load_model(args.model, dtype), args.adapter)
    examples, _ = data.load_examples(args.data, data.load_tokenizer(args.model), 512, args.samples)
    with lora.disabled(model):
        kept = response_losses(model, examples)
    sizes = [int(e.response.sum()) for e in examples]
    errors, chosen, differ = [], 0, {0.5: 0, 1.0: 0}
    batches = data.plan_batches([len(e.ids) for e in examples], batch_size=8, micro_batch_size=4, seed=1)
    for samples in (micro_batch for batch in batches for micro_batch in batch):
        ids, response = data.collate([examples[i] for i in samples])
        probe = AttentionProbe(model)
        current = response_nll(model, ids, response)
        attention = probe.scores(response).flatten()[response_places(response, "cpu")]
        probe.remove()
        with lora.disabled(model):
            computed = response_nll(model, ids, response)
        parts = [x.split([sizes[i] for i in samples]) for x in (current, computed, attention)]
        for i, nll, history, att in zip(samples, *parts, strict=True):
            errors.append((history - kept[i]).abs())
            for gamma in differ:
                rels = [normalize(retrospective_excess_loss(nll, his)) for his in (history, kept[i])]
                a, b = (select(score(rel, att, gamma), 0.6) for rel in rels)
                differ[gamma] += int((a & ~b).sum())
            chosen += int(a.sum())
    errors = torch.cat(errors)
    shares = ", ".join(f"{count / chosen:.2%} at gamma {gamma}" for gamma, count in differ.items())
    print(
        f"{dtype}: kept losses differ by {errors.mean():.1e} nats (at most {errors.max():.1e}), selections by {shares}"
    )


if __name__ == "__main__":
    machine.reuse_memory()
    main()
