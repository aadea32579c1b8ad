"""Checkpoints: both config dialects, shards, dtypes, and what is refused by name."""

import itertools
import json
import shlex
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from conftest import edit_json, make_model, to_old_dialect
from hub import run_python, serve
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_shared
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lora
from model import load_model, read_config
from support import checkpoint, files
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
    "full_attention": {"rope_parameters": {"full_attention": {"rope_type": "default"}, "rope_theta": 1e4}},
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
    if "llama" in json.loads((checkpoint / "config.json").read_text())["model_type"]:
        with pytest.raises(UserError, match="sliding-window"):  # transformers' cache of a Llama has a window then
            read_config(tmp_path)
    else:
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
    with torch.device("meta"):
        model = make_model(tmp_path, "llama", num_attention_heads=16, **wide).to(getattr(torch, stored))
    tensors = {name: torch.ones_like(parameter, device="cpu") for name, parameter in model.named_parameters()}
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


# ------------------------------------------------------------------------------ folders as other programs leave them

TOKENS = torch.arange(2, 22)[None]


def edit_file(path, change):
    """Rewrite a safetensors file by `change`, a function that edits its tensors in place."""
    held = load_file(path)
    change(held)
    save_file(held, path)


def as_transformers_reads_it(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def as_we_do(folder):
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        return model.lm_head(model(TOKENS))


def test_a_tied_model_may_be_stored_under_either_name(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")
    save_shared(AutoModelForCausalLM.from_pretrained(folder), folder / "model.safetensors", metadata={"format": "pt"})
    assert list(filter(lambda name: "embed" in name or "head" in name, load_file(folder / "model.safetensors"))) == [
        "lm_head.weight"
    ]
    assert torch.equal(as_we_do(folder), as_we_do(llama))
    assert (as_we_do(folder) - as_transformers_reads_it(folder)).abs().max() < 1e-4
    edit_json(folder / "config.json", lambda config: config.pop("dtype"))
    assert load_model(folder).lm_head.weight.dtype == torch.float32  # as it is stored, under that name


def test_a_whole_file_beside_an_index_is_what_transformers_reads(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    files.note.cache_clear()
    found = as_we_do(folder)
    assert (found - as_transformers_reads_it(folder)).abs().max() < 1e-3
    assert not torch.allclose(found, as_we_do(checkpoint))
    assert "has model.safetensors, which is read, and model-00001-of-" in capsys.readouterr().err
    for shard in folder.glob("model-*-of-*.safetensors"):  # what is left when a merged model is saved over a copy
        shard.unlink()
    assert torch.equal(as_we_do(folder), found)


def test_links_into_another_folder_are_followed(checkpoint, tmp_path):
    folder, elsewhere = shutil.copytree(checkpoint, tmp_path / "copy"), tmp_path / "blobs"
    elsewhere.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(elsewhere / f"{number}")
        file.symlink_to(elsewhere / f"{number}")
    assert torch.equal(as_we_do(folder), as_we_do(checkpoint))


def test_the_dtype_auto_is_the_one_that_is_stored(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")
    edit_json(folder / "config.json", lambda config: config.update(torch_dtype="auto", dtype=None))
    assert load_model(folder).lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("missing", ["the shards' index", "everything"])
def test_weights_in_no_form_that_is_read_are_refused_with_what_to_do(checkpoint, tmp_path, missing):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "model.safetensors.index.json").unlink()
    if missing == "everything":
        for shard in folder.glob("*.safetensors"):
            shard.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(UserError, match="only pytorch_model.bin.*AutoModelForCausalLM as M; M.from_pretrained"):
            load_model(folder)
    else:
        with pytest.raises(UserError, match="has no model.safetensors; give a checkpoint"):
            load_model(folder)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# each key that the three configuration classes have, older ones and some of others' -> values that are not its default
KEYS = {
    **{key: [16] for key in ("vocab_size", "hidden_size", "intermediate_size")},
    **{key: [2, 4, 32] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")},
    **{key: [True] for key in ("attention_bias", "mlp_bias", "tie_word_embeddings", "is_encoder_decoder")},
    **{key: [1] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "chunk_size_feed_forward")},
    **{key: [True] for key in ("output_attentions", "output_hidden_states", "torchscript", "is_decoder")},
    **{key: [False] for key in ("use_cache", "is_causal")},
    "_name_or_path": ["who/else"],
    "_model_name_or_path": ["as a GGUF file calls it"],
    "architectures": [["LlamaModel"], None],
    "attention_chunk_size": [4],
    "attention_dropout": [0.5, None],
    "dtype": ["float16", "int8"],
    "hidden_act": ["gelu"],
    "id2label": [{"0": "a"}],
    "initializer_range": [0.5],
    "label2id": [{"a": 0}],
    "layer_types": [["sliding_attention"] * 3, ["full_attention"] * 3, "full_attention"],
    "max_position_embeddings": [8, 4096],
    "max_window_layers": [0],
    "model_type": ["mistral", "qwen2"],
    "original_max_position_embeddings": [8],
    "partial_rotary_factor": [0.5],
    "pretraining_tp": [2],
    "problem_type": ["regression"],
    "return_dict": [True],  # without which transformers itself gives no logits
    "rms_norm_eps": [0.1],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 77.0}, LLAMA3, LLAMA3 | {"mscale": 2.0}, YARN],
    "rope_scaling": [{"rope_type": "default", "rope_theta": 77.0}, LLAMA3, LLAMA3 | {"rope_theta": 77.0}, YARN, {}],
    "rope_theta": [77.0],
    "sliding_window": [4],
    "temperature": [0.5],
    "torch_dtype": ["float16"],
    "transformers_version": ["4.0.0"],
    "use_bidirectional_attention": [True],
    "use_sliding_window": [True],
}


@pytest.fixture(scope="module")
def changed(checkpoint, tmp_path_factory):
    """A copy of a checkpoint, and how its config.json reads."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("changed") / "model")
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("key", KEYS)
def test_each_key_of_config_json_computes_what_transformers_computes_or_is_refused(changed, key):
    folder, config = changed
    assert CONFIG_MAPPING[config["model_type"]]().to_dict().keys() <= KEYS.keys() | {"rope_parameters"}
    for value, theta in itertools.product(KEYS[key], [None, 300.0][: 1 + ("rope_" in key)]):
        said = config | {key: value} | ({"rope_theta": theta} if theta else {})
        (folder / "config.json").write_text(json.dumps(said))
        try:
            ours = as_we_do(folder)
        except UserError as reason:
            assert key not in ("rope_theta", "rms_norm_eps", "use_cache", "pretraining_tp"), reason
            continue
        assert (ours - as_transformers_reads_it(folder)).abs().max() < 1e-3, value


def test_what_is_refused_of_config_json_is_what_is_neither_known_nor_off(llama, tmp_path):
    shutil.copy(llama / "config.json", tmp_path)
    for value in (None, False, 0, "", [], {}):
        edit_json(tmp_path / "config.json", lambda config, value=value: config.update(something_new=value))
        assert read_config(tmp_path).vocab_size == 400
    for value in (True, 1, 0.5, "a", [0], {"a": None}):
        edit_json(tmp_path / "config.json", lambda config, value=value: config.update(something_new=value))
        with pytest.raises(UserError, match="something_new .* is not implemented"):
            read_config(tmp_path)


# ---------------------------------------------------------------------------------- adapters and what they say of it

ALL = set(lora.TARGETS)
# what adapter_config.json says, beside lists of q_proj and v_proj: the names of the layers that it means
STATISTICS = {
    "a list": ({"target_modules": ["q_proj", "v_proj"]}, lambda layer, name: name in ("q_proj", "v_proj")),
    "names that are not there": ({"target_modules": ["q_proj", "query"]}, lambda layer, name: name == "q_proj"),
    "all-linear": ({"target_modules": "all-linear"}, lambda layer, name: name in ALL),
    "a pattern": ({"target_modules": r".*\.(q|v)_proj"}, lambda layer, name: name in ("q_proj", "v_proj")),
    "some layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        lambda layer, name: name == "q_proj" and layer != 1,
    ),
    "one layer": (
        {"target_modules": ["o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        lambda layer, name: name == "o_proj" and layer == 1,
    ),
    "all but": (
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        lambda layer, name: name == "q_proj",
    ),
    "a whole name": (
        {"target_modules": ["model.layers.1.self_attn.q_proj"]},
        lambda layer, name: name == "q_proj" and layer == 1,
    ),
}


@pytest.mark.parametrize("form", STATISTICS)
def test_what_an_adapter_says_of_itself_is_read_as_peft_reads_it(llama, tmp_path, form):
    said, meant = STATISTICS[form]
    base = AutoModelForCausalLM.from_pretrained(llama)
    peft.get_peft_model(base, peft.LoraConfig(r=4, **said)).save_pretrained(tmp_path)
    model = lora.load_adapter(load_model(llama), tmp_path)
    found = {tuple(name.split(".")[2::2]) for name in lora.lora_layers(model)}
    assert found and found == {(str(i), name) for i in range(3) for name in ALL if meant(i, name)}
    edit_file(tmp_path / "adapter_model.safetensors", lambda held: [held.pop(k) for k in sorted(held)[:2]])
    with pytest.raises(UserError, match=f"2 of {2 * len(found)} tensors are missing"):
        lora.load_adapter(load_model(llama), tmp_path)


SAYS = {
    "use_something_new .* is not implemented": {"use_something_new": True},
    "megatron_config .* is not implemented": {"megatron_config": {"a": 1}},
    "lora_bias .* is not implemented": {"lora_bias": True},
    "mlp.down_proj.lora_A.weight has no place": {"target_modules": ["q_proj", "k_proj"]},
    "target_modules names the head": {"target_modules": [*lora.TARGETS, "lm_head"]},
    "target_modules is 7, not names": {"target_modules": 7},
    "has no place": {"target_modules": ".?" * 40 + "x"},  # each of these took hours, or longer than anyone lives
    "has no place in": {"target_modules": "(a|a)*" * 40 + "(.+)+b"},
    "has no place in the": {"exclude_modules": ".*" * 9},
    "matched here: missing": {"target_modules": "("},
    "matched here: Invalid regular expression": {"target_modules": "(?=.*q_proj)"},
    "layers_pattern .* is not implemented": {"layers_pattern": ["h"], "layers_to_transform": [0]},
    "layers_to_transform is 'all'": {"layers_to_transform": "all"},
}


@pytest.mark.parametrize("words", SAYS)
def test_an_adapter_that_says_something_else_than_it_holds_is_refused(llama, tmp_path, words):
    lora.save_adapter(lora.add_lora(load_model(llama), rank=4), tmp_path)
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(SAYS[words]))
    with pytest.raises(UserError, match=words):
        lora.load_adapter(load_model(llama), tmp_path)


def test_what_peft_leaves_switched_off_is_no_matter(llama, tmp_path):
    lora.save_adapter(lora.add_lora(load_model(llama), rank=4), tmp_path)
    off = {"use_new": False, "new_config": None, "new_list": [], "new_map": {}, "fan_in_fan_out": True}
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(off))
    assert len(lora.lora_layers(lora.load_adapter(load_model(llama), tmp_path))) == 21


def test_adapters_of_some_layers_say_which(llama, tmp_path):
    model = lora.add_lora(load_model(llama), rank=4, targets=["layers.0.self_attn.q_proj", "v_proj"])
    lora.save_adapter(model, tmp_path)
    assert lora.lora_layers(lora.load_adapter(load_model(llama), tmp_path)).keys() == lora.lora_layers(model).keys()
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == 4


def test_a_pickled_adapter_is_refused_with_a_command_that_converts_it(llama, tmp_path):
    lora.save_adapter(lora.add_lora(load_model(llama), rank=4), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    expected = load_file(path)
    path.unlink()
    with pytest.raises(UserError, match="only adapter_model.bin: pickled weights can run any program") as refused:
        lora.load_adapter(load_model(llama), tmp_path)
    command = shlex.split(str(refused.value).partition("If you trust it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert load_file(path).keys() == expected.keys()
    lora.load_adapter(load_model(llama), tmp_path)


LOAD_ADAPTER = """
import sys, lora, model
print(len(lora.lora_layers(lora.load_adapter(model.load_model(sys.argv[1].split()[1]), sys.argv[1].split()[0]))))
"""


@pytest.mark.slow
def test_adapters_come_from_the_hub_too_and_are_no_models(llama, tmp_path):
    lora.save_adapter(lora.add_lora(load_model(llama), rank=4), tmp_path / "adapter")
    with serve({("model", "who/adapter", "main"): tmp_path / "adapter"}, tmp_path / "cache") as (environment, _):
        found = run_python(LOAD_ADAPTER, f"who/adapter {llama}", environment)
        assert found.stdout == "21\n", found.stderr
        refused = run_python("import sys, model; model.load_model(sys.argv[1])", "who/adapter", environment)
        assert f"who/adapter is an adapter of {llama}, no whole model: give --model {llama}" in refused.stderr
