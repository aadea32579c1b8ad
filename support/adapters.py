"""Adapters as files, in peft's format: adapter_config.json, adapter_model.safetensors, and that the two agree."""

import functools
import re
from pathlib import Path

import pyarrow.compute
from torch import nn

from support.checkpoint import find_folder, is_off, open_safetensors, pickled, stored_in, write_tensors
from support.files import check, is_count, is_number, read_json, told

ADAPTER_FILES = ["adapter_config.json", "adapter_model.*", "run.json"]
PREFIX = "base_model.model."
# Keys of adapter_config.json that are read here, or change nothing
KNOWN_KEYS = """
peft_type bias r lora_alpha lora_dropout init_lora_weights target_modules exclude_modules layers_to_transform
layers_pattern task_type auto_mapping peft_version base_model_name_or_path revision inference_mode megatron_core
qalora_group_size runtime_config ensure_weight_tying fan_in_fan_out loftq_config eva_config corda_config lora_ga_config
""".split()


def find_adapter(name_or_path) -> Path:
    """The folder of an adapter, local or on the hub. UserError, with what to do, if it cannot be read."""
    folder = find_folder(name_or_path, ADAPTER_FILES)
    model = ", but config.json: a whole model goes to --model" if (folder / "config.json").exists() else ""
    check((folder / "adapter_config.json").exists(), f"{name_or_path} has no adapter_config.json{model}")
    weights, old = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    convert = f"save_file(torch.load('{old}', weights_only=True), '{weights}')"
    how = pickled(old, f"import torch; from safetensors.torch import save_file; {convert}")
    check(weights.exists() or not old.exists(), f"{name_or_path} has {how}")
    return folder


write_adapter = functools.partial(write_tensors, prefix="adapter_")  # (folder, tensors, config)


def write_factors(folder, factors: dict[str, tuple], linears: dict[str, nn.Linear], settings: dict):
    """Write an adapter, {layer: (A, B)}, as peft does. linears: as `read_adapter`'s; settings: what else is known."""
    leaves = sorted({name.rpartition(".")[2] for name in factors})
    whole = all(name in factors for name in linears if name.rpartition(".")[2] in leaves)
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    parts = [(f"{name}.lora_{part}", x) for name, pair in factors.items() for part, x in zip("AB", pair, strict=True)]
    tensors = {f"{PREFIX}{name}.weight": tensor.detach().contiguous() for name, tensor in parts}
    write_adapter(Path(folder), tensors, fixed | settings | {"target_modules": leaves if whole else sorted(factors)})


def read_adapter(folder: Path, linears: dict[str, nn.Linear]) -> tuple[int, float, float, dict[str, tuple]]:
    """An adapter's rank, alpha, dropout, and {layer: (A, B)}, from a folder that we or peft wrote.

    linears: the base model's layers that can be adapted, by their dotted names. UserError names a tensor that is
    missing, left over or of another shape, and a setting that matters and is not implemented.
    """
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    kind, bias, drawn = config.get("peft_type"), config.get("bias", "none"), config.get("init_lora_weights", True)
    rank, alpha, rate = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    check(kind == "LORA" and bias == "none", f"{folder}: peft_type {kind}, bias {bias} is not plain LoRA")
    check(is_count(rank), f"{folder}: r is {rank!r}, not a whole number above 0")
    check(is_number(alpha), f"{folder}: lora_alpha is {alpha!r}, not a number")
    check(is_number(rate) and 0 <= rate < 1, f"{folder}: lora_dropout is {rate!r}, not a number in [0, 1)")
    plain = drawn in (True, False, None, "gaussian")  # the others change the base too
    check(plain, f"{folder}: init_lora_weights {drawn!r} is not implemented")
    for key in sorted(config.keys() - KNOWN_KEYS):
        value = config[key]
        check(is_off(value), f"{folder}: {key} is not implemented, and may change the result; it is {value!r}")

    stored, expected = stored_in(path), {}
    found = {name.removeprefix(PREFIX).rpartition(".lora_")[0]: name for name in stored}
    for target in sorted(found):
        check(target in linears, f"{path}: {found[target]} adapts no linear layer of this decoder")
        expected[f"{PREFIX}{target}.lora_A.weight"] = [rank, linears[target].in_features]
        expected[f"{PREFIX}{target}.lora_B.weight"] = [linears[target].out_features, rank]
    named = described_layers(config, linears, folder)
    named = set(found) if named is None else named
    more, missing = found.keys() - named, named - found.keys()
    check(not more, f"{path} has tensors for {min(more, default='')}, which target_modules does not name")
    of = f"{len(missing)} of the {len(named)} layers that target_modules names, such as {min(missing, default='')}"
    check(found and not missing, f"{path} has no tensors for {of}: it is not whole")
    for name in sorted(expected.keys() | stored.keys()):
        check(name in stored, f"{path}: {name} is missing")
        check(name in expected, f"{path}: tensor {name} has no place in a plain LoRA adapter")
        shape = stored[name].shape
        check(shape == expected[name], f"{path}: {name} has shape {shape}, not {expected[name]}")
    read, parts = open_safetensors(path).get_tensor, ("lora_A", "lora_B")
    factors = {target: tuple(read(f"{PREFIX}{target}.{part}.weight") for part in parts) for target in sorted(found)}
    return rank, alpha, rate, factors


def described_layers(config: dict, linears: dict[str, nn.Linear], folder: Path) -> set[str] | None:
    """The layers that an adapter's config names, as peft reads it; None if it has no target_modules."""

    def matching(key: str, among=tuple(linears)) -> set[str]:
        given = config.get(key) or []
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            return {name for name in among if f".{name}".endswith(tuple(f".{end}" for end in given))}
        check(isinstance(given, str), f"{folder}: {key} is {given!r}, not names")
        with told(f"{folder}: {given[:60]!r} is no pattern that can be matched here"):
            re.compile(given)  # peft's language; RE2 knows most of it, and no pattern takes it long
            found = pyarrow.compute.match_substring_regex(pyarrow.array(among, "string"), f"^(?:{given})$")
        return {name for name, matched in zip(among, found.to_pylist(), strict=True) if matched}

    pattern, only, whole = map(config.get, ("layers_pattern", "layers_to_transform", "target_modules"))
    check(pattern in (None, [], ["layers"], "layers"), f"{folder}: layers_pattern {pattern!r} is not of this decoder")
    only = [only] if isinstance(only, int) else only or []
    numbers = isinstance(only, list) and all(isinstance(number, int) for number in only)
    check(numbers, f"{folder}: layers_to_transform is {only!r}, not numbers")
    if whole in (None, "all-linear"):
        return whole and set(linears) - matching("exclude_modules")
    more = matching("target_modules", ("lm_head", "model.embed_tokens"))
    check(not more, f"{folder}: target_modules names the head or the embedding, which are not adapted here")
    found = matching("target_modules") - matching("exclude_modules")
    if only and isinstance(whole, list):
        found = {name for name in found if name in whole or int(name.split(".")[2]) in only}
    return found
