"""Checkpoints as files: both config dialects, shards, the hub; what is refused, and why.

A folder in Hugging Face layout holds config.json, the weights in safetensors and the tokenizer's files. What peft's
holds: adapters.py.
"""

import functools
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support.decoding import NEUTRAL, named_ends
from support.files import UserError, is_count, is_number, note, read_json, readable, write_json, write_whole, writing

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
SHARDS = ["model.safetensors.index.json", "model-*.safetensors"]  # read where there is no whole file
CHECKPOINT_FILES = ["config.json", "generation_config.json", "model.safetensors", *SHARDS]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
# What to do about an error of the hub's client: of the first kind that it is
NEXT_STEPS = {
    "GatedRepoError": "ask for access on its page there, then set HF_TOKEN",
    "RepositoryNotFoundError": "check the name; what is private needs HF_TOKEN",
    "RevisionNotFoundError": "check the revision",
    "HFValidationError": "check the path",
    "LocalEntryNotFoundError": "check the connection and HF_ENDPOINT, or give a local folder",
    "Exception": "try again, or give a local folder",
}


def find_folder(name_or_path, patterns: list[str], revision: str | None = None, repo_type: str = "model") -> Path:
    """The local folder of a checkpoint: the path itself, or the hub's snapshot of the files that match `patterns`.

    The hub is reached through huggingface_hub, so HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and the cache apply as ever.
    """
    name = str(name_or_path)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download  # here: a run on local files starts sooner without it

    try:
        return Path(snapshot_download(name, repo_type=repo_type, revision=revision, allow_patterns=patterns))
    except Exception as reason:  # the hub client raises its own errors, its http library's and the system's
        if repo_type == "model" and (cached := getattr(reason, "snapshot_path", None)):
            note(f"{name}: {str(reason).partition('. ')[0]}")  # whoever needs one of them will miss it, by its name
            return Path(cached)
        kinds = [kind.__name__ for kind in type(reason).__mro__]
        step = next(step for kind, step in NEXT_STEPS.items() if kind in kinds)
        why = str(reason).strip().rstrip(".")
        raise UserError(f"{name} is neither a local folder nor available from the hub: {why}; {step}") from reason


def find_checkpoint(name_or_path, revision: str | None = None, patterns=None) -> Path:
    """`find_folder` of a model (default: all of its files); what is an adapter gets an error that says what to type."""
    wanted = [*(patterns or CHECKPOINT_FILES + TOKENIZER_FILES), "adapter_config.json"]
    folder = find_folder(name_or_path, [file for file in wanted if file not in SHARDS], revision)
    here = [(folder / name).exists() for name in ("adapter_config.json", "config.json", "tokenizer.json")]
    if here[1] and SHARDS[0] in wanted and not (folder / "model.safetensors").exists():
        folder = find_folder(name_or_path, SHARDS, revision)
    if here[0] and not (here[1] or (here[2] and SHARDS[0] not in wanted)):  # a run's tokenizer may be asked for
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        merged = f", or --model {name_or_path}/merged" if (folder / "merged").is_dir() else ""
        use = f"give --model {base} (and to evaluate.py or paper.visualize --adapter {name_or_path}){merged}"
        raise UserError(f"{name_or_path} is an adapter of {base}, no whole model: {use}")
    return folder


# Tokens that a class of transformers names where tokenizer_config.json does not
CLASS_TOKENS = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(["unk_token", "eos_token", "pad_token"], "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(["unk_token", "bos_token", "eos_token"], "<|endoftext|>"),
}


def tokenizer_settings(folder: Path) -> dict:
    """What a checkpoint's files say of its tokenizer, as transformers reads them; tokenizer_class is the one it uses.

    They are tokenizer_config.json and, in older folders, special_tokens_map.json, which counts first there.
    """
    paths = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    if not any(path.exists() for path in paths):
        raise UserError(f"{folder} has no {paths[0].name}")
    said, later = [read_json(path) if path.exists() else {} for path in paths]
    if "added_tokens_decoder" not in said:
        said = said | {key: value for key, value in later.items() if value is not None}
    kind = str(said.get("tokenizer_class") or "").removesuffix("Fast")
    if kind == "LlamaTokenizer" and '"ByteLevel"' in (folder / "tokenizer.json").read_text(encoding="utf-8"):
        kind = ""
    return CLASS_TOKENS.get(kind, {}) | said | {"tokenizer_class": kind}


def special_token(folder: Path, name: str) -> str | None:
    """What a checkpoint's tokenizer calls its "eos_token" or "bos_token"."""
    token = tokenizer_settings(folder).get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise UserError(f"{folder}: {name} {token!r} is no text")
    return token


