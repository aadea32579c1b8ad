"""Checkpoints in Hugging Face layout: config, weights, shards, the hub, and what is refused."""

import functools
import shutil
from collections import namedtuple
from pathlib import Path

import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support import files
from support.decoding import NEUTRAL, named_ends
from support.files import UserError, check, is_count, is_number, read_json

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
SHARDS = ["model.safetensors.index.json", "model-*.safetensors"]  # read where there is no whole file
CHECKPOINT_FILES = ["config.json", "generation_config.json", "model.safetensors", *SHARDS]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Stored = namedtuple("Stored", "path name shape dtype")  # a tensor in a file, and the name that it has there
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What to do about an error of the hub's client, by the first class of it that stands here
NEXT_STEPS = {
    "GatedRepoError": "ask for access on its page there, then set HF_TOKEN",
    "RepositoryNotFoundError": "check the name; what is private needs HF_TOKEN",
    "Exception": "check the name, the revision, the connection and HF_ENDPOINT, or give a local folder",
}
# "any value": keys that are read, or change no logits. "these values": the implemented ones of other keys.
# "class_tokens": special tokens that a class of transformers has without tokenizer_config.json
KNOWN = read_json(Path(__file__).with_suffix(".json"))
OFF = (None, False, 0, 0.0, "", [], {})  # what any other key may be
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def find_folder(name_or_path, patterns: list[str], revision: str | None = None, repo_type: str = "model") -> Path:
    """A checkpoint's folder: the path itself, or the hub's snapshot of the files that match `patterns`."""
    name = str(name_or_path)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download  # here: a run on local files starts sooner without it

    try:
        return Path(snapshot_download(name, repo_type=repo_type, revision=revision, allow_patterns=patterns))
    except Exception as reason:  # the hub client raises its own errors, its http library's and the system's
        if repo_type == "model" and (cached := getattr(reason, "snapshot_path", None)):
            files.note(f"{name}: {str(reason).partition('. ')[0]}")  # a file that is missing is named later
            return Path(cached)
        kinds = [kind.__name__ for kind in type(reason).__mro__]
        step = next(step for kind, step in NEXT_STEPS.items() if kind in kinds)
        why = str(reason).strip().rstrip(".")
        raise UserError(f"{name} is neither a local folder nor available from the hub: {why}; {step}") from reason


def find_checkpoint(name_or_path, revision: str | None = None, patterns=None) -> Path:
    """`find_folder` of a model (default: all of its files). UserError for an adapter says what to type."""
    wanted = [*(patterns or CHECKPOINT_FILES + TOKENIZER_FILES), "adapter_config.json"]
    folder = find_folder(name_or_path, [file for file in wanted if file not in SHARDS], revision)
    here = [(folder / name).exists() for name in ("adapter_config.json", "config.json", "tokenizer.json")]
    if here[1] and SHARDS[0] in wanted and not (folder / "model.safetensors").exists():
        folder = find_folder(name_or_path, SHARDS, revision)
    if here[0] and not (here[1] or (here[2] and SHARDS[0] not in wanted)):  # a run's tokenizer may be asked for
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        use = f"give --model {base} (and to evaluate.py or paper.visualize --adapter {name_or_path})"
        raise UserError(f"{name_or_path} is an adapter of {base}, no whole model: {use}")
    return folder


def tokenizer_settings(folder: Path) -> dict:
    """What a checkpoint's files say of its tokenizer, as transformers reads them, and the tokenizer_class used."""
    paths = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    check(any(path.exists() for path in paths), f"{folder} has no {paths[0].name}")
    said, older = [read_json(path) if path.exists() else {} for path in paths]
    if "added_tokens_decoder" not in said:  # as older folders, where special_tokens_map.json counts first
        said |= {key: value for key, value in older.items() if value is not None}
    kind = str(said.get("tokenizer_class") or "").removesuffix("Fast")
    if kind == "LlamaTokenizer" and '"ByteLevel"' in (folder / "tokenizer.json").read_text(encoding="utf-8"):
        kind = ""
    return KNOWN["class_tokens"].get(kind, {}) | said | {"tokenizer_class": kind}


