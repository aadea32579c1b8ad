"""The decoder's own promises: what it refuses, how it loads, the loss per token, generation. Parity is elsewhere."""

import functools
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import edit_json, make_checkpoint, to_old_dialect
from memory import peak_allocated
from safetensors.torch import load_file, save_file
from test_sstoken import random_batch
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import RMSNorm, load_model, read_config, response_nll, token_nll
from support import checkpoint, kernels
from support.checkpoint import save_model
from support.decoding import Row, generate
from support.files import UserError
from support.kernels import attention

# ------------------------------------------------------------------------------------------------ configuration


def test_both_config_dialects_say_the_same(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    new = read_config(tmp_path)
    edit_json(tmp_path / "config.json", to_old_dialect)
    old = read_config(tmp_path)
    assert "rope_parameters" in new.raw and "rope_parameters" not in old.raw
    for field in new.__dataclass_fields__:
        if field not in ("raw", "rope"):
            assert getattr(new, field) == getattr(old, field), field
    assert {key: old.rope[key] for key in new.rope} == new.rope


REFUSED = {
    "architecture": {"architectures": ["MistralForCausalLM"]},
    "architecture Qwen2ForCausalLM of model_type llama": {"architectures": ["Qwen2ForCausalLM"]},
    "model_type": {"model_type": "mistral"},
    "hidden_size": {"hidden_size": None},
    "hidden_act": {"hidden_act": "gelu"},
    "attention_dropout": {"attention_dropout": 0.1},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "yarn": {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "one for all layers": {"rope_parameters": {"full_attention": {"rope_type": "default"}, "rope_theta": 1e4}},
    "low_freq_factor": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}},
    "sliding-window": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    "sliding-window attention": {
        "use_sliding_window": True,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 2,
    },
    "dtype 'float13'": {"dtype": "float13"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(llama, tmp_path, name):
    shutil.copy(llama / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(REFUSED[name]))
    with pytest.raises(UserError, match=name):
        read_config(tmp_path)


def test_a_sliding_window_that_no_layer_uses_is_accepted(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3, "layer_types": None}
    edit_json(tmp_path / "config.json", lambda config: config.update(window))
    assert read_config(tmp_path).num_hidden_layers == 3


# ------------------------------------------------------------------------------------------------------ loading


@pytest.fixture
def copied(llama, tmp_path):
    """A copy of the tiny Llama whose tensors a test may change: (folder, change) with change(edit)."""
    folder = shutil.copytree(llama, tmp_path / "copy")

    def change(edit):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return folder, change


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_any_stored_float_becomes_the_dtype_asked_for(copied, stored, wanted):
    folder, change = copied
    change(lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    expected = load_file(folder / "model.safetensors")
    edit_json(folder / "config.json", lambda config: config.pop("dtype"))
    parameters = dict(load_model(folder, wanted).named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name].to(wanted or stored)), name


def test_rows_read_in_blocks_give_the_same_tensor(llama):
    expected = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    for block in (1, 48 * 7, 10**9):
        target = torch.empty_like(expected)
        checkpoint.read_tensor_into(target, llama / "model.safetensors", "model.embed_tokens.weight", block)
        assert torch.equal(target, expected)


WRONG_TENSORS = {
    "no tensor model.norm.weight": lambda t: t.pop("model.norm.weight"),
    "tensor model.extra has no place": lambda t: t.update({"model.extra": torch.zeros(3)}),
    "model.norm.weight has shape": lambda t: t.update({"model.norm.weight": torch.zeros(47)}),
    "model.norm.weight is stored as I64": lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int64)}),
    "lm_head.weight differs": lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
}


@pytest.mark.parametrize("message", WRONG_TENSORS)
def test_a_wrong_tensor_is_refused_by_name(copied, message):
    folder, change = copied
    change(WRONG_TENSORS[message])
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_rope_buffers_and_a_second_copy_of_a_tied_head_are_harmless(copied):
    folder, change = copied
    before = load_model(folder)
    change(
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
                "lm_head.weight": t["model.embed_tokens.weight"].clone(),
            }
        )
    )
    after = load_model(folder)
    ids = torch.arange(20)[None]
    assert torch.equal(before(ids), after(ids))
    assert after.lm_head.weight is after.model.embed_tokens.weight