# Keys of config.json. Those that are read below; those of which one value is implemented; and those that change no
# logits of these families, whatever they say: what it was made with, its tokens, training, labels, how text is drawn.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
ONLY = {"hidden_act": "silu", "attention_dropout": 0, "partial_rotary_factor": 1, "is_causal": True}
ONLY["quantization_config"] = None
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3_KEYS}
READ_KEYS = {*SIZES, *OPTIONAL_SIZES, *FLAGS, "model_type", "architectures", "dtype", "torch_dtype", "rms_norm_eps"}
READ_KEYS |= {"rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "max_window_layers", "layer_types"}
FREE_KEYS = set(
    """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled auto_map
    attn_implementation transformers_version transformers.js_config is_llama_config unsloth_fixed unsloth_version
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    tokenizer_class model_max_length use_cache gradient_checkpointing initializer_range pretraining_tp num_labels
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate id2label label2id
    problem_type finetuning_task task_specific_params prefix torchscript use_bfloat16 keys_to_ignore_at_inference
    temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff do_sample max_length length_penalty
    early_stopping repetition_penalty
    """.split()
)


def is_off(value) -> bool:
    """Whether a setting that is not known here is as configurations leave what is not switched on."""
    return value in (None, False, "", [], {})


def read_architecture(folder: Path) -> dict:
    """The fields of model.Config from `folder`/config.json, whichever of transformers' two dialects it is written in.

    A key is read, or known to change no logits (FREE_KEYS), or off. Whatever else there is is refused by name.
    """
    raw = read_json(folder / "config.json")

    def refuse(what):
        raise UserError(f"{folder / 'config.json'}: {what}")

    family, architectures = raw.get("model_type"), raw.get("architectures") or [None]
    architecture = architectures[0] if isinstance(architectures, list) else architectures
    known = [name for name, of in FAMILIES.items() if of == family]
    if not known or architecture not in (None, *known):
        refuse(f"architecture {architecture} of model_type {family} is not one of {FAMILIES}")
    for key in (*SIZES, *(key for key in OPTIONAL_SIZES if raw.get(key) is not None)):
        if not is_count(raw.get(key)):
            refuse(f"{key} is {raw.get(key)!r}, not a whole number above 0")
    for key in FLAGS:
        if type(raw.get(key)) not in (bool, type(None)):
            refuse(f"{key} is {raw[key]!r}, not true or false")
    for key in sorted(raw.keys() - READ_KEYS - FREE_KEYS - NEUTRAL.keys()):
        if raw[key] != ONLY[key] if key in ONLY else not is_off(raw[key]):
            refuse(f"{key} {raw[key]!r} is not implemented, and may change what the model computes")

    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    kinds, full, window = raw.get("layer_types") or [], raw.get("max_window_layers", 28), None
    if raw.get("use_sliding_window") or family == "llama":  # whose cache has a window wherever a size is named
        window = raw.get("sliding_window", 4096 if raw.get("use_sliding_window") else None)
    slides = window is not None and (family == "llama" or not kinds and not (is_count(full) and full >= layers))
    if slides or not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        refuse("use_sliding_window, layer_types: sliding-window attention is not implemented")

    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # the first counts where both are there
    if not isinstance(rope, dict):
        refuse(f"rope parameters {rope!r} are no JSON object")
    theta = raw["rope_theta"] if raw.get("rope_theta") is not None else 10000.0
    rope = {"rope_type": rope.get("type") or "default", "rope_theta": theta} | {
        key: value for key, value in rope.items() if value is not None
    }
    unread = {key for key, value in rope.items() if key not in ROPE_KEYS and not is_off(value)}
    if rope["rope_type"] not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1 or unread:
        refuse(f"rope parameters {rope} are not implemented, only rope_type default or llama3, one for all layers")
    needed = {"rms_norm_eps": raw.get("rms_norm_eps", 1e-6), "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "llama3":
        needed |= {key: rope.get(key) for key in LLAMA3_KEYS}
    for key, value in needed.items():
        if not is_number(value) or value <= 0:
            refuse(f"{key} is {value!r}, not a number above 0")
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        refuse("low_freq_factor is not below high_freq_factor")

    dtype = raw.get("dtype") or raw.get("torch_dtype")
    dtype = None if dtype == "auto" else dtype
    if dtype and dtype not in ("float64", "float32", "float16", "bfloat16"):
        refuse(f"dtype {dtype!r} is no float that is implemented")
    key_heads = raw.get("num_key_value_heads") or heads
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // heads)
    if heads % key_heads or head_dim % 2 or not head_dim:
        refuse(f"{heads} heads over {key_heads} key heads, of {head_dim} dimensions each, do not come out even")
    biased = bool(raw.get("attention_bias"))
    return {key: raw[key] for key in SIZES} | {
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "rms_norm_eps": needed["rms_norm_eps"],
        "max_position_embeddings": raw.get("max_position_embeddings") or 2048,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings")),
        "qkv_bias": biased or family == "qwen2",
        "output_bias": biased and family != "qwen2",
        "mlp_bias": bool(raw.get("mlp_bias")) and family == "llama",
        "qk_norm": family == "qwen3",
        "rope": rope,
        "dtype": getattr(torch, dtype) if dtype else None,
        "raw": raw,
    }


def open_safetensors(path: Path):
    """safetensors.safe_open, with a UserError that names the file when it is missing or not whole."""
    try:
        return safe_open(readable(path, most=2**50), framework="pt")
    except (SafetensorError, OSError) as reason:
        raise UserError(f"{path} is not a whole safetensors file: {reason}") from None


class Stored(NamedTuple):
    """Where a weight is: the file, and the name that it has there."""

    path: Path
    name: str


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Where each tensor of a checkpoint is, single file or sharded. UserError where index and shards differ.

    As transformers, model.safetensors is read where it is there, whatever else is. Files are those of the folder, by
    their names; where one is a link, as the hub's client makes them, it may lead anywhere. Pickled weights (.bin, .pt)
    are not read: whoever wrote them can have them run any program.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        beside = [path.name for path in sorted(folder.glob("model-*-of-*.safetensors"))]
        if beside:
            note(f"{folder} has {single.name}, which is read, and {', '.join(beside)}, not read")
        found = dict.fromkeys(open_safetensors(single).keys(), single.name)
    elif not index.exists():
        pickled = [path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")]
        only = f", only {min(pickled)}: pickled weights can run any program when read" if pickled else ""
        convert = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained"
        how = f"if you trust it: python -c \"{convert}('{folder}')\"" if pickled else "give a checkpoint in safetensors"
        raise UserError(f"{folder} has no model.safetensors{only}; {how}")
    else:
        found = _find_shards(folder, index)
    # Old checkpoints carry buffers of rope, which the config already determines.
    return {
        name: Stored(folder / file, name) for name, file in found.items() if not name.endswith("rotary_emb.inv_freq")
    }


def _find_shards(folder: Path, index: Path) -> dict[str, str]:
    listed = read_json(index).get("weight_map")
    if not (isinstance(listed, dict) and all(isinstance(file, str) for file in listed.values())):
        raise UserError(f"{index} has no weight_map that puts tensors in files")
    found = {}
    for file in sorted(set(listed.values())):
        if not file.isprintable() or Path(file).name != file:  # NUL is in no file's name
            raise UserError(f"{index} names {file}, which is not a file of its own folder")
        found |= dict.fromkeys(open_safetensors(folder / file).keys(), file)
    if found != listed:
        name = min(set(found.items()) ^ set(listed.items()))[0]
        raise UserError(f"{index} puts {name} in {listed.get(name)}, the shards in {found.get(name)}")
    return found


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def find_weights(folder: Path, config) -> dict[str, Stored]:
    """`find_tensors` of the weights that `config` asks for: a tied head is read once, under whichever of its names."""
    files = find_tensors(folder)
    if config.tie_word_embeddings and HEAD in files:
        head = files.pop(HEAD)
        embedding = files.setdefault(EMBEDDING, head)
        if embedding != head and not torch.equal(*(open_safetensors(p).get_tensor(n) for p, n in (embedding, head))):
            raise UserError(f"{head.path}: {HEAD} differs from {EMBEDDING}, but the config ties them")
    check_sizes(config, files, folder)
    return files


def stored_dtype(files: dict[str, Stored]) -> torch.dtype:
    """What the embedding is stored in."""
    path, name = files[EMBEDDING]
    return open_safetensors(path).get_slice(name)[:1].dtype


def check_sizes(config, files: dict[str, Stored], folder: Path):
    """Raise UserError for a size that no stored tensor has, before anything is built by it."""
    largest = 0
    for path in {stored.path for stored in files.values()}:
        with open_safetensors(path) as file:
            names = file.keys()
            shapes = [file.get_slice(name).get_shape() for name in names]
            largest = max([largest, *(size for shape in shapes if 0 not in shape for size in shape)])
    sizes = {key: getattr(config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes["num_attention_heads * head_dim"] = config.num_attention_heads * config.head_dim
    for key, size in sizes.items():
        if size > largest:
            raise UserError(f"{folder / 'config.json'}: {key} is {size}, but no tensor's shape has more than {largest}")
    if config.num_hidden_layers > len(files):
        layers = f"num_hidden_layers is {config.num_hidden_layers}"
        raise UserError(f"{folder / 'config.json'}: {layers}, but there are {len(files)} tensors in all")


def check_tensors(files: dict[str, Stored], parameters: dict[str, Tensor], folder: Path):
    """Raise UserError for the first tensor that is missing, left over, of another shape, or no float."""
    for name in sorted(parameters.keys() | files.keys()):
        if name not in files:
            raise UserError(f"{folder} has no tensor {name}, which its config asks for")
        path, its_name = files[name]
        if name not in parameters:
            raise UserError(f"{path}: tensor {name} has no place in this architecture")
        stored, expected = open_safetensors(path).get_slice(its_name), list(parameters[name].shape)
        if stored.get_shape() != expected:
            raise UserError(f"{path}: {its_name} has shape {stored.get_shape()}, the config asks for {expected}")
        if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{path}: {its_name} is stored as {stored.get_dtype()}, not as a float")


def read_tensor_into(target: Tensor, path: Path, name: str, block: int = 2**22, first: int = 0):
    """Copy the rows from `first` on of tensor `name` of a safetensors file into `target`, as many as it has, converted.

    Some rows (`block` elements) at a time, and the file is mapped anew for each: the pages of a mapping count as
    memory until it closes.
    """
    rows = max(1, block // target[:1].numel()) if len(target) else 1
    for start in range(0, len(target), rows):
        with open_safetensors(path) as file:
            end = min(start + rows, len(target))
            target[start:end].copy_(file.get_slice(name)[first + start : first + end])


@torch.no_grad()
def read_weights(model: nn.Module, files: dict[str, Stored]):
    """Fill the weights of `model` from `files`, as `find_weights`; of a sharded one (FSDP2), the rows of this rank."""
    for name, parameter in model.named_parameters():
        if name not in files:  # an adapter's
            continue
        rows, first = parameter, 0
        if hasattr(parameter, "to_local"):  # FSDP2 cuts dimension 0 as torch.chunk does
            rows, mesh = parameter.to_local(), parameter.device_mesh
            first = mesh.get_local_rank() * -(-len(parameter) // mesh.size())
        read_tensor_into(rows, *files[name], first=first)


def save_model(model: nn.Module, folder):
    """Write a checkpoint that load_model, transformers, vLLM and lm-eval load, the tokenizer's files beside it."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    dtype_key = "torch_dtype" if "torch_dtype" in model.config.raw else "dtype"
    config = model.config.raw | {dtype_key: str(model.lm_head.weight.dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)
    # named_parameters lists a tied tensor once, under its first name: the embedding
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    if not model.folder:
        return
    for file in filter(Path.is_file, (model.folder / name for name in [*TOKENIZER_FILES, "chat_template.jinja"])):
        write_whole(folder / file.name, functools.partial(shutil.copyfile, file))
    if told := generation_config(model.folder, config):
        write_json(folder / "generation_config.json", told)


def generation_config(folder: Path, config: dict) -> dict:
    """What generates from a model is told of it: where answers end, the end of text of its tokenizer among it.

    That is the token that every answer of the training data ended with. Many a base model's own file names another.
    """
    path = folder / "generation_config.json"
    told = read_json(path) if path.exists() else {key: config[key] for key in SPECIAL_IDS if key in config}
    if not (folder / "tokenizer.json").exists():
        return told
    tokenizer = read_json(folder / "tokenizer.json")
    end, model = special_token(folder, "eos_token"), tokenizer.get("model") or {}
    vocabulary = model["vocab"] if isinstance(model.get("vocab"), dict) else {}
    ids = vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    return with_ends(told, [ids[end]] if end in ids else [], path)


def with_ends(told: dict, tokens: list[int], where: Path) -> dict:
    """A generation_config's content that names these tokens too where an answer ends, behind those that it has."""
    ends = list(dict.fromkeys([*named_ends(told, where), *tokens]))
    return told | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_fits(model: nn.Module, name: str, examples: list[tuple[Tensor, Tensor]]):
    """UserError for samples, (ids, response) each, with tokens that the model does not have, or more than it reads."""
    if (largest := max(int(ids.max()) for ids, _ in examples)) >= model.config.vocab_size:
        raise UserError(f"{name}: token id {largest} is outside the embedding of {model.config.vocab_size} rows")
    if (longest := max(len(ids) for ids, _ in examples)) > model.config.max_position_embeddings:
        context = model.config.max_position_embeddings
        raise UserError(f"{name} reads {context} tokens, a sample has {longest}: lower --max-length to {context}")
