"""Checkpoints: both config dialects, shards, dtypes, and what is refused by name."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import edit_json, make_checkpoint, to_old_dialect
from safetensors.torch import load_file, save_file

from model import load_model, read_config
from support import checkpoint
from support.checkpoint import save_model
from support.files import UserError


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


@pytest.mark.parametrize(
    "stored, wanted",
    [
        pytest.param("float32", "bfloat16", marks=pytest.mark.slow),
        ("bfloat16", "bfloat16"),
        pytest.param("bfloat16", "float32", marks=pytest.mark.slow),
    ],
)
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