def test_shards_and_index_must_agree(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert len(shards) > 1
    original = index.read_text()

    edit_json(index, lambda value: value["weight_map"].update({"model.norm.weight": shards[0]}))
    with pytest.raises(UserError, match="model.norm.weight"):
        load_model(folder)
    for outside in ("../x.safetensors", "/etc/passwd"):
        edit_json(index, lambda value, file=outside: value["weight_map"].update({"model.norm.weight": file}))
        with pytest.raises(UserError, match="not a file of its own folder"):
            load_model(folder)
    index.write_text(original)
    (folder / shards[-1]).write_bytes((folder / shards[-1]).read_bytes()[:-10])
    with pytest.raises(UserError, match=shards[-1]):
        load_model(folder)
    (folder / shards[-1]).unlink()
    with pytest.raises(UserError, match=shards[-1]):
        load_model(folder)


MEASURE_LOADING = """
import sys, torch
from model import load_model
from support.machine import peak_memory_mb
before = peak_memory_mb(torch.device("cpu"))
model = load_model(sys.argv[1], getattr(torch, sys.argv[2]))
weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print((peak_memory_mb(torch.device("cpu")) - before) / weights)
"""


@pytest.mark.parametrize("stored, wanted", [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_loading_peaks_at_1_3_times_the_weights(tmp_path, stored, wanted):
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "vocab_size": 50000}
    make_checkpoint(tmp_path, "llama", num_attention_heads=16, **wide)
    tensors = {n: t.to(getattr(torch, stored)) for n, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE_LOADING, str(tmp_path), wanted]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.3


def test_saved_models_load_again(checkpoint, tmp_path):
    model = load_model(checkpoint, torch.bfloat16)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.lm_head.weight.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


# ------------------------------------------------------------------------------------------------------ forward


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


# --------------------------------------------------------------------------------------------------- generation


def test_a_row_guesses_what_came_next_where_its_last_tokens_stood_before():
    def guess(ids, most=4):
        row = Row(0, ids)
        row.look_up(most)
        return row.guess

    assert guess([1, 2, 3, 4]) == []
    assert guess([1, 2, 3, 4, 5, 6, 9, 3]) == [4, 5, 6, 9]
    assert guess([1, 2, 3, 4, 7, 2, 3, 5, 8, 1, 2, 3], 2) == [4, 7]  # three tokens alike count before two
    assert guess([3, 4, 8, 3, 5, 8, 3], 2) == [5, 8]  # the place that is nearest
    assert guess([9, 1, 2, 1, 2]) == [1, 2, 1, 2] and guess([7, 7]) == [7, 7, 7, 7]  # a repetition goes on
    assert guess([1, 2, 1], 0) == []


@torch.no_grad()
def test_guesses_save_steps_and_change_nothing(llama):
    model = load_model(llama)
    prompts, passes = [[5, 6, 7], list(range(10, 40))], []
    handle = model.register_forward_hook(lambda *given: passes.append(1))
    produced = generate(model, prompts, 60)
    assert len(passes) < 40  # of 62 without
    handle.remove()
    for prompt, new in zip(prompts, produced, strict=True):
        ids = torch.tensor([prompt + new])
        assert model.lm_head(model(ids))[0].argmax(-1).tolist()[len(prompt) - 1 : -1] == new
        assert generate(model, [prompt], 60, stop=lambda ids: len(ids) == 41) == [new[:41]]


def test_generation_with_the_cache_equals_generation_without(checkpoint):
    model = load_model(checkpoint)
    prompts = [[5, 6, 7], list(range(10, 40)), [300, 301], list(range(40, 67)), list(range(70, 102))]
    produced = generate(model, prompts, max_new_tokens=12)
    for prompt, new in zip(prompts, produced, strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model.lm_head(model(torch.tensor([ids]))[0, -1]).argmax()))
        assert new == ids[len(prompt) :]
    passes = []
    handle = model.register_forward_hook(lambda *given: passes.append(1))
    assert generate(model, prompts, 2) == [new[:2] for new in produced]
    assert len(passes) == 3  # the three long prompts are read at once, so are the two short ones; all go on together
    handle.remove()
    stop = produced[1][4]
    assert generate(model, prompts, 12, stop_ids=[stop])[1] == produced[1][: produced[1].index(stop)]
