"""LoRA against its formula in float64, and what is promised about base weights, merging and files."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import edit_json, make_checkpoint
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from lora import (
    TARGETS,
    LoRALinear,
    add_lora,
    disabled,
    load_adapter,
    lora_layers,
    merge,
    new_adapters,
    remove_lora,
    replaced,
    save_adapter,
)
from model import load_model
from support import ranks
from support.files import UserError

IDS = torch.arange(2, 42).view(2, 20)


def adapted(checkpoint, dtype=torch.float32, **settings):
    """A model with adapters that do something: B is not zero."""
    torch.manual_seed(3)
    model = add_lora(load_model(checkpoint, dtype), **({"rank": 4, "alpha": 6, "dropout": 0.1} | settings))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def test_forward_is_wx_plus_b_plus_the_scaled_low_rank_update():
    layer = LoRALinear(nn.Linear(12, 7), rank=3, alpha=5, dropout=0.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 12)
    w, b, A, B = (t.detach().double() for t in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
    expected = x.double() @ w.T + b + 5 / 3 * (x.double() @ A.T @ B.T)
    assert (layer(x) - expected).abs().max() < 1e-5


def test_dropout_falls_on_the_adapters_input_only_and_keeps_its_expectation():
    layer = LoRALinear(nn.Linear(10, 6, bias=False), rank=2, alpha=2, dropout=0.25).train()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 10).expand(20_000, 10)
    with torch.no_grad():
        plain, dropped = nn.functional.linear(x, layer.weight), layer(x)
        spread = (dropped - plain).std(dim=0) / 20_000**0.5
        assert ((dropped.mean(0) - layer.eval()(x)[0]).abs() < 5 * spread).all()
        layer.lora_B.zero_()
        assert torch.equal(layer.train()(x), plain)


def test_layers_that_read_the_same_input_drop_the_same_elements_of_it(checkpoint):
    layers = lora_layers(adapted(checkpoint, dropout=0.5).train())
    attention = [layers[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")]
    x = torch.randn(1, 9, 48)
    torch.manual_seed(1)
    together = [layer(x) for layer in attention]
    for layer, expected in zip(attention, together, strict=True):
        torch.manual_seed(1)
        assert torch.equal(layer(x.clone()), expected)
    assert not torch.equal(attention[0](x.clone()), together[0])  # another input, another draw


def test_defaults_are_appendix_a3_on_all_seven_projections(checkpoint):
    model = add_lora(load_model(checkpoint, torch.bfloat16))
    layers = lora_layers(model)
    assert len(layers) == 3 * len(TARGETS) == 21
    for layer in layers.values():
        assert (layer.rank, layer.alpha, layer.dropout) == (64, 16, 0.1)
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}


def test_a_new_adapter_is_drawn_as_pefts(llama):
    ours = lora_layers(add_lora(load_model(llama), rank=200))["model.layers.0.self_attn.q_proj"].lora_A
    peer = AutoModelForCausalLM.from_pretrained(llama)
    peer = get_peft_model(peer, LoraConfig(r=200, target_modules=["q_proj"])).base_model.model
    theirs = peer.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    for drawn in (ours, theirs):  # uniform within 1 / sqrt(in)
        assert drawn.abs().max().item() == pytest.approx(48**-0.5, rel=0.01)
        assert drawn.std().item() == pytest.approx((3 * 48) ** -0.5, rel=0.05)


@pytest.mark.parametrize("part", [0, 3])
def test_ranks_draw_the_same_adapters_and_a_dropout_of_their_own(llama, monkeypatch, part):
    args = SimpleNamespace(seed=7, lora_rank=2, lora_alpha=4, lora_dropout=0.1)
    drawn, next_numbers = [], []
    for rank in (0, 1, 2, 0):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        new_adapters(model := load_model(llama), args, part)
        drawn.append(torch.cat([layer.lora_A.flatten() for layer in lora_layers(model).values()]))
        next_numbers.append(torch.rand(1).item())
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    assert len(set(next_numbers)) == 3 and next_numbers[0] == next_numbers[3]


def test_names_do_not_change_when_adapters_come_and_go(checkpoint):
    model = load_model(checkpoint)
    before, out = dict(model.named_parameters()), model(IDS)
    add_lora(model, rank=2)
    assert before.items() <= dict(model.named_parameters()).items()
    assert torch.equal(model(IDS), out)  # B = 0
    remove_lora(model)
    assert list(before) == [name for name, _ in model.named_parameters()] and not lora_layers(model)
    assert torch.equal(model(IDS), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_gives_the_base_model_back_bit_for_bit(checkpoint, dtype):
    base = load_model(checkpoint, dtype)(IDS)
    model = adapted(checkpoint, dtype).train()
    with torch.no_grad():
        with disabled(model):
            assert torch.equal(model(IDS), base)
        assert not torch.equal(model(IDS), base)
        with pytest.raises(RuntimeError), disabled(model):
            raise RuntimeError
        assert not torch.equal(model(IDS), base)  # adapters are back, whatever happened


def test_replaced_uses_the_given_factors_and_no_dropout(checkpoint):
    model, other = adapted(checkpoint).train(), adapted(checkpoint).eval()
    for layer in lora_layers(other).values():
        layer.lora_A.data.mul_(1.7)
    low_rank = [(layer.lora_A, layer.lora_B) for layer in lora_layers(other).values()]
    dense = [(layer.product(),) for layer in lora_layers(other).values()]
    with torch.no_grad():
        expected = other(IDS)
        with replaced(model, low_rank):
            assert torch.equal(model(IDS), expected)
        with replaced(model, dense):
            assert (model(IDS) - expected).abs().max() < 1e-4


def test_merging_adds_in_float32_and_rounds_once(checkpoint):
    model = adapted(checkpoint, torch.bfloat16)
    expected = {
        name: (layer.weight.double() + 6 / 4 * layer.lora_B.double() @ layer.lora_A.double())
        for name, layer in lora_layers(model).items()
    }
    merge(model)
    assert not lora_layers(model)
    for name, weight in expected.items():
        merged = model.get_submodule(name).weight
        assert merged.dtype == torch.bfloat16
        error = (merged.double() - weight).abs() / weight.abs().clamp(min=1e-3)
        assert error.max() < 2**-8 * 1.01, name  # half a unit in bfloat16's last place


def test_saved_adapters_load_again_bit_for_bit(checkpoint, tmp_path):
    model = adapted(checkpoint, targets=["q_proj", "model.layers.1.mlp.up_proj"])
    model.revision = "v2"
    save_adapter(model, tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).revision == "v2"  # what base peft is to load
    again = load_adapter(load_model(checkpoint), tmp_path)
    assert lora_layers(again).keys() == lora_layers(model).keys() and len(lora_layers(again)) == 4
    assert torch.equal(again(IDS), model.eval()(IDS))
    save_adapter(adapted(checkpoint, rank=2), tmp_path / "other")
    assert lora_layers(load_adapter(again, tmp_path / "other"))["model.layers.0.self_attn.q_proj"].rank == 2


WRONG_ADAPTERS = {
    "use_dora": lambda config, tensors: config.update(use_dora=True),
    "alora_invocation_tokens": lambda config, tensors: config.update(alora_invocation_tokens=[5]),
    "init_lora_weights 'pissa'": lambda config, tensors: config.update(init_lora_weights="pissa"),
    "lora_alpha is None": lambda config, tensors: config.pop("lora_alpha"),
    "lora_A.bias has no place": lambda config, tensors: tensors.update(
        {"base_model.model.model.layers.0.mlp.up_proj.lora_A.bias": torch.ones(4)}
    ),
    "rank_pattern": lambda config, tensors: config.update(rank_pattern={"q_proj": 2}),
    "bias 'all'": lambda config, tensors: config.update(bias="all"),
    "peft_type 'IA3'": lambda config, tensors: config.update(peft_type="IA3"),
    "has shape": lambda config, tensors: config.update(r=5),
    "1 of 42 tensors are missing": lambda config, tensors: tensors.pop(
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    ),
    "lm_head.lora_A.weight has no place": lambda config, tensors: tensors.update(
        {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 48)}
    ),
    "model.x.lora_A.weight has no place": lambda config, tensors: tensors.update(
        {"base_model.model.x.lora_A.weight": torch.ones(1)}
    ),
}


@pytest.mark.parametrize("message", WRONG_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused_by_name(llama, tmp_path, message):
    save_adapter(adapted(llama), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    edit_json(tmp_path / "adapter_config.json", lambda config: WRONG_ADAPTERS[message](config, tensors))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        load_adapter(load_model(llama), tmp_path)


def test_an_adapter_of_another_base_is_refused(llama, tmp_path):
    save_adapter(adapted(make_checkpoint(tmp_path / "wider", "llama", hidden_size=96)), tmp_path)
    with pytest.raises(UserError, match="has shape"):
        load_adapter(load_model(llama), tmp_path)


def test_arguments_that_cannot_work_are_refused(llama):
    for settings in ({"rank": 0}, {"dropout": 1.0}, *({"targets": ["q_proj", name]} for name in ("proj", "lm_head"))):
        with pytest.raises(UserError):
            add_lora(load_model(llama), **settings)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(add_lora(load_model(llama)))


def test_merge_writes_a_folder_with_the_tokenizer(llama, tmp_path):
    model = adapted(llama).eval()
    expected = model(IDS)
    merge(model, tmp_path / "merged")
    assert (load_model(tmp_path / "merged")(IDS) - expected).abs().max() < 1e-4
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (llama / file).read_bytes()
    shutil.rmtree(tmp_path / "merged")


@pytest.mark.parametrize("named", [None, 7, [7, 9], 1])
def test_a_merged_model_ends_where_it_was_trained_to_end(llama, tmp_path, named):
    folder = shutil.copytree(llama, tmp_path / "base")
    edit_json(folder / "generation_config.json", lambda config: config.update(eos_token_id=named, temperature=0.5))
    merge(adapted(folder), tmp_path / "merged")
    theirs = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert theirs.eos_token_id == {None: 1, 7: [7, 1], 1: 1}.get(
        named if isinstance(named, int | None) else 0, [7, 9, 1]
    )
    assert theirs.temperature == 0.5
    (folder / "generation_config.json").unlink()
    merge(adapted(folder), tmp_path / "again")  # then config.json says it
    assert GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == 1


@pytest.mark.parametrize("stored, merged", [("bfloat16", None), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_what_rounding_makes_of_a_merged_update_is_measured(llama, tmp_path, stored, merged):
    model = adapted(llama, getattr(torch, stored))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.mul_(1e-3)  # as after a short run: most of it is below a bfloat16 weight's last digit
    base = {name: layer.weight.double() for name, layer in lora_layers(model).items()}
    update = {name: layer.product().double() * 6 / 4 for name, layer in lora_layers(model).items()}
    error = merge(model, tmp_path, getattr(torch, merged) if merged else None).merge_error
    held = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {getattr(torch, merged or stored)}
    lost = sum(((held[f"{name}.weight"] - base[name] - update[name]) ** 2).sum() for name in base)
    expected = (lost / sum((u**2).sum() for u in update.values())).sqrt()
    assert error == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)
    assert error < 1e-2 if merged == "float32" else error > 0.3
    assert load_model(tmp_path).lm_head.weight is not None


def test_a_loaded_adapter_trains_on_with_the_dropout_that_it_was_trained_with(llama, tmp_path):
    save_adapter(adapted(llama, dropout=0.5), tmp_path)
    model = load_adapter(load_model(llama), tmp_path)
    assert {layer.dropout for layer in lora_layers(model).values()} == {0.5}
    layer = next(iter(lora_layers(model).values())).train()
    x = torch.ones(400, layer.in_features)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(layer.rank, layer.in_features))
        layer.lora_B.copy_(torch.eye(layer.out_features, layer.rank))
        dropped = layer(x)[:, : layer.rank].eq(0).float().mean()
    assert dropped.item() == pytest.approx(0.5, abs=0.05)
