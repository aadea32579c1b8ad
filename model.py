"""A Llama / Qwen decoder: configuration, blocks, the loss of each token.

Parameters have the checkpoint's names. support/checkpoint.py reads the files, support/kernels.py has fast forms of a
few formulas.

Sizes: B sequences, L tokens, D hidden, H query heads, H_kv key/value heads, d head_dim, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from support.checkpoint import EMBEDDING, check_tensors, find_checkpoint, find_weights, read_architecture, read_weights
from support.kernels import attention, chunked_nll, logits_at_once, rms_norm, swiglu
from support.packing import in_one_row


@dataclass(frozen=True)
class Config:
    """What config.json says of the architecture, in either of transformers' two dialects."""

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


# ------------------------------------------------------------------------------------------------------- blocks


class RMSNorm(nn.Module):
    """Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, the mean in float32 whatever x is in."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        return rms_norm(x, self.weight, self.eps)


def rope_frequencies(config: Config, device=None) -> Tensor:
    """Angle per position of each rotated pair, (d/2,) float32: theta^(-2i/d), which llama3 slows for long contexts."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / config.rope["rope_theta"] ** exponent
    if config.rope["rope_type"] == "llama3":
        # A wavelength that fits the original context high_freq_factor times stays. One that fits it fewer than
        # low_freq_factor times is stretched by factor. Between the two, interpolate.
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


class Attention(nn.Module):
    """Grouped-query causal self-attention."""

    def __init__(self, config: Config):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, H_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = d
        self.q_proj = nn.Linear(D, H * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, H_kv * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, H_kv * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.output_bias)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope, mask: Tensor | None = None, cache=None) -> Tensor:  # (B, L, D) -> (B, L, D)
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # (B, L, n, d)
        q = apply_rope(self.q_norm(q).transpose(1, 2), rope)  # (B, H, L, d)
        k = apply_rope(self.k_norm(k).transpose(1, 2), rope)  # (B, H_kv, L, d)
        attend = attention if cache is None else cache.attend
        out = attend(q, k, v.transpose(1, 2), mask)  # (B, H, L, d)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


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


class Embedding(nn.Embedding):
    """nn.Embedding that draws no numbers on the meta device, for which torch imports a compiler (1.3 s)."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class Transformer(nn.Module):
    """The decoder up to its last hidden state; `lm_head` turns those into logits where logits are wanted.

    folder: where the checkpoint lies; name_or_path, revision: what was asked for. gradient_checkpointing: a layer
    keeps only its input, and runs again in the backward pass. packed: `response_nll` puts a batch into one row.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.folder, self.name_or_path, self.revision = config, None, None, None
        self.gradient_checkpointing = self.packed = False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Make the head and the embedding one tensor, where the checkpoint says that they are."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, positions=None, mask=None, cache=None) -> Tensor:
        """Hidden states after the final norm, (B, L) token ids -> (B, L, D).

        By default attention is causal from position 0 on, for sequences padded on the right.
        positions: (L,) or (B, L), where the tokens stand; mask: as `attention` takes it; cache: for each layer, an
        object whose `attend` stands for `attention`, with what it keeps of earlier calls.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.model.embed_tokens(input_ids)
        rope = rope_table(self.config, positions, x.dtype)
        for i, layer in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recompute_in_backward(layer, x, rope, mask, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache[i] if cache is not None else None)
        return self.model.norm(x)


# ------------------------------------------------------------------------------------------------------ loading


def read_config(folder: Path) -> Config:
    """What `folder`/config.json says. UserError names a setting that is not implemented."""
    return Config(**read_architecture(folder))


def load_model(
    name_or_path, dtype: torch.dtype | None = None, device="cpu", revision: str | None = None
) -> Transformer:
    """A checkpoint in Hugging Face layout, from a local folder or the hub, in eval mode.

    dtype: what the weights become (default: the config's, else the embedding's). Peak memory is the model and one
    block of a tensor. On the device "meta" no weight is read: `read_weights` does it later.
    Raises UserError, by name, for what is missing, left over or unknown.
    """
    folder = find_checkpoint(name_or_path, revision)
    config = read_config(folder)
    stored = find_weights(folder, config)
    with torch.device("meta"):
        model = Transformer(config)
    check_tensors(stored, dict(model.named_parameters()), folder)
    dtype = dtype or config.dtype or stored[EMBEDDING].dtype
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        weight = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
        setattr(model.get_submodule(owner), leaf, weight)
    model.tie_weights()
    model.folder, model.name_or_path, model.revision = folder, str(name_or_path), revision
    if torch.device(device).type != "meta":
        read_weights(model, stored)
    return model.eval()


# ----------------------------------------------------------------------------------------------- per-token loss


def centred_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and those of the targets (T, 1), float32; arguments as token_nll's.

    A bfloat16 logit near 20 has steps of 0.125, and REL is smaller. So the target's logit is subtracted inside the
    product, which sums in float32. Logits near the target's are then small, and rounding changes them little.
    """
    target_logit = (hidden.float() * weight[targets].float()).sum(dim=1, keepdim=True)
    shift = -target_logit.to(hidden.dtype)
    logits = torch.addmm(shift.expand(-1, len(weight)), hidden, weight.T).float()
    target_logit += shift.float()
    return logits.scatter_(1, targets.unsqueeze(1), target_logit), target_logit


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None, statistics=None) -> Tensor:
    """Negative log-likelihood of each target: -log P(targets_t | hidden_t), the summands of Eq. 1.

    hidden (T, D), weight (V, D), targets (T,) -> (T,) float32, in nats. Equal to cross entropy on hidden @ weight.T,
    but the (T, V) logits never exist: `chunk` rows at a time (default: 2^23 logits, 2^26 on a GPU), one pass that also
    keeps each token's gradient for its hidden state. Backward is then one multiplication, whatever weights a selection
    gives the tokens. In bfloat16 the loss is right to a few tenths of a percent of itself. There is no gradient
    for `weight`: it is frozen here. To train it, use plain cross entropy. statistics: `kernels.chunked_nll`'s.
    """
    chunk = chunk or logits_at_once(len(weight), hidden.device)
    return chunked_nll(hidden, weight, targets, chunk, centred_logits, statistics)


def response_places(response: Tensor, device) -> Tensor:
    """Where the response tokens stand in the flat batch, no row's first token: (B, L) bool on the host -> (T,)."""
    return nn.functional.pad(response[:, 1:], (1, 0)).flatten().nonzero().squeeze(1).to(device, non_blocking=True)


def response_nll(model: Transformer, input_ids: Tensor, response: Tensor, statistics=None) -> Tensor:
    """Losses of the response tokens of a batch, row after row: input_ids, response (B, L) -> (T,) float32.

    The loss of token x_i comes from the hidden state of x_{i-1}; only `response_places`, T in all, meet the
    vocabulary. With `response` on the host, nothing waits for a GPU. statistics: as token_nll's.
    """
    positions = mask = None
    if model.packed:
        input_ids, response, positions, mask = in_one_row(input_ids, response)
    hidden = model(input_ids, positions, mask)
    places = response_places(response, hidden.device)
    before = hidden.flatten(0, 1).index_select(0, places - 1)
    return token_nll(before, model.lm_head.weight, input_ids.flatten()[places], statistics=statistics)
