"""Adapters as files, in peft's format: adapter_config.json, adapter_model.safetensors, and that the two agree."""

import functools
import re
from pathlib import Path

import pyarrow.compute
from torch import nn

from support.checkpoint import check_known, find_folder, open_safetensors, pickled, stored_in, write_tensors
from support.files import check, is_count, is_number, read_json, told

ADAPTER_FILES = ["adapter_config.json", "adapter_model.*", "run.json"]
PREFIX = "base_model.model."


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
    """An adapter's rank, alpha, dropout, and {layer: (A, B)}. linears: the base's layers that can be adapted, by name.

    UserError, by name, for a tensor missing, left over or of another shape, and for what is not implemented of peft.
    """
    config = {"peft_type": None} | read_json(folder / "adapter_config.json")
    check_known(folder, config, "adapter_config.json")
    rank, alpha, rate = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    check(is_count(rank), f"{folder}: r is {rank!r}, not a whole number above 0")
    check(is_number(alpha), f"{folder}: lora_alpha is {alpha!r}, not a number")
    check(is_number(rate) and 0 <= rate < 1, f"{folder}: lora_dropout is {rate!r}, not a number in [0, 1)")

    layers, expected = sorted(described_layers(config, linears, folder)), {}
    for name in layers:
        expected[f"{PREFIX}{name}.lora_A.weight"] = [rank, linears[name].in_features]
        expected[f"{PREFIX}{name}.lora_B.weight"] = [linears[name].out_features, rank]
    path = folder / "adapter_model.safetensors"
    stored = stored_in(path)
    for name in stored:
        check(name in expected, f"{path}: {name} has no place in the layers that target_modules names")
    missing = sorted(expected.keys() - stored)
    check(not missing, f"{path}: {len(missing)} of {len(expected)} tensors are missing: {missing[:1]}")
    check(stored, f"{path} has no tensors")
    for name, shape in expected.items():
        check(stored[name].shape == shape, f"{path}: {name} has shape {stored[name].shape}, not {shape}")
    read = open_safetensors(path).get_tensor
    factors = {name: tuple(read(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB") for name in layers}
    return rank, alpha, rate, factors


def matching(given: list[str] | str, names: list[str], folder: Path) -> set[str]:
    """Those of `names` that peft means by `given`: ends of names, or a pattern of a whole name."""
    if isinstance(given, list):
        ends = tuple(f".{end}" for end in given)
        return {name for name in names if f".{name}".endswith(ends)}
    with told(f"{folder}: {given[:60]!r} is no pattern that can be matched here"):
        re.compile(given)  # peft's language; RE2, which knows most of it, needs no longer for any pattern
        found = pyarrow.compute.match_substring_regex(pyarrow.array(names, "string"), f"^(?:{given})$")
    return {name for name, matched in zip(names, found.to_pylist(), strict=True) if matched}


def described_layers(config: dict, linears: dict[str, nn.Linear], folder: Path) -> set[str]:
    """The layers that an adapter's config says it adapts, as peft reads it."""
    for key, kind in {"target_modules": str, "exclude_modules": str, "layers_to_transform": int}.items():
        value, what = config.get(key), "names" if kind is str else "numbers"
        listed = isinstance(value, list) and all(isinstance(one, kind) for one in value)
        check(listed or isinstance(value, kind | None), f"{folder}: {key} is {value!r}, not {what}")
    targets, only = config.get("target_modules") or [], config.get("layers_to_transform")
    names = [*linears, "lm_head", "model.embed_tokens"]
    found = set(linears) if targets == "all-linear" else matching(targets, names, folder)
    check(found <= linears.keys(), f"{folder}: target_modules names the head or the embedding")
    found -= matching(config.get("exclude_modules") or [], names, folder)
    if isinstance(targets, list) and only not in (None, []):
        numbers = only if isinstance(only, list) else [only]
        found = {name for name in found if name in targets or int(name.split(".")[2]) in numbers}
    return found
