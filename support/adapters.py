"""Adapters as files, in peft's format: what one says of itself, what it holds, and that the two agree.

An adapter's folder holds adapter_config.json and adapter_model.safetensors.
"""

import re
from pathlib import Path

import pyarrow.compute
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from support.checkpoint import find_folder, is_off, open_safetensors
from support.files import UserError, is_count, is_number, read_json, write_json, write_whole, writing

ADAPTER_FILES = ["adapter_config.json", "adapter_model.*", "run.json"]
PREFIX = "base_model.model."
# Keys of adapter_config.json that are read here, or change nothing where the others are as they are checked to be
READ_KEYS = {
    *("peft_type", "bias", "r", "lora_alpha", "lora_dropout", "init_lora_weights", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
}
FREE_KEYS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "fan_in_fan_out"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of init_lora_weights, which is read
}


def find_adapter(name_or_path) -> Path:
    """The folder of an adapter, local or on the hub; UserError, with what to do, where none can be read."""
    folder = find_folder(name_or_path, ADAPTER_FILES)
    weights, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not (folder / "adapter_config.json").exists():
        model = ", but config.json: a whole model goes to --model" if (folder / "config.json").exists() else ""
        raise UserError(f"{name_or_path} has no adapter_config.json{model}")
    if not weights.exists() and pickled.exists():
        convert = f"save_file(torch.load('{pickled}', weights_only=True), '{weights}')"
        raise UserError(
            f"{name_or_path} has only adapter_model.bin: pickled weights can run any program when read. If you trust "
            f'it: python -c "import torch; from safetensors.torch import save_file; {convert}"'
        )
    return folder


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict):
    """Write adapter_model.safetensors and adapter_config.json, each whole or not at all."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", config)


def read_adapter(folder: Path, linears: dict[str, nn.Linear]) -> tuple[int, float, float, dict[str, tuple]]:
    """An adapter's rank, alpha, dropout, and {layer: (A, B)}, from a folder that we or peft wrote.

    linears: the base model's layers that can be adapted, by their dotted names.

    Raises UserError, by name, for a missing or leftover tensor, a shape that does not fit this base model, and any
    peft feature that would change the result and is not implemented.
    """
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise UserError(f"{folder}: peft_type {config.get('peft_type')}, bias {config.get('bias')} is not plain LoRA")
    rank, alpha, rate = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if not is_count(rank):
        raise UserError(f"{folder}: r is {rank!r}, not a whole number above 0")
    if not is_number(alpha):
        raise UserError(f"{folder}: lora_alpha is {alpha!r}, not a number")
    if not is_number(rate) or not 0 <= rate < 1:
        raise UserError(f"{folder}: lora_dropout is {rate!r}, not a number in [0, 1)")
    for key in sorted(config.keys() - READ_KEYS - FREE_KEYS):
        if not is_off(config[key]):
            raise UserError(f"{folder}: {key} is not implemented, and may change the result; it is {config[key]!r}")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian"):  # the others change the base too
        raise UserError(f"{folder}: init_lora_weights {config['init_lora_weights']!r} is not implemented")
    open_safetensors(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as reason:
        raise UserError(f"{path} is not a whole safetensors file: {reason}") from None
    parts = {name: name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    targets = sorted(set(parts.values()))
    for name, target in parts.items():
        if target not in linears:
            raise UserError(f"{path}: {name} adapts no linear layer of this decoder")
    described = described_layers(config, linears, folder)
    described = set(targets) if described is None else described
    if more := set(targets) - described:
        raise UserError(f"{path} has tensors for {min(more)}, which target_modules does not name")
    if missing := described - set(targets):
        of = f"{len(missing)} of the {len(described)} layers that target_modules names"
        raise UserError(f"{path} has no tensors for {of}, such as {min(missing)}: it is not whole")
    if not targets:
        raise UserError(f"{path} has no tensors")
    expected = {}  # checked before anything is built by the config's rank
    for target in targets:
        expected[f"{PREFIX}{target}.lora_A.weight"] = [rank, linears[target].in_features]
        expected[f"{PREFIX}{target}.lora_B.weight"] = [linears[target].out_features, rank]
    for name, shape in expected.items():
        stored = list(tensors[name].shape) if name in tensors else None
        if stored != shape:
            problem = "is missing" if stored is None else f"has shape {stored}, not {shape}"
            raise UserError(f"{path}: {name} {problem}")
        if tensors[name].dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{path}: {name} is stored as {tensors[name].dtype}, not as a float")
    if leftover := tensors.keys() - expected.keys():
        raise UserError(f"{path}: tensor {min(leftover)} has no place in a plain LoRA adapter")
    factors = {
        target: tuple(tensors[f"{PREFIX}{target}.{part}.weight"] for part in ("lora_A", "lora_B")) for target in targets
    }
    return rank, alpha, rate, factors


def described_layers(config: dict, linears: dict[str, nn.Linear], folder: Path) -> set[str] | None:
    """The layers that an adapter's config says it adapts, as peft reads it; None where it does not say.

    UserError for what is no list of names nor a pattern that RE2 knows.
    """

    def names(key) -> list[str] | str | None:
        value = config.get(key)
        value = [value] if isinstance(value, str) and key == "layers_pattern" else value
        texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not (value is None or texts or isinstance(value, str)):
            raise UserError(f"{folder}: {key} is {value!r}, not names")
        return value

    def matching(given: list[str] | str, among=tuple(linears)) -> set[str]:
        if isinstance(given, list):
            ends = set(given)
            parts = {name: name.split(".") for name in among}
            return {name for name, of in parts.items() if any(".".join(of[i:]) in ends for i in range(len(of)))}
        try:
            re.compile(given)  # peft's language; RE2, which knows most of it, needs no longer for any pattern
            found = pyarrow.compute.match_substring_regex(pyarrow.array(among, "string"), f"^(?:{given})$")
        except (re.error, RecursionError, OverflowError, pyarrow.ArrowInvalid) as reason:
            raise UserError(f"{folder}: {given[:60]!r} is no pattern that can be matched here: {reason}") from None
        return {name for name, matched in zip(among, found.to_pylist(), strict=True) if matched}

    targets, excluded, only = names("target_modules"), names("exclude_modules") or [], config.get("layers_to_transform")
    if targets is None:
        return None
    if names("layers_pattern") not in (None, [], ["layers"]):
        raise UserError(f"{folder}: layers_pattern {config['layers_pattern']!r} is not of this decoder")
    only = [only] if isinstance(only, int) else only or []
    if not isinstance(only, list) or not all(isinstance(number, int) for number in only):
        raise UserError(f"{folder}: layers_to_transform is {only!r}, not numbers")
    found = (set(linears) if targets == "all-linear" else matching(targets)) - matching(excluded)
    if isinstance(targets, list) and only:
        whole, only = set(targets), set(only)
        found = {name for name in found if name in whole or int(name.split(".")[2]) in only}
    if targets != "all-linear" and matching(targets, ("lm_head", "model.embed_tokens")):
        raise UserError(f"{folder}: target_modules names the head or the embedding, which are not adapted here")
    return found
