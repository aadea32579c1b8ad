"""Speed and memory of a training step, beside the same step built from transformers and peft.

    python tests/bench/bench_step.py --model DIR --data rows.jsonl [--samples 64] [--repeats 3] [-- flags of train.py]
    python tests/bench/bench_step.py --model DIR --data rows.jsonl --profile       where a step's time goes
    python tests/bench/bench_step.py --model DIR --data rows.jsonl --lengths 256,512,1024,2048       how its cost grows
    python tests/bench/bench_step.py --model DIR --data rows.jsonl --compile       what torch.compile does to it

Each side runs in a process of its own, one after the other, `--repeats` times in turn: the peer, `--method full`,
`--method sstoken`, and sstoken with the history's losses known, as from --cache; all train on the same global batches
with train.py's defaults. Printed are medians, their ratios to the peer's, and how much of this machine's best matrix
product the step reaches.

The peer is what one writes today without this project: AutoModelForCausalLM with peft's adapters, samples in the order
drawn and padded to the longest of a micro-batch, full logits and cross entropy, the base model's losses by a second
pass with the adapters disabled, the attention of the last layer from a recompute of its whole (L, L) matrix.
"""

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))
from memory import peak_allocated

import data
import lora
import train
from model import Transformer, load_model, read_config, response_nll
from paper import baselines
from paper.frozen import FrozenLosses, response_losses
from sstoken import share_of
from support import machine

SIDES = ("peer", "full", "sstoken", "cached")


def settings(args) -> argparse.Namespace:
    method = "full" if args.side == "full" else "sstoken"
    return train.parse_arguments(
        ["--model", args.model, "--data", args.data, "--max-length", str(args.max_length), "--method", method]
        + ["--limit", str(args.samples), *args.flags]
    )


def measure(args) -> dict:
    """One side's run in this process: seconds and tokens of all steps, the loss of the last, and the peak in MiB."""
    run, tokenizer = settings(args), data.load_tokenizer(args.model)
    examples, _ = data.load_examples(args.data, tokenizer, args.max_length, args.samples)
    torch.manual_seed(run.seed)
    lines, scoring = [], 0.0
    if args.side == "peer":
        train_peer(examples, run, lines.append)
    else:
        model = load_model(args.model, getattr(torch, run.dtype))
        lora.add_lora(model, run.lora_rank, run.lora_alpha, run.lora_dropout)
        frozen = None
        if args.side == "cached" or baselines.reads_kept_history(run, len(examples)):
            start = time.perf_counter()
            frozen = FrozenLosses(response_losses(model, examples))
            scoring = time.perf_counter() - start if args.side == "sstoken" else 0.0
        train.train(model, examples, run, lines.append, frozen=frozen)
    seconds, tokens = (sum(line[key] for line in lines) for key in ("seconds", "tokens"))
    seconds += scoring
    peak = machine.peak_memory_mb(torch.device("cpu"))
    return {"seconds": seconds, "tokens": tokens, "loss": lines[-1]["loss"], "peak_memory_mb": peak}


def profile_step(args):
    """Print where the time of one step goes, by torch's profiler."""
    args.side = "sstoken"
    run = settings(args)
    run.max_steps = 1
    examples, _ = data.load_examples(args.data, data.load_tokenizer(args.model), args.max_length, args.samples)
    torch.manual_seed(run.seed)
    model = lora.add_lora(load_model(args.model, getattr(torch, run.dtype)))
    with profile(activities=[ProfilerActivity.CPU]) as record:
        train.train(model, examples, run, lambda line: None)
    events = {event.key: event for event in record.key_averages()}
    whole = sum(event.self_cpu_time_total for event in events.values())
    own = lambda *names: sum(e.self_cpu_time_total for key, e in events.items() if key in names)
    of = lambda name: sum(e.cpu_time_total for key, e in events.items() if key in (name, f"{name}Backward"))
    parts = {
        "matrix products of the layers and the vocabulary": own("aten::mm", "aten::addmm", "aten::addmm_"),
        "attention": of("_ShortAttention") + sum(e.self_cpu_time_total for key, e in events.items() if "flash" in key),
        "dropout": of("_Dropout"),
        "RMSNorm": of("_RMSNorm"),
        "SwiGLU": of("_SwiGLU"),
    }
    parts["casts, rope, additions, the vocabulary's softmax, AdamW, Python"] = whole - sum(parts.values())
    print("| part of a step | share of its time |\n|---|---:|")
    for name, time_of_it in parts.items():
        print(f"| {name} | {time_of_it / whole:.0%} |")


WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 32}
WIDE |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True}


