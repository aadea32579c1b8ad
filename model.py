"""A Llama / Qwen decoder: configuration, blocks, loading, per-token loss, KV cache and greedy generation.

Read from top to bottom: what a checkpoint says (`Config`), what it computes (`Transformer`), how its weights get in
(`load_model`), and the two things that are asked of it (`token_nll`, `generate`). Parameter names are the
checkpoint's own, so no tensor is renamed on its way in or out.

Sizes: B sequences, L tokens, D hidden, H query heads, H_kv key/value heads, d head_dim, V vocabulary.
"""

import contextlib
import functools
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """A mistake in what the user gave (a file, a row, a flag, a tensor); its message says what and where."""


# ------------------------------------------------------------------------------------------------ configuration

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
CHECKPOINT_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*"]


@dataclass(frozen=True)
class Config:
    """What config.json says of the architecture, whichever of transformers' two dialects it is written in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: dict  # rope_type, rope_theta, and for llama3 the four numbers of its frequency scaling
    dtype: torch.dtype | None
    raw: dict  # config.json as it was read, to be written back beside merged weights


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError naming the file when it is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise UserError(f"{path} cannot be read as JSON: {reason}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def is_number(value) -> bool:
    """Whether a value read from JSON is a number to compute with: no bool, NaN or infinity, nor beyond any float."""
    return type(value) in (int, float) and -(2**63) < value < 2**63


def is_count(value) -> bool:
    """Whether it is a whole number above 0."""
    return type(value) is int and value > 0


def write_whole(path: Path, write: Callable[[Path], None], others_write: bool = False):
    """Have `write` make a file whole or not at all: under a temporary name first, which then takes `path`'s place.

    others_write: other processes may be writing it at the same time, so the temporary name is this process's own, and
    a file that is there by then stays.
    """
    temporary = path.with_name(path.name + (f".{platform.node()}.{os.getpid()}.tmp" if others_write else ".tmp"))
    with writing(path):
        try:
            write(temporary)
            os.umask(umask := os.umask(0))
            temporary.chmod(0o666 & ~umask)  # as any new file; safetensors' own are for their owner alone
            _to_disk(temporary)  # first what is in the file, then that it bears its name
            if others_write:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
            else:
                temporary.replace(path)
            _to_disk(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()  # half a file would keep a full disk full


@contextlib.contextmanager
def writing(path: Path):
    """A context in which the system's refusal to write (full disk, no permission) is a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as reason:
        why = getattr(reason, "strerror", None) or reason
        raise UserError(
            f"{path} cannot be written ({why}); what was there before is whole: make room, or write elsewhere"
        ) from None