def special_token(folder: Path, name: str) -> str | None:
    """What a checkpoint's tokenizer calls its "eos_token" or "bos_token"."""
    token = tokenizer_settings(folder).get(name)
    token = token.get("content") if isinstance(token, dict) else token
    check(isinstance(token, str | None), f"{folder}: {name} {token!r} is no text")
    return token


def check_known(where: Path, settings: dict, table: str):
    """UserError for the first setting that is not implemented. table: the part of KNOWN that lists them."""
    known = KNOWN[table]
    for key in sorted(settings.keys() - known["any value"]):
        fits = repr(settings[key]) in map(repr, known["these values"].get(key, OFF))  # 1 is not True
        check(fits, f"{where}: {key} {settings[key]!r} is not implemented, and may change the result")


def read_architecture(folder: Path) -> dict:
    """The fields of model.Config, from config.json in either dialect. UserError, by name, for an unknown key."""
    path = folder / "config.json"
    raw = read_json(path)
    family, names = raw.get("model_type"), raw.get("architectures") or [None]
    name = names[0] if isinstance(names, list) else names
    known = any(family == of and name in (None, its) for its, of in FAMILIES.items())
    check(known, f"{path}: architecture {name} of model_type {family} is not one of {FAMILIES}")
    check_known(path, {key: raw[key] for key in raw.keys() - NEUTRAL if key[:1] != "_"}, "config.json")
    for key in (*SIZES, *(key for key in OPTIONAL_SIZES if raw.get(key) is not None)):
        check(is_count(raw.get(key)), f"{path}: {key} is {raw.get(key)!r}, not a whole number above 0")

    used, kinds, full = raw.get("use_sliding_window"), raw.get("layer_types") or [], raw.get("max_window_layers", 28)
    beyond = is_count(full) and full >= raw["num_hidden_layers"]  # the first layer that has a window
    slides = family == "llama" or used and not kinds and not beyond  # a Llama's cache has one wherever a size is named
    slides = slides and raw.get("sliding_window", 4096 if used else None) is not None
    fits = not slides and isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    check(fits, f"{path}: use_sliding_window, layer_types: sliding-window attention is not implemented")

    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # the first counts where both are there
    check(isinstance(rope, dict), f"{path}: rope parameters {rope!r} are no JSON object")
    given = {key: value for key, value in rope.items() if value is not None}
    theta = 10000.0 if raw.get("rope_theta") is None else raw["rope_theta"]
    rope = {"rope_type": rope.get("type") or "default", "rope_theta": theta} | given
    check_known(path, rope, "rope")
    numbers = {"rms_norm_eps": raw.get("rms_norm_eps", 1e-6), "rope_theta": rope["rope_theta"]}
    numbers |= {key: rope.get(key) for key in LLAMA3_KEYS if rope["rope_type"] == "llama3"}
    for key, value in numbers.items():
        check(is_number(value) and value > 0, f"{path}: {key} is {value!r}, not a number above 0")
    low, high = numbers.get("low_freq_factor", 0), numbers.get("high_freq_factor", 1)
    check(low < high, f"{path}: low_freq_factor is not below high_freq_factor")

    heads, key_heads = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // heads)
    fits = heads % key_heads == 0 and head_dim % 2 == 0 and head_dim > 0
    check(fits, f"{path}: {heads} heads over {key_heads} key heads, of {head_dim} dimensions, do not come out even")
    dtype, biased = raw.get("dtype") or raw.get("torch_dtype") or "auto", bool(raw.get("attention_bias"))
    fields = {key: raw[key] for key in SIZES} | {"num_key_value_heads": key_heads, "head_dim": head_dim}
    fields |= {"qkv_bias": biased or family == "qwen2", "output_bias": biased and family != "qwen2"}
    fields |= {"mlp_bias": bool(raw.get("mlp_bias")) and family == "llama", "qk_norm": family == "qwen3"}
    fields |= {"tie_word_embeddings": bool(raw.get("tie_word_embeddings")), "rope": rope, "raw": raw}
    fields |= {"max_position_embeddings": raw.get("max_position_embeddings") or 2048}
    return fields | {"rms_norm_eps": numbers["rms_norm_eps"], "dtype": getattr(torch, dtype, None)}


