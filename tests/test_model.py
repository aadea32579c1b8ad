"""The decoder's own promises: what it refuses, how it loads, the loss per token, generation. Parity is elsewhere."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import edit_json
from memory import peak_allocated
from test_sstoken import random_batch
from transformers import AutoModelForCausalLM

from model import load_model, response_nll, token_nll

# ------------------------------------------------------------------------------------------------------ loading


def test_the_dtype_is_what_is_asked_for_else_the_config_s_else_the_files(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")  # of float32
    for config, asked, expected in [
        ("bfloat16", torch.float64, torch.float64),
        ("bfloat16", None, torch.bfloat16),
        (None, None, torch.float32),
    ]:
        edit_json(folder / "config.json", lambda raw, dtype=config: raw.update(dtype=dtype))
        assert {p.dtype for p in load_model(folder, asked).parameters()} == {expected}


# ------------------------------------------------------------------------------------------------------ forward


def test_right_padding_changes_nothing_for_real_tokens(checkpoint):
    model = load_model(checkpoint)
    lengths = [12, 50, 31]
    ids, _ = random_batch(lengths)
    padded = model(ids)
    for i, length in enumerate(lengths):
        assert (padded[i, :length] - model(ids[i : i + 1, :length])[0]).abs().max() < 1e-5


# ----------------------------------------------------------------------------------------------- per-token loss


def loss_case(tokens=37, vocab=211, size=24):
    torch.manual_seed(1)
    hidden, weight = torch.randn(tokens, size) * 2, torch.randn(vocab, size)
    return hidden.requires_grad_(), weight, torch.randint(0, vocab, (tokens,)), torch.rand(tokens) - 0.3


@pytest.mark.parametrize("chunk", [1, 5, 37, 1000, None])
def test_token_nll_equals_cross_entropy_on_full_logits(chunk):
    hidden, weight, targets, weights = loss_case()
    nll = token_nll(hidden, weight, targets, chunk)
    (nll * weights).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().T, targets, reduction="none")
    (expected * weights).sum().backward()
    assert nll.dtype == torch.float32
    assert (nll - expected).abs().max() < 1e-5
    assert (hidden.grad - exact.grad).abs().max() < 1e-5


def test_token_nll_without_gradient_gives_the_same_bits_and_keeps_nothing():
    hidden, weight, targets, _ = loss_case(size=4096)
    with torch.no_grad():
        without = token_nll(hidden, weight, targets)
        assert peak_allocated(lambda: token_nll(hidden, weight, targets, chunk=1)) < hidden.numel()
    assert torch.equal(without, token_nll(hidden, weight, targets))
    assert token_nll(hidden[:0], weight, targets[:0]).shape == (0,)


def test_token_nll_in_bfloat16_is_not_off_by_the_rounding_of_large_logits():
    hidden, weight, targets, _ = loss_case(tokens=200, size=64)
    hidden, weight = hidden.detach().bfloat16().requires_grad_(), weight.bfloat16()
    exact_hidden = hidden.detach().double().requires_grad_()
    logits = exact_hidden @ weight.double().T
    targets[:150] = logits[:150].topk(3).indices[:, 1]  # most tokens are predicted well, as in a real text
    exact = F.cross_entropy(logits, targets, reduction="none")
    rounded = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    nll = token_nll(hidden, weight, targets)
    assert nll.dtype == torch.float32 and nll.min() >= 0 and logits.abs().max() > 40
    assert ((nll - exact).abs() < 0.005 * exact + 1e-3).all()
    assert (nll - exact)[:150].abs().mean() < (rounded - exact)[:150].abs().mean() / 4
    nll.sum().backward()
    exact.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert (hidden.grad - exact_hidden.grad).norm() < 0.01 * exact_hidden.grad.norm()


def test_token_nll_of_a_certain_token_is_zero_and_never_below():
    _, weight, targets, _ = loss_case(tokens=300, size=64)
    weight = weight.bfloat16()
    nll = token_nll(weight[targets] * 1.37, weight, targets)  # logits near 88, far above the others
    assert nll.min() == 0 and nll.max() < 1e-3


def test_token_nlls_memory_grows_with_the_chunk_and_not_with_the_tokens():
    vocab, chunk = 50_000, 16
    weight, hidden = torch.randn(vocab, 8), torch.randn(640, 8, requires_grad=True)
    targets = torch.randint(0, vocab, (640,))
    one_chunk = chunk * vocab * 4
    few = peak_allocated(lambda: token_nll(hidden[:64], weight, targets[:64], chunk).sum().backward())
    many = peak_allocated(lambda: token_nll(hidden, weight, targets, chunk).sum().backward())
    assert one_chunk < few < 3 * one_chunk
    assert many < few + 640 * 8 * 4 * 8
    wider = peak_allocated(lambda: token_nll(hidden, weight, targets, 2 * chunk).sum().backward())
    assert 1.8 < wider / many < 2.2


def test_response_nll_is_the_loss_of_each_response_token_given_what_precedes_it(checkpoint):
    model = load_model(checkpoint)
    ids, response = random_batch([20, 33])
    expected = []
    for row, mask in zip(ids, response, strict=True):
        logits = model.lm_head(model(row[None]))[0].double().log_softmax(-1)
        expected += [-logits[i - 1, row[i]].item() for i in range(len(row)) if mask[i]]
    result = response_nll(model, ids, response)
    assert result.shape == (int(response.sum()),)
    assert (result - torch.tensor(expected)).abs().max() < 1e-4


def test_response_nll_leaves_out_the_first_token_of_each_row_as_transformers_labels_do(checkpoint):
    model = load_model(checkpoint)
    ids, response = random_batch([20, 33])
    without = response_nll(model, ids, response)
    response[:, 0] = True
    assert torch.equal(response_nll(model, ids, response), without)
    labels = ids.masked_fill(~response, -100)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)(ids, labels=labels).loss
    assert (without.mean() - theirs).abs() < 1e-4 and len(without) == response.sum() - 2