def _to_disk(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, value):
    """Write `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def to_device(tensor: Tensor, device) -> Tensor:
    """A copy of a host's tensor on `device`, which the host does not wait for: a GPU reads it from pinned memory."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def read_config(folder: Path) -> Config:
    """Read `folder`/config.json; whatever would change the result and is not implemented here is refused by name."""
    raw = read_json(folder / "config.json")

    def refuse(what):
        raise UserError(f"{folder / 'config.json'}: {what}")

    family, architectures = raw.get("model_type"), raw.get("architectures") or [None]
    architecture = architectures[0] if isinstance(architectures, list) else architectures
    known = [name for name, of in FAMILIES.items() if of == family]
    if not known or architecture not in (None, *known):
        refuse(f"architecture {architecture} of model_type {family} is not one of {FAMILIES}")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    optional = {"num_key_value_heads", "head_dim", "max_position_embeddings"}
    for key in (*sizes, *(key for key in optional if raw.get(key) is not None)):
        if not is_count(raw.get(key)):
            refuse(f"{key} is {raw.get(key)!r}, not a whole number above 0")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        if type(raw.get(key)) not in (bool, type(None)):
            refuse(f"{key} is {raw[key]!r}, not true or false")
    only = {"hidden_act": "silu", "attention_dropout": 0, "partial_rotary_factor": 1, "quantization_config": None}
    for key, implemented in only.items():
        if raw.get(key, implemented) != implemented:
            refuse(f"{key} {raw[key]!r} is not implemented")

    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    if raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None:
        kinds, full = raw.get("layer_types"), raw.get("max_window_layers", 28)
        if isinstance(kinds, list) and kinds:
            full = layers if all(kind == "full_attention" for kind in kinds[:layers]) else 0
        if not isinstance(full, int) or full < layers:
            refuse("use_sliding_window: sliding-window attention is not implemented")

    def first(*values):
        return next(value for value in values if value is not None)

    rope = first(raw.get("rope_parameters"), raw.get("rope_scaling"), {})
    if not isinstance(rope, dict):
        refuse(f"rope parameters {rope!r} are no JSON object")
    rope = dict(rope)
    rope["rope_type"] = first(rope.get("rope_type"), rope.get("type"), "default")
    rope["rope_theta"] = first(rope.get("rope_theta"), raw.get("rope_theta"), 10000.0)
    per_layer = any(isinstance(value, dict) for value in rope.values())
    if rope["rope_type"] not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1 or per_layer:
        refuse(f"rope parameters {rope} are not implemented, only rope_type default or llama3, one for all layers")
    needed = {"rms_norm_eps": raw.get("rms_norm_eps", 1e-6), "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "llama3":
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if key not in rope:
                refuse(f"rope_type llama3 without {key}")
            needed[key] = rope[key]
    for key, value in needed.items():
        if not is_number(value) or value <= 0:
            refuse(f"{key} is {value!r}, not a number above 0")
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        refuse("low_freq_factor is not below high_freq_factor")

    dtype = raw.get("dtype") or raw.get("torch_dtype")
    if dtype and dtype not in ("float64", "float32", "float16", "bfloat16"):
        refuse(f"dtype {dtype!r} is no float that is implemented")
    key_heads = raw.get("num_key_value_heads") or heads
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // heads)
    if heads % key_heads or head_dim % 2 or not head_dim:
        refuse(f"{heads} heads over {key_heads} key heads, of {head_dim} dimensions each, do not come out even")
    biased = bool(raw.get("attention_bias"))
    return Config(
        **{key: raw[key] for key in sizes},
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        rms_norm_eps=needed["rms_norm_eps"],
        max_position_embeddings=raw.get("max_position_embeddings") or 2048,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        qkv_bias=biased or family == "qwen2",
        output_bias=biased and family != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias")) and family == "llama",
        qk_norm=family == "qwen3",
        rope=rope,
        dtype=getattr(torch, dtype) if dtype else None,
        raw=raw,
    )


# ------------------------------------------------------------------------------------------------------- blocks


class Linear(nn.Linear):
    """nn.Linear that is not initialized on the meta device, where it waits for its weights (or shares another's)."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """nn.Embedding, likewise."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class _RMSNorm(torch.autograd.Function):
    """Keeps x as it came for the backward pass, not the float32 copies of it that autograd would keep."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_normed = grad.float() * weight
        along = (grad_normed * normed).mean(-1, keepdim=True)
        return grad_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps its two arguments and not silu(gate)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class RMSNorm(nn.Module):
    """Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, the mean in float32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        return _RMSNorm.apply(x, self.weight, self.eps)


def rope_frequencies(config: Config, device=None) -> Tensor:
    """Angle per position of each rotated pair, (d/2,) float32: theta^(-2i/d), which llama3 slows for long contexts."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / config.rope["rope_theta"] ** exponent
    if config.rope["rope_type"] == "llama3":
        # Wavelengths that fit the original context high_freq_factor times stay; those that fit it fewer than
        # low_freq_factor times are stretched by factor; between the two, interpolate.
        low, high = config.rope["low_freq_factor"], config.rope["high_freq_factor"]
        turns = config.rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = (1 - keep) * frequency / config.rope["factor"] + keep * frequency
    return frequency


def rope_table(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: positions (L,) -> (L, d) each; (B, L) -> (B, 1, L, d), to broadcast over heads."""
    angle = positions.unsqueeze(-1).float() * rope_frequencies(config, positions.device)
    angle = torch.cat((angle, angle), dim=-1)
    if positions.dim() == 2:
        angle = angle.unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + d/2}) of a head by its position's angle: (..., L, d) -> (..., L, d)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


FEW = 16  # queries of a head, for which reading the keys is most of the work
SHORT = 512  # tokens up to which `_ShortAttention` keeps little beside a layer's other activations
QUERY_BLOCK = 64  # queries of a head that it takes at a time