def scale(args):
    """Print tokens/s of sstoken's step for samples of each length, as many at once as have the most tokens together.

    For the given model and for a wider one with random weights. A fifth of each sample is its prompt.
    """
    args.side = "sstoken"
    lengths, best = [int(n) for n in args.lengths.split(",")], best_matmul(torch.bfloat16)
    print("| parameters | tokens a sample | samples | tokens/s | GFLOP/s | of the best product | peak MiB |")
    print("|---|" + "---:|" * 6)
    for wide in (False, True):
        config = read_config(Path(args.model))
        if wide:
            config = dataclasses.replace(config, **WIDE)
        torch.manual_seed(0)
        model = Transformer(config).to(torch.bfloat16).eval()
        lora.add_lora(model)
        size = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        for length in lengths:
            at_once, found = max(lengths) // length, []
            run = settings(args)
            run.batch_size = run.micro_batch_size = at_once
            run.epochs = args.repeats
            examples = [
                data.Example(torch.randint(0, config.vocab_size, (length,)), torch.arange(length) >= length // 5)
                for _ in range(at_once)
            ]
            train.train(model, examples, run, found.append)
            seconds = statistics.median(line["seconds"] for line in found[1:] or found)  # the first one warms up
            run.epochs = 1  # what one step needs
            rate = operations(examples, run, config) / seconds
            peak = peak_allocated(lambda m=model, e=examples: response_nll(m, *data.collate(e)).sum().backward())
            cells = [f"{size / 1e6:.0f}M", length, at_once, f"{at_once * length / seconds:.0f}", f"{rate / 1e9:.0f}"]
            print("|", " | ".join(map(str, [*cells, f"{rate / best:.0%}", f"{peak / 2**20:.0f}"])), "|", flush=True)


def compare_compiled(args):
    """Print the seconds of a forward and backward pass of four samples, layers as they are and by torch.compile."""
    lengths, found = (200, 128, 256, 190), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = lora.add_lora(load_model(args.model, torch.bfloat16)).train()
        for layer in model.model.layers if compiled else ():
            layer.compile(dynamic=True)
        for length in lengths:
            ids, response = torch.randint(0, 1000, (4, length)), torch.arange(length).expand(4, -1) >= length // 5
            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                response_nll(model, ids, response).sum().backward()
                seconds.append(time.perf_counter() - start)
            found.append((seconds[0], statistics.median(seconds[1:])))
    print("| tokens | eager, s | compiled, s | compiled, first pass, s |\n|---:|---:|---:|---:|")
    for length, (_, eager), (first, later) in zip(lengths, found, found[len(lengths) :], strict=False):
        print(f"| 4 x {length} | {eager:.2f} | {later:.2f} | {first:.1f} |")


def train_peer(examples, run, log, base=None):
    """Algorithm 1 from transformers' model and peft's adapters, with the history model at the base's weights.

    base: transformers' model, which is loaded where it is not given; the step runs on its device.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    if base is None:
        base = AutoModelForCausalLM.from_pretrained(run.model, dtype=getattr(torch, run.dtype))
    device = base.device
    lora_config = LoraConfig(
        r=run.lora_rank, lora_alpha=run.lora_alpha, lora_dropout=run.lora_dropout, target_modules=list(lora.TARGETS)
    )
    model = get_peft_model(base, lora_config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.lr, weight_decay=0.0)

    def token_losses(logits, ids):
        return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")

    def attention_of(layer, hidden):  # (B, L, D) -> (B, H, L, L)
        attention, length = layer.self_attn, hidden.shape[1]
        x = layer.input_layernorm(hidden)
        q, k = (
            f(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for f in (attention.q_proj, attention.k_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *base.model.rotary_emb(x, torch.arange(length, device=device)[None]))
        logits = q @ repeat_kv(k, attention.num_key_value_groups).transpose(2, 3) * attention.scaling
        future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        return logits.masked_fill(future, -torch.inf).softmax(dim=-1, dtype=torch.float32)

    batches = []  # the global batches that train.py draws
    for epoch in range(run.epochs):
        order = random.Random(f"{run.seed} {epoch}").sample(examples, len(examples))
        batches += [order[first : first + run.batch_size] for first in range(0, len(order), run.batch_size)]
    for batch in batches:
        start, total = time.perf_counter(), 0.0
        for first in range(0, len(batch), run.micro_batch_size):
            ids, response = (x.to(device) for x in data.collate(batch[first : first + run.micro_batch_size]))
            visible = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(e.ids) for e in batch[first : first + run.micro_batch_size]], batch_first=True
            ).to(device)
            with torch.no_grad(), model.disable_adapter():
                history = token_losses(model(ids, attention_mask=visible).logits, ids)
            out = model(ids, attention_mask=visible, output_hidden_states=True)
            nll = token_losses(out.logits, ids)
            with torch.no_grad():
                attention = attention_of(base.model.layers[-1], out.hidden_states[-2]).mean(dim=1)  # (B, L, L)
                paid = (attention * ~response[:, None]).sum(dim=2)[:, 1:]
                rel = history - nll
            losses = []
            for row, supervised in enumerate(response[:, 1:]):
                low, high = rel[row, supervised].aminmax()
                scores = run.gamma * (rel[row, supervised] - low) / (high - low).clamp(min=1e-20)
                scores += (1 - run.gamma) * paid[row, supervised]
                best = scores.topk(share_of(run.rho, len(scores))).indices
                losses.append(nll[row, supervised][best].mean())
            loss = torch.stack(losses).sum() / len(batch)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(e.ids) for e in batch)
        log({"seconds": time.perf_counter() - start, "tokens": tokens, "loss": total})


def operations(examples, run, config=None, history=True) -> float:
    """Floating-point operations that a run of `--method` needs at least, padding and elementwise work left out."""
    c = config or read_config(Path(run.model))
    heads, key_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = [(c.hidden_size, heads), (c.hidden_size, key_heads), (c.hidden_size, key_heads), (heads, c.hidden_size)]
    shapes += [(c.hidden_size, c.intermediate_size)] * 2 + [(c.intermediate_size, c.hidden_size)]
    weights = c.num_hidden_layers * sum(a * b for a, b in shapes)
    factors = c.num_hidden_layers * sum(run.lora_rank * (a + b) for a, b in shapes)
    scored, trained, scoring = history and run.method == "sstoken" and run.rho < 1 and run.gamma > 0, 0, 0
    for example in examples:
        tokens, answers = len(example.ids), int(example.response.sum())
        attention = c.num_hidden_layers * 2 * heads * tokens**2  # q k^T and p v, the causal half of each
        vocabulary = 2 * c.hidden_size * c.vocab_size * answers
        # forward and backward: frozen weights have no gradient, the adapters have, attention's backward is 2.5 times
        trained += 4 * weights * tokens + 6 * factors * tokens + 3.5 * attention + 2 * vocabulary
        scoring += (2 * weights * tokens + attention + vocabulary) if scored else 0
    return trained * run.epochs + scoring  # the history's losses are computed once


def best_matmul(dtype, size=4096, seconds=5.0) -> float:
    """The best rate of a square matrix product on this machine, FLOP/s."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="train.py's, after --")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--lengths", metavar="N,N,...")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.side != "peer":
        machine.reuse_memory()  # first of all, as train.py does
    if args.side:
        print(json.dumps(measure(args)))
        return
    for asked, answer in ((args.profile, profile_step), (args.lengths, scale), (args.compile, compare_compiled)):
        if asked:
            return answer(args)

    found = {side: [] for side in args.sides.split(",")}
    for repeat in range(args.repeats):
        for side, runs_of_it in found.items():
            command = [sys.executable, __file__, "--side", side, *sys.argv[1:]]
            runs_of_it.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            print(f"{repeat + 1}: {side} {runs_of_it[-1]}", file=sys.stderr, flush=True)

    medians = {
        side: {key: statistics.median(run[key] for run in some) for key in some[0]} for side, some in found.items()
    }
    examples, _ = data.load_examples(args.data, data.load_tokenizer(args.model), args.max_length, args.samples)
    first = next(iter(medians.values()))
    print("| step | seconds | tokens/s | ratio | peak MiB | ratio | GFLOP/s | of the best product | loss |")
    print("|---|" + "---:|" * 8)
    for side, of in medians.items():
        args.side = side
        run = settings(args)
        rate = operations(examples, run, history=side != "cached") / of["seconds"]
        best = best_matmul(getattr(torch, run.dtype))
        cells = [side, f"{of['seconds']:.1f}", f"{of['tokens'] / of['seconds']:.0f}"]
        cells += [f"{first['seconds'] / of['seconds']:.2f}", f"{of['peak_memory_mb']:.0f}"]
        cells += [f"{of['peak_memory_mb'] / first['peak_memory_mb']:.2f}", f"{rate / 1e9:.0f}"]
        cells += [f"{rate / best:.1%} of {best / 1e9:.0f}", f"{of['loss']:.4f}"]
        print("|", " | ".join(cells), "|")
    for side in {"sstoken", "cached"} & medians.keys() if "full" in medians else ():
        print(f"{side}'s time over full's: {medians[side]['seconds'] / medians['full']['seconds']:.2f}")


if __name__ == "__main__":
    main()
