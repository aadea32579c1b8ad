"""Each fast operation against its formula in float64, value and gradient."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_sstoken import random_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import RMSNorm, load_model
from support import kernels
from support.kernels import attention, chunked_nll, dropout, rms_norm, swiglu


def test_training_attention_takes_no_mask_and_flash_can_serve_it(checkpoint, monkeypatch):
    monkeypatch.setattr(kernels, "SHORT", 0)  # as on a GPU, and as of long sequences
    model = load_model(checkpoint)
    ids, _ = random_batch([40, 23])
    calls, sdpa = [], F.scaled_dot_product_attention
    spy = lambda *args, **kwargs: calls.append(kwargs) or sdpa(*args, **kwargs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where flash cannot take the call
        model(ids)
    assert len(calls) == 3 and all(c.get("attn_mask") is None and c["is_causal"] for c in calls)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("heads", [(6, 3), (4, 4), (3, 1)])
def test_attention_of_short_sequences_and_its_gradient_equal_the_formula(length, heads, monkeypatch):
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, n, 8, dtype=torch.float64).transpose(1, 2) for n in (heads[0], *2 * heads[1:])]
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    k_of_each, v_of_each = (x.repeat_interleave(heads[0] // heads[1], dim=1) for x in (k, v))
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = (q @ k_of_each.mT / 8**0.5).masked_fill(later, -math.inf).softmax(-1) @ v_of_each
    factor = torch.randn_like(expected)
    of_formula = torch.autograd.grad((expected * factor).sum(), (q, k, v))

    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # what is tested does not call it
    found = attention(q, k, v)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((found * factor).sum(), (q, k, v)), of_formula, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_attention_of_short_sequences_in_bfloat16_is_as_exact_as_the_fused_kernel():
    torch.manual_seed(0)
    inputs = [3 * torch.randn(2, n, 500, 64, dtype=torch.float64) for n in (6, 3, 3)]
    factor, errors = torch.randn(2, 6, 500, 64), []
    fused = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    for function, dtype in ((fused, torch.float64), (attention, torch.bfloat16), (fused, torch.bfloat16)):
        rounded = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
        out = function(*rounded)
        found = (out, *torch.autograd.grad(out, rounded, factor.bfloat16().to(dtype)))
        errors.append([x.double() for x in found])
    exact, *others = errors
    ours, theirs = ([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)] for found in others)
    bounds = 1.3, 1.3, 0.8, 0.8  # the last two are sums over blocks, made in float32
    assert all(a < bound * b for a, bound, b in zip(ours, bounds, theirs, strict=True)), (ours, theirs)


def test_attention_with_a_mask_for_the_last_queries_only():
    torch.manual_seed(0)
    for length, masked in ((40, 40), (40, 30), (40, 3), (5, 5), (5, 2), (1, 1)):
        q, k, v = torch.randn(2, 6, length, 8), torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)
        mask = torch.rand(2, 1, masked, 40) < 0.5
        mask[..., 0] = True
        whole = torch.cat((torch.ones(length, 40).tril().bool().expand(2, 1, -1, -1)[:, :, :-masked], mask), dim=2)
        scores = q.double() @ k.double().repeat_interleave(2, dim=1).transpose(2, 3) / 8**0.5
        weights = scores.masked_fill(~whole, -math.inf).softmax(-1)
        expected = weights @ v.double().repeat_interleave(2, dim=1)
        assert torch.allclose(attention(q, k, v, mask).double(), expected, atol=1e-5), (length, masked)


def test_rms_norm_takes_its_mean_in_float32():
    torch.manual_seed(0)
    norm, x = RMSNorm(512, eps=1e-6).bfloat16(), (torch.randn(64, 512) * 30).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert ((norm(x).double() - exact).abs() / exact.abs().clamp(min=1e-3)).max() < 2**-8  # one rounding to bfloat16


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_keeps_every_position_equally_often_and_its_rate_to_1e_4(rate, dtype):
    torch.manual_seed(0)
    x = torch.ones(2_000_003, dtype=dtype)  # no multiple of the four elements that one draw decides on
    dropped, correction = dropout(x, rate)
    assert set(dropped.unique().tolist()) == {0.0, 1.0} and 1 / correction == pytest.approx(1 - rate, abs=1e-4)
    keep, n = 1 / correction, len(x) // 4
    for position in range(4):  # of a draw of 64 bits, whose top bit is the sign
        share = dropped[position::4].double().mean().item()
        assert abs(share - keep) < 5 * (keep * (1 - keep) / n) ** 0.5, position
    neighbours = (dropped[:-1] * dropped[1:]).double().mean().item()  # independent of each other
    assert abs(neighbours - keep**2) < 5 * (keep**2 * (1 - keep**2) / len(x)) ** 0.5 * 2


def test_dropout_is_reproducible_and_passes_nothing_where_it_dropped(checkpoint):
    x = torch.tensor([1.0, -2.0, float("inf"), float("nan"), -0.0] * 1000, requires_grad=True)
    torch.manual_seed(1)
    first, _ = dropout(x.detach().clone(), 0.5)
    torch.manual_seed(1)
    again, _ = dropout(x, 0.5)
    assert torch.equal(first.view(torch.int32), again.view(torch.int32))
    again.backward(torch.ones_like(x))
    kept = x.grad.bool()
    bits = lambda t: t.detach().view(torch.int32)
    assert torch.equal(bits(again)[kept], bits(x)[kept]) and (bits(again)[~kept] == 0).all()
    assert 0.4 < kept.float().mean() < 0.6


def assert_gradients_equal(ours, formula, arguments):
    """Value and gradient of `ours` against those of its formula, as autograd has them, all in float64."""
    outputs, gradients = [], []
    for function in (ours, formula):
        leaves = [x.clone().requires_grad_() for x in arguments]
        out = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=generator).double()))
    assert outputs[0].dtype == torch.float64
    assert torch.allclose(*outputs, rtol=0, atol=1e-6)  # the norm's mean is float32, whatever comes in
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def random_float64(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).double() for shape in shapes]


def test_rms_norm_and_its_gradient_are_the_formula_s():
    formula = lambda x, weight: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert_gradients_equal(lambda x, w: rms_norm(x, w, 1e-5), formula, random_float64((3, 5, 16), (16,)))


def test_swiglu_and_its_gradient_are_the_formula_s():
    formula = lambda gate, up: gate / (1 + torch.exp(-gate)) * up
    assert_gradients_equal(swiglu, formula, random_float64((3, 5, 16), (3, 5, 16)))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_losses_of_chunks_of_logits_and_their_gradient_are_the_formula_s(chunk):
    hidden, weight = random_float64((11, 8), (37, 8))
    targets = torch.randint(0, 37, (11,), generator=torch.Generator().manual_seed(2))

    def plain(hidden, weight, targets):
        logits = hidden @ weight.T
        return logits, logits.gather(1, targets[:, None])

    def formula(hidden):
        logits = hidden @ weight.T
        return torch.logsumexp(logits, dim=1) - logits[torch.arange(11), targets]

    def ours(hidden):
        return chunked_nll(hidden, weight, targets, chunk, plain).double()  # kept in float32

    assert_gradients_equal(ours, formula, [hidden])


def test_on_a_gpu_float32_attention_repeats_keys_for_a_kernel_whose_memory_does_not_grow_with_the_square(monkeypatch):
    shapes = []
    spy = lambda q, k, v, **given: shapes.append((q.shape, k.shape, v.shape)) or torch.empty_like(q)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with FakeTensorMode():  # tensors of a GPU that is not there
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.empty(2, n, 700, 64, device="cuda", dtype=dtype) for n in (6, 2, 2))
            assert attention(q, k, v).shape == q.shape
    assert [k[1] for _, k, _ in shapes] == [6, 2] and [v[1] for _, _, v in shapes] == [6, 2]


def test_the_kernel_for_sequences_is_asked_for_what_the_loop_computes(monkeypatch):
    """The kernel itself is a GPU's: in its place a float64 loop over what it is given."""

    def in_its_place(q, k, v, starts, ends, longest, *rest, window_size, enable_gqa):
        assert starts is ends and starts.dtype == torch.int32 and rest == (longest,) and enable_gqa
        assert window_size == (-1, 0) and longest == max(b - a for a, b in itertools.pairwise(starts.tolist()))
        out = torch.empty_like(q)
        for a, b in itertools.pairwise(starts.tolist()):
            for head in range(q.shape[1]):
                group = head // (q.shape[1] // k.shape[1])
                scores = q[a:b, head].double() @ k[a:b, group].double().T / q.shape[2] ** 0.5
                seen = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
                out[a:b, head] = (seen @ v[a:b, group].double()).to(q.dtype)
        return out

    lengths = [5, 1, 9]
    q, k, v = (torch.randn(1, heads, 15, 8) for heads in (6, 2, 2))
    sequences = kernels.Sequences(lengths, torch.tensor([0, 5, 6, 15], dtype=torch.int32))
    apart = kernels.attention(q, k, v, sequences)
    assert not kernels.varlen_kernel(q)
    monkeypatch.setattr(kernels, "varlen_kernel", lambda q: in_its_place)
    assert torch.allclose(kernels.attention(q, k, v, sequences), apart, atol=1e-5)
