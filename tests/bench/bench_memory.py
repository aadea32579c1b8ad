"""Where a training step's memory goes, line by line from the shapes of a model; a test holds it against a real pass.

    python tests/bench/bench_memory.py [--model DIR] [--length 2048] [--micro-batch-size 3] [--rank 64]
        [--checkpointing]

Without --model: the shapes of Llama-3.2-3B. Everything that grows with the tokens is bfloat16 but what is marked.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))
from model import Config, read_config

LLAMA_3B = SimpleNamespace(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    tie_word_embeddings=True,
    qk_norm=False,
)


def kept_by_a_layer(c: Config, tokens: int, rank: int, element: int = 2) -> dict[str, int]:
    """Bytes that one decoder layer keeps for its backward pass, with dropout; `element`: bytes of an activation."""
    D, inner, heads, key_heads = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads
    q, kv = heads * c.head_dim, key_heads * c.head_dim
    dropped = D + q + D + inner  # what q, k and v read; o; gate and up; down
    of_a_token = {
        "inputs of the two norms, 2 D, and their scales (float32)": element * 2 * D + 4 * 2,
        "adapters' inputs after dropout, 2 D + H d + I": element * dropped,
        "their masks (a byte each)": dropped,
        "q, k, v and the attention's output, 2 (H + H_kv) d": element * 2 * (q + kv),
        "log-sum-exp of each head (float32)": 4 * heads,
        "gate and up, 2 I": element * 2 * inner,
        "A x of seven adapters, 7 r": element * 7 * rank,
    }
    if c.qk_norm:
        name = "inputs of q's and k's norms, (H + H_kv) d, and their scales (float32)"
        of_a_token[name] = element * (q + kv) + 4 * (heads + key_heads)
    return {name: tokens * size for name, size in of_a_token.items()}


def adapter_parameters(c: Config, rank: int) -> int:
    """Trained parameters of one layer: rank * (in + out) for each of its seven projections."""
    D, inner, q, kv = (
        c.hidden_size,
        c.intermediate_size,
        *(n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads)),
    )
    return rank * ((D + q) + 2 * (D + kv) + (q + D) + 2 * (D + inner) + (inner + D))


def frozen_parameters(c: Config) -> int:
    """Weights of the base model, norms and biases left out."""
    D, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 2 * D * q + 2 * D * kv + 3 * D * c.intermediate_size
    return c.num_hidden_layers * layer + (1 if c.tie_word_embeddings else 2) * c.vocab_size * D


def table(c: Config, length: int, micro_batch_size: int, rank: int, checkpointing: bool) -> dict[str, int]:
    """Bytes by line: what stays, and what one micro-batch keeps between its forward and its backward pass."""
    tokens, layers = length * micro_batch_size, c.num_hidden_layers
    adapters = layers * adapter_parameters(c, rank)
    layer = kept_by_a_layer(c, tokens, rank)
    lines = {
        "frozen weights, bfloat16": 2 * frozen_parameters(c),
        "adapters, float32": 4 * adapters,
        "their gradients, float32": 4 * adapters,
        "AdamW's two moments, float32": 8 * adapters,
        "the adapters in bfloat16, as a pass uses them": 2 * adapters,
    }
    if checkpointing:
        lines[f"inputs of {layers} layers, D each"] = layers * tokens * c.hidden_size * 2
        lines["one layer, while it is computed again"] = sum(layer.values())
    else:
        lines |= {f"{layers} layers: {name}": layers * size for name, size in layer.items()}
    lines["a chunk of 2^23 logits: bfloat16, float32"] = 2**23 * (2 + 4)
    lines["the loss's gradient for hidden states, D"] = tokens * c.hidden_size * 2
    lines["one layer's backward pass: gradients of gate, up and their product, 3 I"] = (
        tokens * 3 * c.intermediate_size * 2
    )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder with a config.json; default: Llama-3.2-3B's shapes")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    config = read_config(Path(args.model)) if args.model else LLAMA_3B
    lines = table(config, args.length, args.micro_batch_size, args.rank, args.checkpointing)
    print("| what | GiB |\n|---|---:|")
    for name, size in (lines | {"together": sum(lines.values())}).items():
        print(f"| {name} | {size / 2**30:.2f} |")


if __name__ == "__main__":
    main()