def open_safetensors(path: Path):
    """safetensors.safe_open, with a UserError that names the file when it is missing or not whole."""
    with files.told(f"{path} is not a whole safetensors file"):
        return safe_open(files.readable(path, most=2**50), framework="pt")


def pickled(path: Path, program: str) -> str:
    """What to do about weights that are no safetensors."""
    why = "pickled weights can run any program when they are read"
    return f'only {path.name}: {why}. If you trust it: python -c "{program}"'


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by their names. UserError for one that is no float."""
    file, found = open_safetensors(path), {}
    for name in sorted(file.keys()):
        part, kind = file.get_slice(name), file.get_slice(name).get_dtype()
        check(kind in FLOATS, f"{path}: {name} is stored as {kind}, not as a float")
        found[name] = Stored(path, name, part.get_shape(), FLOATS[kind])
    return found


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Where each tensor of a checkpoint is, single file or sharded. UserError where index and shards differ.

    As in transformers, model.safetensors counts first. Files are the folder's own, by name; links may lead anywhere.
    """
    index, single = folder / SHARDS[0], folder / "model.safetensors"
    if single.exists():
        found = stored_in(single)
        if beside := ", ".join(sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))):
            files.note(f"{folder} has {single.name}, which is read, and {beside}, not read")
    elif index.exists():
        listed, found = read_json(index).get("weight_map"), {}
        fits = isinstance(listed, dict) and all(isinstance(file, str) for file in listed.values())
        check(fits, f"{index} has no weight_map that puts tensors in files")
        for file in sorted(set(listed.values())):
            fits = file.isprintable() and Path(file).name == file  # NUL is in no file's name
            check(fits, f"{index} names {file}, which is not a file of its own folder")
            found |= stored_in(folder / file)
        for name in sorted(found.keys() | listed.keys()):
            there = found[name].path.name if name in found else None
            check(there == listed.get(name), f"{index} puts {name} in {listed.get(name)}, the shards in {there}")
    else:
        old = min((path for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")), default=None)
        convert = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained"
        how = pickled(old, f"{convert}('{folder}')") if old else "give a checkpoint in safetensors"
        raise UserError(f"{folder} has no model.safetensors; {how}")
    # Old checkpoints carry buffers of rope, which the config already determines.
    return {name: stored for name, stored in found.items() if not name.endswith("rotary_emb.inv_freq")}


def find_weights(folder: Path, config) -> dict[str, Stored]:
    """`find_tensors` for `config`, a tied head under one name. UserError for a config of a larger model."""
    found = find_tensors(folder)
    if config.tie_word_embeddings and HEAD in found:
        head = found.pop(HEAD)
        embedding = found.setdefault(EMBEDDING, head)
        both = (open_safetensors(stored.path).get_tensor(stored.name) for stored in (embedding, head))
        same = embedding == head or torch.equal(*both)
        check(same, f"{head.path}: {HEAD} differs from {EMBEDDING}, but the config ties them")
    most = max((size for stored in found.values() if 0 not in stored.shape for size in stored.shape), default=0)
    width = config.num_attention_heads * config.head_dim
    fits = max(config.vocab_size, config.hidden_size, config.intermediate_size, width) <= most
    fits = fits and config.num_hidden_layers <= len(found)
    check(fits, f"{folder}: config.json asks for a larger model than is stored")
    return found


def check_tensors(stored: dict[str, Stored], parameters: dict[str, Tensor], folder: Path):
    """UserError for the first tensor that is missing, left over, or of another shape."""
    for name in sorted(parameters.keys() | stored.keys()):
        check(name in stored, f"{folder} has no tensor {name}, which its config asks for")
        path, its_name, shape, _ = stored[name]
        check(name in parameters, f"{path}: tensor {name} has no place in this architecture")
        expected = list(parameters[name].shape)
        check(shape == expected, f"{path}: {its_name} has shape {shape}, the config asks for {expected}")


def read_tensor_into(target: Tensor, path: Path, name: str, block: int = 2**22, first: int = 0):
    """Copy the rows from `first` on of tensor `name` of a safetensors file into `target`, as many as it has, converted.

    `block` elements at a time, the file mapped anew for each: the pages of a mapping count as memory until it closes.
    """
    rows = max(1, block // target[:1].numel()) if len(target) else 1
    for start in range(0, len(target), rows):
        with open_safetensors(path) as file:
            end = min(start + rows, len(target))
            target[start:end].copy_(file.get_slice(name)[first + start : first + end])


@torch.no_grad()
def read_weights(model: nn.Module, stored: dict[str, Stored]):
    """Fill the weights of `model` from `find_weights`; of a sharded model (FSDP2), the rows of this rank."""
    for name, parameter in model.named_parameters():
        if name not in stored:  # an adapter's
            continue
        rows, first = parameter, 0
        if hasattr(parameter, "to_local"):  # FSDP2 cuts dimension 0 as torch.chunk does
            rows, mesh = parameter.to_local(), parameter.device_mesh
            first = mesh.get_local_rank() * -(-len(parameter) // mesh.size())
        read_tensor_into(rows, stored[name].path, stored[name].name, first=first)


def write_tensors(folder: Path, tensors: dict[str, Tensor], config: dict, prefix: str = ""):
    """Write model.safetensors and config.json, their names behind `prefix`, each whole or not at all."""
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(folder / f"{prefix}model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    files.write_json(folder / f"{prefix}config.json", config)


def save_model(model: nn.Module, folder):
    """Write a checkpoint that load_model, transformers, vLLM and lm-eval load, the tokenizer's files beside it."""
    folder, raw = Path(folder), model.config.raw
    dtype_key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    config = raw | {dtype_key: str(model.lm_head.weight.dtype).removeprefix("torch.")}
    # named_parameters lists a tied tensor once, under its first name: the embedding
    write_tensors(folder, {name: p.detach().contiguous() for name, p in model.named_parameters()}, config)
    if not model.folder:
        return
    for file in filter(Path.is_file, (model.folder / name for name in [*TOKENIZER_FILES, "chat_template.jinja"])):
        files.write_whole(folder / file.name, functools.partial(shutil.copyfile, file))
    ends = []  # of every answer in training; a base's own generation_config may name another
    if (path := model.folder / "tokenizer.json").exists():
        number = tokenizers.Tokenizer.from_file(str(path)).token_to_id(special_token(model.folder, "eos_token") or "")
        ends = [] if number is None else [number]
    if settings := generation_config(model.folder, config, ends):
        files.write_json(folder / "generation_config.json", settings)


def generation_config(folder: Path, config: dict, ends: list[int]) -> dict:
    """A folder's generation_config.json, or what config.json says instead; answers also end with `ends`."""
    path = folder / "generation_config.json"
    named = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    settings = read_json(path) if path.exists() else named
    ends = list(dict.fromkeys([*named_ends(settings, path), *ends]))
    return settings | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


def check_fits(model: nn.Module, name: str, examples: list[tuple[Tensor, Tensor]]):
    """UserError for samples, (ids, response) each, with unknown tokens, or with more than the model reads."""
    rows, most = model.config.vocab_size, model.config.max_position_embeddings
    largest, longest = max(int(ids.max()) for ids, _ in examples), max(len(ids) for ids, _ in examples)
    check(largest < rows, f"{name}: token id {largest} is outside the embedding of {rows} rows")
    check(longest <= most, f"{name} reads {most} tokens, a sample has {longest}: lower --max-length to {most}")