class _ShortAttention(torch.autograd.Function):
    """Causal attention of short sequences on a CPU, in half the time that the fused kernel and its gradient take there.

    A block of queries at a time meets the keys up to its own end; of L^2 scores, half are never computed. Scores and
    softmax are float32 as in the fused kernel. Its backward pass computes them again, here they are kept, in q's dtype.
    """

    @staticmethod
    def blocks(length):
        return [slice(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]

    @staticmethod
    def forward(ctx, q, k, v):
        # Queries of all heads that share a key head go together: (B * H_kv, groups, L, d) beside (B * H_kv, L, d)
        shape, groups, wide = q.shape, q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.reshape(-1, groups, *q.shape[2:]), k.flatten(0, 1), v.flatten(0, 1)
        scaled, keys, out = q.to(wide) * q.shape[-1] ** -0.5, k.to(wide).mT, torch.empty_like(q)
        later = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=wide).triu_(1)
        kept = []
        for block in _ShortAttention.blocks(q.shape[2]):
            size = block.stop - block.start
            scores = scaled[:, :, block].flatten(1, 2) @ keys[..., : block.stop]  # (B * H_kv, groups * size, stop)
            scores.unflatten(1, (groups, size))[..., block] += later[:size, :size]
            kept.append(scores.softmax(-1).to(q.dtype))
            out[:, :, block] = (kept[-1] @ v[:, : block.stop]).unflatten(1, (groups, size))
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        shape, grad, wide = grad.shape, grad.reshape(q.shape), torch.promote_types(q.dtype, torch.float32)
        grad_q, grad_k, grad_v = torch.empty_like(q), *(torch.zeros_like(x, dtype=wide) for x in (k, v))
        for block, attention in zip(_ShortAttention.blocks(q.shape[2]), kept, strict=True):
            block_q, block_grad = (x[:, :, block].flatten(1, 2) for x in (q, grad))
            grad_v[:, : block.stop] += attention.mT @ block_grad
            grad_attention = block_grad @ v[:, : block.stop].mT
            grad_scores = torch.ops.aten._softmax_backward_data(grad_attention, attention, -1, q.dtype)
            grad_scores *= q.shape[-1] ** -0.5
            grad_q[:, :, block] = (grad_scores @ k[:, : block.stop]).unflatten(1, (q.shape[1], -1))
            grad_k[:, : block.stop] += grad_scores.mT @ block_q
        return grad_q.view(shape), *(x.to(q.dtype).unflatten(0, (shape[0], -1)) for x in (grad_k, grad_v))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, H, L, d), k and v (B, H_kv, S, d) -> (B, H, L, d).

    By the fused kernels, but short sequences on a CPU without a mask by `_ShortAttention`.

    mask: bool, (B, 1, n, S), true where one of the last n queries may look; the queries before those are causal, and
    without a mask all are.
    """
    if mask is None:
        # Padding sits on the right, so no real token ever sees it, and nobody reads the rows of the padding itself.
        if q.device.type == "cpu" and q.shape[2] <= SHORT:
            return _ShortAttention.apply(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    causal = q.shape[2] - mask.shape[2]
    if causal:  # without a mask tensor the kernel leaves out what nobody may see
        parts = attention(*(x[:, :, :causal] for x in (q, k, v))), attention(q[:, :, causal:], k, v, mask)
        return torch.cat(parts, dim=2)
    if q.shape[2] <= FEW:  # the queries of all heads that share a key head become its queries: the keys are read once
        shared = q.reshape(len(q), k.shape[1], -1, q.shape[3])
        mask = mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)
        return F.scaled_dot_product_attention(shared, k, v, attn_mask=mask).reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query causal self-attention. `queries` and `keys` stand alone because the probe of Eq. 7 calls them."""

    def __init__(self, config: Config):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, H_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = d
        self.q_proj = Linear(D, H * d, bias=config.qkv_bias)
        self.k_proj = Linear(D, H_kv * d, bias=config.qkv_bias)
        self.v_proj = Linear(D, H_kv * d, bias=config.qkv_bias)
        self.o_proj = Linear(H * d, D, bias=config.output_bias)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def heads(self, x: Tensor) -> Tensor:  # (B, L, n * d) -> (B, L, n, d)
        return x.unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor, rope) -> Tensor:  # (B, L, D) -> (B, H, L, d)
        return apply_rope(self.q_norm(self.heads(self.q_proj(x))).transpose(1, 2), rope)

    def keys(self, x: Tensor, rope) -> Tensor:  # (B, L, D) -> (B, H_kv, L, d)
        return apply_rope(self.k_norm(self.heads(self.k_proj(x))).transpose(1, 2), rope)

    def forward(self, x: Tensor, rope, mask: Tensor | None = None, cache=None) -> Tensor:  # (B, L, D) -> (B, L, D)
        q, k = self.queries(x, rope), self.keys(x, rope)
        v = self.heads(self.v_proj(x)).transpose(1, 2)  # (B, H_kv, L, d)
        out = (attention if cache is None else cache.attend)(q, k, v, mask)  # (B, H, L, d)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, inner, bias=bias)
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, mask: Tensor | None = None, cache=None) -> Tensor:  # (B, L, D) -> (B, L, D)
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The decoder up to its last hidden state; `lm_head` turns hidden states into logits where logits are wanted.

    `config`, `folder` (where the checkpoint lies), `name_or_path` and `revision` (what the user asked for) are kept for
    saving. With `gradient_checkpointing`, a layer keeps only its input for the backward pass and runs again in it: the
    same numbers, dropout included, for less memory and one more forward pass.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.folder, self.name_or_path, self.revision = config, None, None, None
        self.gradient_checkpointing = False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Make the head and the embedding one tensor, where the checkpoint says that they are."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, positions=None, mask=None, cache=None) -> Tensor:
        """Hidden states after the final norm, (B, L) token ids -> (B, L, D).

        Without further arguments attention is causal from position 0 on, for sequences padded on the right.
        positions: (L,) or (B, L), where the tokens stand; mask: as `attention` takes it; cache: for each layer, an
        object whose `attend` computes attention in place of `attention`, from what it keeps of earlier calls.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.model.embed_tokens(input_ids)
        rope = rope_table(self.config, positions, x.dtype)
        for i, layer in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache[i] if cache is not None else None)
        return self.model.norm(x)


# ------------------------------------------------------------------------------------------- loading and saving


# What to do about an error of the hub's client: of the first kind that it is
NEXT_STEPS = {
    GatedRepoError: "ask for access on its page there, then set HF_TOKEN",
    RepositoryNotFoundError: "check the name; what is private needs HF_TOKEN",
    RevisionNotFoundError: "check the revision",
    HFValidationError: "check the path",
    LocalEntryNotFoundError: "check the connection and HF_ENDPOINT, or give a local folder",
    Exception: "try again, or give a local folder",
}


def find_folder(name_or_path, patterns: list[str], revision: str | None = None, repo_type: str = "model") -> Path:
    """The local folder of a checkpoint: the path itself, or the hub's snapshot of the files that match `patterns`.

    The hub is reached through huggingface_hub, so HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and the cache apply as ever.
    """
    name = str(name_or_path)
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, repo_type=repo_type, revision=revision, allow_patterns=patterns))
    except Exception as reason:  # the hub client raises its own errors, its http library's and the system's
        step = next(step for kind, step in NEXT_STEPS.items() if isinstance(reason, kind))
        why = str(reason).strip().rstrip(".")
        raise UserError(f"{name} is neither a local folder nor available from the hub: {why}; {step}") from reason


def open_safetensors(path: Path):
    """safetensors.safe_open, with a UserError that names the file when it is missing or not whole."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as reason:
        raise UserError(f"{path} is not a whole safetensors file: {reason}") from None


