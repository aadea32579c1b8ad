"""Adapters as files, in peft's format: adapter_config.json, adapter_model.safetensors, and that the two agree."""

import functools
import re
from pathlib import Path

import pyarrow.compute
from torch import nn

from support.checkpoint import find_folder, is_off, open_safetensors, stored_in, write_tensors
from support.files import UserError, check, is_count, is_number, read_json, told

ADAPTER_FILES = ["adapter_config.json", "adapter_model.*", "run.json"]
PREFIX = "base_model.model."
# Keys of adapter_config.json that are read here, or change nothing where those are as they are checked to be
KNOWN_KEYS = """
peft_type bias r lora_alpha lora_dropout init_lora_weights target_modules exclude_modules layers_to_transform
layers_pattern task_type auto_mapping peft_version base_model_name_or_path revision inference_mode megatron_core
qalora_group_size runtime_config ensure_weight_tying fan_in_fan_out loftq_config eva_config corda_config lora_ga_config
""".split()


def find_adapter(name_or_path) -> Path:
    """The folder of an adapter, local or on the hub; UserError, with what to do, where none can be read."""
    folder = find_folder(name_or_path, ADAPTER_FILES)
    weights, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not (folder / "adapter_config.json").exists():
        model = ", but config.json: a whole model goes to --model" if (folder / "config.json").exists() else ""
        raise UserError(f"{name_or_path} has no adapter_config.json{model}")
    if not weights.exists() and pickled.exists():
        convert = f"save_file(torch.load('{pickled}', weights_only=True), '{weights}')"
        how = f'python -c "import torch; from safetensors.torch import save_file; {convert}"'
        why = "pickled weights can run any program when read. If you trust it"
        raise UserError(f"{name_or_path} has only adapter_model.bin: {why}: {how}")
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

    linears: the base model's layers that can be adapted, by their dotted names. Raises UserError, by name, for a tensor
    missing or left over, a shape that does not fit this base, and a peft feature that is not implemented and matters.
    """
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    kind, bias, drawn = config.get("peft_type"), config.get("bias", "none"), config.get("init_lora_weights", True)
    rank, alpha, rate = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    check(kind == "LORA" and bias == "none", f"{folder}: peft_type {kind}, bias {bias} is not plain LoRA")
    check(is_count(rank), f"{folder}: r is {rank!r}, not a whole number above 0")
    check(is_number(alpha), f"{folder}: lora_alpha is {alpha!r}, not a number")
    check(is_number(rate) and 0 <= rate < 1, f"{folder}: lora_dropout is {rate!r}, not a number in [0, 1)")
    for key in sorted(config.keys() - KNOWN_KEYS):
        value = config[key]
        check(is_off(value), f"{folder}: {key} is not implemented, and may change the result; it is {value!r}")
    plain = drawn in (True, False, None, "gaussian")  # the others change the base too
    check(plain, f"{folder}: init_lora_weights {drawn!r} is not implemented")

    stored, targets, expected = stored_in(path), set(), {}
    for name in stored:
        targets.add(target := name.removeprefix(PREFIX).rpartition(".lora_")[0])
        check(target in linears, f"{path}: {name} adapts no linear layer of this decoder")
    described = described_layers(config, linears, folder)
    described = targets if described is None else described
    more, missing = min(targets - described, default=""), described - targets
    check(not more, f"{path} has tensors for {more}, which target_modules does not name")
    of = f"{len(missing)} of the {len(described)} layers that target_modules names, such as {min(missing, default='')}"
    check(not missing, f"{path} has no tensors for {of}: it is not whole")
    check(targets, f"{path} has no tensors")
    for target in sorted(targets):  # checked before anything is built by the config's rank
        expected[f"{PREFIX}{target}.lora_A.weight"] = [rank, linears[target].in_features]
        expected[f"{PREFIX}{target}.lora_B.weight"] = [linears[target].out_features, rank]
    for name, shape in expected.items():
        check(name in stored, f"{path}: {name} is missing")
        check(stored[name].shape == shape, f"{path}: {name} has shape {stored[name].shape}, not {shape}")
    for name in stored:
        check(name in expected, f"{path}: tensor {name} has no place in a plain LoRA adapter")
    read, parts = open_safetensors(path).get_tensor, ("lora_A", "lora_B")
    factors = {target: tuple(read(f"{PREFIX}{target}.{part}.weight") for part in parts) for target in sorted(targets)}
    return rank, alpha, rate, factors


def described_layers(config: dict, linears: dict[str, nn.Linear], folder: Path) -> set[str] | None:
    """The layers that an adapter's config says it adapts, as peft reads it; None where it does not say."""

    def names(key) -> list[str] | str | None:
        value = config.get(key)
        texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
        check(texts or isinstance(value, str | None), f"{folder}: {key} is {value!r}, not names")
        return value

    def matching(given: list[str] | str, among=tuple(linears)) -> set[str]:
        if isinstance(given, list):
            ends = tuple(f".{name}" for name in given)
            return {name for name in among if f".{name}".endswith(ends)}
        with told(f"{folder}: {given[:60]!r} is no pattern that can be matched here"):
            re.compile(given)  # peft's language; RE2, which knows most of it, needs no longer for any pattern
            found = pyarrow.compute.match_substring_regex(pyarrow.array(among, "string"), f"^(?:{given})$")
        return {name for name, matched in zip(among, found.to_pylist(), strict=True) if matched}

    targets, excluded, only = names("target_modules"), names("exclude_modules") or [], config.get("layers_to_transform")
    if targets is None:
        return None
    pattern = names("layers_pattern")
    check(pattern in (None, [], ["layers"], "layers"), f"{folder}: layers_pattern {pattern!r} is not of this decoder")
    only = [only] if isinstance(only, int) else only or []
    numbers = isinstance(only, list) and all(isinstance(number, int) for number in only)
    check(numbers, f"{folder}: layers_to_transform is {only!r}, not numbers")
    found = (set(linears) if targets == "all-linear" else matching(targets)) - matching(excluded)
    if isinstance(targets, list) and only:
        found = {name for name in found if name in targets or int(name.split(".")[2]) in only}
    more = targets != "all-linear" and matching(targets, ("lm_head", "model.embed_tokens"))
    check(not more, f"{folder}: target_modules names the head or the embedding, which are not adapted here")
    return found
