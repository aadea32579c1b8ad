"""How much of REL survives bfloat16: token_nll against plain bfloat16 logits, both compared with float32 logits.

    python tests/bench_rounding.py --model DIR --adapter DIR --data rows.jsonl [--samples 8]

All three see the same bfloat16 hidden states; only the step from there to the loss differs.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import lora
from model import load_model, token_nll
from sstoken import retrospective_excess_loss, select

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
    args = parser.parse_args()

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


if __name__ == "__main__":
    main()