def lies_in(folder: Path, file: str) -> bool:
    """Whether `file` lies in `folder` itself, links followed; in the hub's cache those of a snapshot lead to blobs/."""
    target, folder = (folder / file).resolve(), folder.resolve()
    blobs = (folder.parent.parent / "blobs").resolve() if folder.parent.name == "snapshots" else folder
    return Path(file).name == file and target.parent in (folder, blobs)


def find_tensors(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor, single file or sharded. UserError where index and shards differ.

    Pickled weights (.bin, .pt) are not read: whoever wrote them can have them run any program.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    listed = read_json(index).get("weight_map") if index.exists() else None
    if index.exists() and not (isinstance(listed, dict) and all(isinstance(file, str) for file in listed.values())):
        raise UserError(f"{index} has no weight_map that puts tensors in files")
    if listed is None and not single.exists():
        pickled = [path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")]
        only = f", only {min(pickled)}: pickled weights can run any program when read" if pickled else ""
        raise UserError(f"{folder} has no model.safetensors{only}; give a checkpoint in safetensors")
    found = {}
    for file in ["model.safetensors"] if listed is None else sorted(set(listed.values())):
        if listed is not None and not (file.isprintable() and lies_in(folder, file)):  # NUL is in no file's name
            raise UserError(f"{index} names {file}, which is not a file of its own folder")
        found |= dict.fromkeys(open_safetensors(folder / file).keys(), file)
    if listed is not None and found != listed:
        name = min(set(found.items()) ^ set(listed.items()))[0]
        raise UserError(f"{index} puts {name} in {listed.get(name)}, the shards in {found.get(name)}")
    # Old checkpoints carry buffers of rope, which the config already determines.
    return {name: folder / file for name, file in found.items() if not name.endswith("rotary_emb.inv_freq")}


def check_sizes(config: Config, files: dict[str, Path], folder: Path):
    """Raise UserError for a size that no stored tensor has, before anything is built by it."""
    largest = 0
    for path in set(files.values()):
        with open_safetensors(path) as file:
            names = file.keys()
            shapes = [file.get_slice(name).get_shape() for name in names]
            largest = max([largest, *(size for shape in shapes if 0 not in shape for size in shape)])
    sizes = {key: getattr(config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes["num_attention_heads * head_dim"] = config.num_attention_heads * config.head_dim
    for key, size in sizes.items():
        if size > largest:
            raise UserError(f"{folder / 'config.json'}: {key} is {size}, but no tensor's shape has more than {largest}")
    if config.num_hidden_layers > len(files):
        layers = f"num_hidden_layers is {config.num_hidden_layers}"
        raise UserError(f"{folder / 'config.json'}: {layers}, but there are {len(files)} tensors in all")


def check_tensors(files: dict[str, Path], parameters: dict[str, Tensor], folder: Path):
    """Raise UserError for the first tensor that is missing, left over, of another shape, or no float."""
    for name in sorted(parameters.keys() | files.keys()):
        if name not in files:
            raise UserError(f"{folder} has no tensor {name}, which its config asks for")
        if name not in parameters:
            raise UserError(f"{files[name]}: tensor {name} has no place in this architecture")
        stored, expected = open_safetensors(files[name]).get_slice(name), list(parameters[name].shape)
        if stored.get_shape() != expected:
            raise UserError(f"{files[name]}: {name} has shape {stored.get_shape()}, the config asks for {expected}")
        if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{files[name]}: {name} is stored as {stored.get_dtype()}, not as a float")


def read_tensor_into(target: Tensor, path: Path, name: str, block: int = 2**22, first: int = 0):
    """Copy the rows from `first` on of tensor `name` of a safetensors file into `target`, as many as it has, converted.

    Some rows (`block` elements) at a time, and the file is mapped anew for each: the pages of a mapping count as
    memory until it closes.
    """
    rows = max(1, block // target[:1].numel()) if len(target) else 1
    for start in range(0, len(target), rows):
        with open_safetensors(path) as file:
            end = min(start + rows, len(target))
            target[start:end].copy_(file.get_slice(name)[first + start : first + end])


def load_model(
    name_or_path, dtype: torch.dtype | None = None, device="cpu", revision: str | None = None
) -> Transformer:
    """A checkpoint in Hugging Face layout, from a local folder or the hub, in eval mode.

    dtype: what the weights become (default: what the config says, else what the embedding is stored in). Peak memory
    is the model and one block of a tensor. On the device "meta" no weight is read: `read_weights` does it later.
    Raises UserError, by name, for what is missing, left over or unknown.
    """
    folder = find_folder(name_or_path, CHECKPOINT_FILES + TOKENIZER_FILES, revision)
    config, files = read_config(folder), find_tensors(folder)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and head in files and embedding in files:  # some files hold a tied head twice
        copies = [open_safetensors(files[name]).get_tensor(name) for name in (embedding, head)]
        if not torch.equal(*copies):
            raise UserError(f"{files[head]}: {head} differs from {embedding}, but the config ties them")
        del copies, files[head]
    check_sizes(config, files, folder)
    with torch.device("meta"):
        model = Transformer(config)
    check_tensors(files, dict(model.named_parameters()), folder)
    dtype = dtype or config.dtype or open_safetensors(files[embedding]).get_slice(embedding)[:1].dtype
    for name, parameter in list(model.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        if not weight.is_meta:
            read_tensor_into(weight, files[name], name)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight))
    model.tie_weights()
    model.folder, model.name_or_path, model.revision = folder, str(name_or_path), revision
    return model.eval()


@torch.no_grad()
def read_weights(model: Transformer):
    """Fill the weights of `model` from its checkpoint; of a sharded one (FSDP2), the rows that this rank holds."""
    files = find_tensors(model.folder)
    for name, parameter in model.named_parameters():
        if name not in files:  # an adapter's
            continue
        rows, first = parameter, 0
        if hasattr(parameter, "to_local"):  # FSDP2 cuts dimension 0 as torch.chunk does
            rows, mesh = parameter.to_local(), parameter.device_mesh
            first = mesh.get_local_rank() * -(-len(parameter) // mesh.size())
        read_tensor_into(rows, files[name], name, first=first)


def save_model(model: Transformer, folder):
    """Write a checkpoint that load_model, transformers, vLLM and lm-eval load, the tokenizer's files beside it."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    dtype_key = "torch_dtype" if "torch_dtype" in model.config.raw else "dtype"
    config = model.config.raw | {dtype_key: str(model.lm_head.weight.dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)
    # named_parameters lists a tied tensor once, under its first name: the embedding
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    for pattern in ["generation_config.json", *TOKENIZER_FILES]:
        for file in model.folder.glob(pattern) if model.folder else ():
            write_whole(folder / file.name, functools.partial(shutil.copyfile, file))


# ----------------------------------------------------------------------------------------------- per-token loss


def _logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V) in float32 and those of the targets (T, 1), right to float32 rounding where it matters.

    A bfloat16 logit of 20 is rounded to a step of 0.125, REL is smaller than that. So take the target's logit off
    inside the product, which sums in float32: what is rounded then is small where it matters.
    """
    target_logit = (hidden.float() * weight[targets].float()).sum(dim=1, keepdim=True)
    shift = -target_logit.to(hidden.dtype)
    logits = torch.addmm(shift.expand(-1, len(weight)), hidden, weight.T).float()
    target_logit += shift.float()
    return logits.scatter_(1, targets.unsqueeze(1), target_logit), target_logit


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, with_gradient):
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if with_gradient else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            target = targets[rows].unsqueeze(1)
            logits, target_logit = _logits(hidden[rows], weight, targets[rows])
            largest = logits.amax(dim=1, keepdim=True)
            total = (logits.sub_(largest).exp_()).sum(dim=1, keepdim=True)
            nll[rows] = (total.log() + largest - target_logit).squeeze(1)
            if with_gradient:  # d nll / d hidden = (softmax - onehot(target)) W
                probability = logits.div_(total)
                probability.scatter_add_(1, target, torch.full_like(total, -1.0))
                gradient[rows] = probability.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_nll.unsqueeze(1)).to(gradient.dtype), None, None, None, None


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Negative log-likelihood of each target: -log P(targets_t | hidden_t), the summands of Eq. 1.

    hidden (T, D), weight (V, D), targets (T,) -> (T,) float32, in nats. Equal to cross entropy on hidden @ weight.T,
    but the (T, V) logits never exist: `chunk` rows at a time (default: 2^23 logits, 32 MB), one pass that also keeps
    each token's gradient for its hidden state. So whatever weights a selection gives the tokens later, backward is
    one multiplication. In bfloat16 the loss is right to a few tenths of a percent of itself. There is no gradient for
    `weight`: it is frozen here. To train it, use plain cross entropy.
    """
    chunk = chunk or max(1, 2**23 // len(weight))
    return _TokenNLL.apply(hidden, weight.detach(), targets, chunk, torch.is_grad_enabled() and hidden.requires_grad)


def response_places(response: Tensor, device) -> Tensor:
    """Where the response tokens of a batch stand when it is read row after row: (B, L) bool, on the host -> (T,)."""
    return to_device(response.flatten().nonzero().squeeze(1), device)


def response_nll(model: Transformer, input_ids: Tensor, response: Tensor) -> Tensor:
    """Losses of the response tokens of a batch, row after row: input_ids, response (B, L) -> (response.sum(),) float32.

    The loss of token x_i comes from the hidden state of x_{i-1}; only those positions meet the vocabulary. No row
    starts with a response token. With `response` on the host, nothing waits for a GPU.
    """
    hidden = model(input_ids)
    places = response_places(response, hidden.device)
    before = hidden.flatten(0, 1).index_select(0, places - 1)
    return token_nll(before, model.lm_head.weight, input_ids.flatten()[places])


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """log P(targets_t | hidden_t), (T,) float32, and whether each target is the likeliest token, (T,) bool.

    Arguments as token_nll's. Without gradients; `chunk` rows of logits exist at a time.
    """
    chunk, log_p, greedy = chunk or max(1, 2**23 // len(weight)), [], []
    for rows in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits, target_logit = _logits(rows[0], weight, rows[1])
        largest = logits.amax(dim=1, keepdim=True)
        greedy.append((target_logit == largest).squeeze(1))
        log_p.append((target_logit - largest - logits.sub_(largest).exp_().sum(dim=1, keepdim=True).log()).squeeze(1))
    return torch.cat(log_p), torch.cat(greedy)


# ---------------------------------------------------------------------------------------- KV cache and generation


GUESS = 8  # tokens of a guess, at most
STEP_TOKENS = 96  # a step of decoding that computes fewer costs hardly more: most of it is reading weights and cache
SIMILAR = 0.7  # prompts share a block if the shortest is at least this share of the longest: the rest is padding


class SharedPrefix:
    """Keys and values of one layer for tokens that stand before every row of a batch, (1, H_kv, P, d) each."""

    k = v = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The first call keeps what it gets, the prefix's own; later ones put the prefix before (B, H_kv, L, d)."""
        if self.k is None:
            self.k, self.v = k, v
        else:
            rows = len(k), -1, -1, -1
            k, v = torch.cat((self.k.expand(rows), k), dim=2), torch.cat((self.v.expand(rows), v), dim=2)
        return attention(q, k, v, mask)


class Row:
    """A prompt, the `number`-th, and what is written after it: `ids` has both. A guess at the next tokens: `guess`.

    What comes next may be what came next where the last tokens stood before, since text copies its prompt and repeats
    itself ("prompt lookup decoding", Saxena 2023). The model checks all of a guess in one step; what it would not have
    written is dropped, so the result does not depend on it.
    """

    def __init__(self, number: int, prompt: list[int]):
        self.number, self.start, self.ended = number, len(prompt), False
        self.ids, self.guess, self.after = [], [], {}  # after: n-gram -> the place behind where it was seen last
        for token in prompt:
            self.append(token)

    def new(self) -> list[int]:
        return self.ids[self.start :]

    def ends(self) -> list[tuple[int, ...]]:
        """The last tokens, as the n-grams that they are looked up by, the longest first."""
        return [tuple(self.ids[-n:]) for n in (3, 2, 1) if n <= len(self.ids)]

    def append(self, token: int):
        self.after |= dict.fromkeys(self.ends(), len(self.ids))
        self.ids.append(token)

    def look_up(self, most: int):
        """Set `guess`, at most `most` tokens; a repetition runs on into the guess itself."""
        place = next((self.after[end] for end in self.ends() if end in self.after), None)
        self.guess = []
        while place is not None and len(self.guess) < most:
            self.guess.append(self.ids[place] if place < len(self.ids) else self.guess[place - len(self.ids)])
            place += 1


class Block:
    """Rows of similar length that are decoded side by side, and the cache of their keys and values.

    keys, values: for each layer, (rows, H_kv, capacity, d), each row's from its first token to the one before its last.
    """

    def __init__(self, config: Config, rows: list[Row], capacity: int, like: Tensor):
        shape, layers = (len(rows), config.num_key_value_heads, capacity, config.head_dim), config.num_hidden_layers
        self.keys, self.values = ([like.new_zeros(shape) for _ in range(layers)] for _ in range(2))
        self.rows, self.device = rows, like.device

    def drop_ended(self):
        going = [n for n, row in enumerate(self.rows) if not row.ended]
        if len(going) == len(self.rows):
            return
        self.rows = [self.rows[n] for n in going]
        for layer, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            self.keys[layer], self.values[layer] = k[going], v[going]

    def extend(self, width: int) -> Tensor:
        """The positions of each row's last token and those after it, (rows, width), to be computed next."""
        last = torch.tensor([[len(row.ids) - 1] for row in self.rows], device=self.device)
        self.positions = last + torch.arange(width, device=self.device)
        places = torch.arange(int(last.max()) + width, device=self.device)
        self.mask = (places <= self.positions[:, :, None])[:, None]  # (rows, 1, width, places)
        return self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of those tokens, (rows, heads, width, d), to all up to themselves; their k and v are stored."""
        at, end = (torch.arange(len(k), device=k.device)[:, None], slice(None), self.positions), self.mask.shape[-1]
        self.keys[layer][at], self.values[layer][at] = k.transpose(1, 2), v.transpose(1, 2)
        return attention(q, self.keys[layer][:, :, :end], self.values[layer][:, :, :end], self.mask)


class ReadPrompts(NamedTuple):
    """The cache of one layer while prompts are read, padded on the right: they go to rows `first` on of a block."""

    block: Block
    layer: int
    first: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        at = slice(self.first, self.first + len(k)), slice(None), slice(k.shape[2])
        self.block.keys[self.layer][at], self.block.values[self.layer][at] = k, v
        return attention(q, k, v)


class Decode(NamedTuple):
    """The cache of one layer while each row of all blocks goes on by a few tokens."""

    blocks: list[Block]
    layer: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:  # (rows of all blocks, heads, width, d)
        sizes = [len(block.rows) for block in self.blocks]
        parts = zip(self.blocks, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        return torch.cat([block.attend(self.layer, q, k, v) for block, q, k, v in parts])


def pad_right(lists: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """ids (B, longest), zeros after the end of each list, and where each one's last id stands, (B,)."""
    last = torch.tensor([len(ids) - 1 for ids in lists], device=device)
    longest = int(last.max()) + 1
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in lists], device=device), last


def read_prompts(
    model: Transformer, rows: list[Row], max_new_tokens: int, batch_tokens: float
) -> tuple[Block, list[Tensor]]:
    """A block of rows, the longest first, and the hidden state of each one's last token, (1, D)."""
    layers, weight, hidden = range(model.config.num_hidden_layers), model.lm_head.weight, []
    block = Block(model.config, rows, room(len(rows[0].ids), max_new_tokens), weight)
    size = int(max(1, min(batch_tokens / len(rows[0].ids), len(rows))))
    for first in range(0, len(rows), size):
        ids, last = pad_right([row.ids for row in rows[first : first + size]], weight.device)
        read = model(ids, cache=[ReadPrompts(block, layer, first) for layer in layers])
        hidden += read[torch.arange(len(ids), device=weight.device), last].split(1)
    return block, hidden


def room(prompt_length: int, max_new_tokens: int) -> int:
    """How many tokens a row's cache is to hold. A row without a guess gets padding where others have theirs."""
    return prompt_length + max_new_tokens + GUESS


def penalized(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """The logits (V,), those above zero divided, those below multiplied, of the tokens in `seen`."""
    seen = torch.tensor(seen, device=logits.device).unique()
    return logits.index_copy(0, seen, torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty))


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Container[int] = (),
    stop: Callable[[list[int]], bool] = lambda ids: False,
    batch_tokens: float = math.inf,
    cache_tokens: float = math.inf,
    ended: Callable[[int], None] = lambda i: None,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """Greedy continuation of each prompt: at most `max_new_tokens` ids, up to the first stop id, which is left out.

    stop: is asked after each token of a row, with the row's ids so far; true ends the row, its last token included.
    batch_tokens: how many tokens of prompts are read at once. cache_tokens: how many the cache may hold, prompts and
    all that they may become (at least one prompt in either case). The longest prompts come first; those of similar
    length share a block, so little of it is padding; rows that have ended make place for the next. ended: is told each
    prompt that is done. repetition_penalty: divides the logits above zero, and multiplies those below, of the tokens
    that stand in a row already (Keskar et al., 2019).
    """
    produced = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the longest last, to be popped first
    blocks: list[Block] = []
    hidden: list[Tensor] = []  # of each row of all blocks, its last token's state and those of its guess, (n, D)
    layers, device = range(model.config.num_hidden_layers), model.lm_head.weight.device

    def size(i):
        return room(len(prompts[i]), max_new_tokens)

    while blocks or waiting:
        free = cache_tokens - sum(len(block.rows) * block.keys[0].shape[2] for block in blocks)
        if free >= 0.25 * cache_tokens:  # so that prompts are read several at a time
            while waiting and (not blocks or free >= size(waiting[-1])):
                largest = size(waiting[-1])
                alike = sum(size(i) >= SIMILAR * largest for i in waiting)
                numbers = [waiting.pop() for _ in range(int(max(1, min(free / largest, alike))))]
                rows = [Row(i, prompts[i]) for i in numbers]
                block, read = read_prompts(model, rows, max_new_tokens, batch_tokens)
                blocks, hidden, free = [*blocks, block], [*hidden, *read], free - len(rows) * largest

        logits = model.lm_head(torch.cat(hidden))
        likeliest, at = logits.argmax(dim=-1).tolist(), 0
        for row in (row for block in blocks for row in block.rows):
            for n, guessed in enumerate([*row.guess, None], start=at):
                token = likeliest[n]
                if repetition_penalty != 1:
                    token = int(penalized(logits[n], row.ids, repetition_penalty).argmax())
                row.ended = token in stop_ids
                if not row.ended:
                    row.append(token)
                    row.ended = len(row.new()) == max_new_tokens or stop(row.new())
                if row.ended or token != guessed:
                    break
            at += 1 + len(row.guess)
            if row.ended:
                produced[row.number] = row.new()
                ended(row.number)
        for block in blocks:
            block.drop_ended()
        blocks, hidden = [block for block in blocks if block.rows], []
        rows = [row for block in blocks for row in block.rows]
        for row in rows:
            row.look_up(min(GUESS, STEP_TOKENS // len(rows) - 1, max_new_tokens - len(row.new()) - 1))
        if rows:
            ids, _ = pad_right([row.ids[-1:] + row.guess for row in rows], device)
            positions = torch.cat([block.extend(ids.shape[1]) for block in blocks])
            read = model(ids, positions, cache=[Decode(blocks, layer) for layer in layers])
            hidden = [states[: 1 + len(row.guess)] for row, states in zip(rows, read, strict=True)]
    return produced
