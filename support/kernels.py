"""Operations that take less memory or time than their formula. Each states its formula, and a test checks it."""

import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension: x (..., n), weight (n,) -> (..., n).

    In float32 up to the weight. Kept for the backward pass: x and one number per row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
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
    """silu(gate) * up, of equal shapes. Kept for the backward pass: the two arguments, not silu(gate)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


rms_norm, swiglu = _RMSNorm.apply, _SwiGLU.apply


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropped):  # dropped: of 65,536 elements
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # four numbers from each draw, -2^15 to 2^15 - 1
        first_kept = dropped - 2**15
        kept = bits.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1).to(torch.int8)  # 1 where kept, else 0
        ctx.save_for_backward(kept)
        return _where(kept, x)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return _where(kept, grad), None


def _where(kept: Tensor, x: Tensor) -> Tensor:
    """x where `kept` is 1, zero where it is 0: a product of bit patterns, exact even for infinity and NaN."""
    pattern = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.contiguous().view(pattern) * kept).view(x.dtype)


def dropout(x: Tensor, rate: float) -> tuple[Tensor, float]:
    """x with a share `rate` of its elements set to zero, and the factor that restores its expectation.

    Layers that read the same x (q, k and v; gate and up) share one mask. On a CPU `rate` is rounded to 1 / 65,536.
    """
    on_cpu, dropped = x.device.type == "cpu", min(round(rate * 2**16), 2**16 - 1)
    if on_cpu and dropped == 0:
        return x, 1.0
    if not hasattr(x, "dropped"):  # on a CPU F.dropout, which draws a number per element, is ten times slower
        x.dropped = _Dropout.apply(x, dropped) if on_cpu else F.dropout(x, rate)
    return x.dropped, 2**16 / (2**16 - dropped) if on_cpu else 1.0


FEW = 16  # queries of a head, for which reading the keys is most of the work
SHORT = 512  # tokens up to which `_ShortAttention` keeps little beside a layer's other activations
QUERY_BLOCK = 64  # queries of a head that it takes at a time


class _ShortAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v, causal: q (B, H, L, d), k and v (B, H_kv, L, d) -> (B, H, L, d), on a CPU.

    Twice as fast there as the fused kernel if sequences are short. Each block of queries sees the keys up to its own
    end. Scores and softmax are float32. The softmax is kept for the backward pass, in q's dtype.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        # Queries of all heads that share a key head go together: (B * H_kv, groups, L, d) beside (B * H_kv, L, d)
        shape, groups, wide = q.shape, q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.reshape(-1, groups, *q.shape[2:]), k.flatten(0, 1), v.flatten(0, 1)
        scaled, keys, out = q.to(wide) * q.shape[-1] ** -0.5, k.to(wide).mT, torch.empty_like(q)
        later = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=wide).triu_(1)
        kept, ctx.blocks = [], [slice(start, start + QUERY_BLOCK) for start in range(0, q.shape[2], QUERY_BLOCK)]
        for block in ctx.blocks:
            scores = scaled[:, :, block].flatten(1, 2) @ keys[..., : block.stop]  # (B * H_kv, groups * size, stop)
            own = scores.unflatten(1, (groups, -1))[..., block]  # (B * H_kv, groups, size, size)
            own += later[: own.shape[2], : own.shape[2]]
            kept.append(scores.softmax(-1).to(q.dtype))
            out[:, :, block] = (kept[-1] @ v[:, : block.stop]).unflatten(1, (groups, -1))
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        shape, grad, wide = grad.shape, grad.reshape(q.shape), torch.promote_types(q.dtype, torch.float32)
        grad_q, grad_k, grad_v = torch.empty_like(q), *(torch.zeros_like(x, dtype=wide) for x in (k, v))
        for block, attention in zip(ctx.blocks, kept, strict=True):
            block_q, block_grad = (x[:, :, block].flatten(1, 2) for x in (q, grad))
            grad_v[:, : block.stop] += attention.mT @ block_grad
            grad_attention = block_grad @ v[:, : block.stop].mT
            grad_scores = torch.ops.aten._softmax_backward_data(grad_attention, attention, -1, q.dtype)
            grad_scores *= q.shape[-1] ** -0.5
            grad_q[:, :, block] = (grad_scores @ k[:, : block.stop]).unflatten(1, (q.shape[1], -1))
            grad_k[:, : block.stop] += grad_scores.mT @ block_q
        return grad_q.view(shape), *(x.to(q.dtype).unflatten(0, (shape[0], -1)) for x in (grad_k, grad_v))


def varlen_kernel(q: Tensor) -> Callable | None:
    """torch's attention for `Sequences`, if it has one with grouped queries for q's device and dtype."""
    if q.is_cuda and q.dtype != torch.float32:
        with contextlib.suppress(ImportError):  # an older torch
            from torch.nn.attention import varlen  # here: it takes a second

            return varlen.varlen_attn if hasattr(varlen, "varlen_attn_out") else None


class Sequences(NamedTuple):
    """Sequences behind one another in one row: how long each is, and (n + 1,) int32 where each begins, and the end."""

    lengths: list[int]
    bounds: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each: q (1, H, sum of lengths, d), k and v (1, H_kv, same, d) -> (1, H, same, d)."""
        if kernel := varlen_kernel(q):
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            sizes = self.bounds, self.bounds, max(self.lengths), max(self.lengths)
            out = kernel(q, k, v, *sizes, window_size=(-1, 0), enable_gqa=True)  # causal
            return out.transpose(0, 1).unsqueeze(0)
        parts = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([attention(*part) for part in parts], dim=2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | Sequences | None" = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, H, L, d), k and v (B, H_kv, S, d) -> (B, H, L, d).

    mask: bool, (B, 1, n, S), where the last n queries may look; the queries before them are causal. Or `Sequences`.
    """
    if isinstance(mask, Sequences):
        return mask.attend(q, k, v)
    if mask is None:
        # Padding is on the right: no real token sees it, and its own results are not read
        if q.device.type == "cpu" and q.shape[2] <= SHORT:
            return _ShortAttention.apply(q, k, v)
        if q.device.type == "cuda" and q.dtype == torch.float32:  # no fused kernel groups queries there
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    causal = q.shape[2] - mask.shape[2]
    if causal:  # without a mask the kernel skips what nobody may see
        parts = attention(*(x[:, :, :causal] for x in (q, k, v))), attention(q[:, :, causal:], k, v, mask)
        return torch.cat(parts, dim=2)
    if q.shape[2] <= FEW:  # heads that share keys become queries of one head: the keys are read once
        shared = q.reshape(len(q), k.shape[1], -1, q.shape[3])
        mask = mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)
        return F.scaled_dot_product_attention(shared, k, v, attn_mask=mask).reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, logits_of, with_gradient, statistics):
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if with_gradient else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits, target_logit = logits_of(hidden[rows], weight, targets[rows])
            if statistics is not None:
                statistics(logits.log_softmax(dim=1))
            largest = logits.amax(dim=1, keepdim=True)
            total = (logits.sub_(largest).exp_()).sum(dim=1, keepdim=True)
            nll[rows] = (total.log() + largest - target_logit).squeeze(1)
            if with_gradient:  # d nll / d hidden = (softmax - onehot(target)) W
                probability = logits.div_(total)
                probability.scatter_add_(1, targets[rows].unsqueeze(1), torch.full_like(total, -1.0))
                gradient[rows] = probability.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_nll.unsqueeze(1)).to(gradient.dtype), None, None, None, None, None, None


def chunked_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, logits_of: Callable, statistics: Callable | None = None
) -> Tensor:
    """-log softmax(hidden @ weight.T) at each target: hidden (T, D), weight (V, D), targets (T,) -> (T,) float32.

    logits_of: (hidden, weight, targets) -> logits (n, V) and those of the targets (n, 1), float32, for `chunk` rows at
    a time. The gradient for hidden, (softmax - onehot(target)) weight, is computed in the same pass; `weight` has none.
    statistics: called with the log-probabilities (n, V) of each chunk, such as `PredictionStatistics`.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    return _ChunkedNLL.apply(hidden, weight.detach(), targets, chunk, logits_of, wanted, statistics)


TOP = 20  # the likeliest tokens, of `top_entropy`


def entropy(log_p: Tensor) -> Tensor:
    """H = -sum p log p of each row of log-probabilities, in nats: (n, V) -> (n,)."""
    return -(log_p.exp() * log_p).sum(dim=1)


def spread(log_p: Tensor) -> Tensor:
    """sigma = sqrt(sum p (log p)^2 - H^2), the standard deviation of the loss under p: (n, V) -> (n,)."""
    return (log_p.exp() * (log_p + entropy(log_p).unsqueeze(1)).square()).sum(dim=1).sqrt()


def top_entropy(log_p: Tensor) -> Tensor:
    """The entropy of each row's TOP likeliest tokens, as if there were no others: (n, V) -> (n,)."""
    return entropy(log_p.topk(min(TOP, log_p.shape[1]), dim=1).values.log_softmax(dim=1))


STATISTICS = {"entropy": entropy, "spread": spread, "top_entropy": top_entropy}


class PredictionStatistics:
    """Some of STATISTICS for each predicted token, collected chunk by chunk."""

    def __init__(self, names: Iterable[str]):
        self.names, self.chunks = list(names), []

    def __call__(self, log_p: Tensor):
        self.chunks.append([STATISTICS[name](log_p) for name in self.names])

    def collect(self, nll: Tensor) -> dict[str, Tensor]:
        """{name: (T,) float32} of all rows since the last call; nll: their losses (T,)."""
        chunks, self.chunks = self.chunks, []
        return {name: torch.cat([nll[:0], *(chunk[i] for chunk in chunks)]) for i, name in enumerate(self.names)}


def logits_at_once(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits to compute together: 2^23 numbers, 32 MB; on a GPU 2^26."""
    return max(1, 2 ** (26 if device.type == "cuda" else 23) // vocabulary)
