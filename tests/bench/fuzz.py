"""Damaged and hostile files, each read under limits; a line of JSON for each.

    python tests/bench/fuzz.py FOLDER SEED CASES

FOLDER holds what `make_targets` of test_trust.py wrote. A case changes one file of it, reads it as the scripts do, and
compares what it got with another parse of the same bytes: the json and tokenizers libraries, and `tensors_in` below.
Every case ends as "loaded" (those values) or "refused" (a UserError that names the file or its folder). Anything else
is "failed", whatever was raised. A case that hangs, or that asks for a GiB, ends the process by a signal or fails.
"""

import contextlib
import json
import math
import random
import re
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))

import numpy as np
import tokenizers
import torch

import data
import lora
from model import load_model
from support import adapters, decoding, losses
from support.files import UserError

SECONDS = 20  # of a core, for one case
MEMORY = 2**30  # bytes that all cases together may have asked for at any time
IDS = torch.arange(2, 34)[None]
TEXTS = ["A text, with 2 numbers 123 and \U0001f44d.", "<|end_of_text|> spelled\nout\t \x00", "a", "", "ünïcödé \u202e"]
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


# ------------------------------------------------------------------------------------------------- another parse


def read_json(path: Path):
    return json.loads(path.read_bytes().decode())


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """What a safetensors file says by its specification: eight bytes of length, a JSON header, the data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length].decode()), content[8 + length :]
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if entry["dtype"] == "BF16":
            tensor = torch.tensor(np.frombuffer(body[start:end], np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.tensor(np.frombuffer(body[start:end], DTYPES[entry["dtype"]]))
        found[name] = tensor.reshape(entry["shape"])
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)


# -------------------------------------------------------------------------- each kind of file: read it, and compare


def check_model(folder: Path):
    model, index = load_model(folder), folder / "model.safetensors.index.json"
    raw, stored = read_json(folder / "config.json"), {}
    names = read_json(index)["weight_map"].values() if index.exists() else ["model.safetensors"]
    for name in set(names):
        stored |= tensors_in(folder / name)
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    dtype = getattr(torch, dtype) if dtype else stored["model.embed_tokens.weight"].dtype
    for name, parameter in model.named_parameters():
        assert same_bits(parameter, stored[name].to(dtype)), name
    assert json.dumps(model.config.raw) == json.dumps(raw)
    for key in vars(model.config).keys() & raw.keys() - {"dtype"}:
        assert raw[key] in (None, getattr(model.config, key)), key
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for key in rope:
        assert rope[key] in (None, model.config.rope[key]), key
    model(IDS % model.config.vocab_size)  # whatever it says can be computed


def check_generation(folder: Path):
    base.folder = folder
    found, said = decoding.generation_settings(base, tokenizer), read_json(folder / "generation_config.json")
    stop = said.get("eos_token_id")
    assert all(type(token) is int for token in found["stop_ids"]) and 0 < found["repetition_penalty"] < math.inf
    assert found["stop_ids"] == {tokenizer.eos_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    assert found["repetition_penalty"] == (said.get("repetition_penalty") or 1.0)


def check_tokenizer(folder: Path):
    ours, config = data.load_tokenizer(folder), read_json(folder / "tokenizer_config.json")
    data.encode([{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}], ours, 64)
    ids = [ours.encode(text)[0] for text in TEXTS]
    written = [ours.decode(some) for some in ids]
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    assert ours.encode_prompts(TEXTS) == [theirs.encode(text).ids for text in TEXTS]
    theirs.encode_special_tokens = True
    assert ids == [theirs.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert written == [theirs.decode(some, skip_special_tokens=False) for some in ids]
    assert len(set(theirs.get_vocab().values())) == theirs.get_vocab_size()  # or decoding is left to chance
    end = config["eos_token"]
    assert ours.eos_id == theirs.token_to_id(end["content"] if isinstance(end, dict) else end)


def check_rows(folder: Path):
    (path,), expected = folder.glob("*.jsonl"), []
    found = data.load_conversations(str(path))
    data.load_examples(str(path), tokenizer, 64)
    for line in re.split("\r\n|\r|\n", path.read_bytes().decode("utf-8-sig")):
        row = json.loads(line) if line.strip() else None
        if row and "messages" in row:
            expected.append([(turn["role"].lower(), turn["content"]) for turn in row["messages"]])
        elif row:
            question = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
            expected.append([("user", question), ("assistant", row["output"])])
    assert [[tuple(turn.values()) for turn in turns] for turns in found] == expected


def check_adapter(folder: Path):
    try:
        layers = lora.lora_layers(lora.load_adapter(base, folder))
        config, stored = read_json(folder / "adapter_config.json"), tensors_in(folder / "adapter_model.safetensors")
        assert len(stored) == 2 * len(layers)
        for name, layer in layers.items():
            assert (layer.rank, layer.alpha) == (config["r"], config["lora_alpha"])
            assert layer.dropout == config.get("lora_dropout", 0.0)
            for part in ("lora_A", "lora_B"):
                assert same_bits(getattr(layer, part), stored[f"{adapters.PREFIX}{name}.{part}.weight"].float())
        base(IDS)
    finally:
        lora.remove_lora(base)


def check_cache(folder: Path):
    nll, seconds = losses.kept_losses(folder, "key", lambda: (_ for _ in ()).throw(AssertionError("not found")))
    assert same_bits(nll, tensors_in(folder / "key.safetensors")["nll"]) and math.isfinite(seconds)


TARGETS: dict[str, Callable[[Path], None]] = {
    "single/model.safetensors": check_model,
    "single/config.json": check_model,
    "sharded/model.safetensors.index.json": check_model,
    "sharded/model-00001-of-00002.safetensors": check_model,
    "single/generation_config.json": check_generation,
    "single/tokenizer.json": check_tokenizer,
    "single/tokenizer_config.json": check_tokenizer,
    "rows/rows.jsonl": check_rows,
    "turns/turns.jsonl": check_rows,
    "adapter/adapter_config.json": check_adapter,
    "adapter/adapter_model.safetensors": check_adapter,
    "cache/key.safetensors": check_cache,
}

# ---------------------------------------------------------------------------------------------------- random damage

VALUES = [0, -1, 10**9, 2**63, 10**400, 0.5, math.nan, math.inf, "", "x", "\ud800", "../x", [], {}, [[]], None, True]


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.sample(range(len(content) + 1), 2))
    return rng.choice((content[:first], content[:first] + content[last:], content[:last] + content[first:]))


def exchange(content: bytes, rng: random.Random) -> bytes:
    """One value anywhere in the JSON exchanged for another that may be of another kind, or its key for another."""
    root = {"": json.loads(content)}
    places = [(root, "")]
    for holder, key in places:  # grows while it is walked
        inner = holder[key]
        items = inner.keys() if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        places += [(inner, each) for each in items]
    holder, key = rng.choice(places)
    if isinstance(holder, dict) and rng.random() < 0.2:
        holder[rng.choice(("x", "", key + "x"))] = holder.pop(key)
    else:
        holder[key] = rng.choice(VALUES)
    return json.dumps(root.get("", {})).encode()


def damage(name: str, content: bytes, rng: random.Random) -> bytes:
    """One random change; of a safetensors file mostly to its header, of a JSONL file to one of its lines."""
    change = rng.choice((flip, flip, cut, exchange, exchange))
    if name.endswith(".safetensors"):
        header = 8 + struct.unpack("<Q", content[:8])[0]
        if change is exchange:
            return pack(exchange(content[8:header], rng), content[header:])
        if rng.random() < 0.9:
            return change(content[:header], rng) + content[header:]
    if name.endswith(".jsonl") and change is exchange:
        lines = content.splitlines()
        number = rng.randrange(len(lines))
        lines[number] = exchange(lines[number], rng)
        return b"\n".join(lines)
    return change(content, rng)


def pack(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


# -------------------------------------------------------------------------------------------------- hostile cases


def hostile(originals: dict[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    """(what it is, the file, its content): attacks that random damage would hardly find."""
    deep = b"[" * 100_000 + b"]" * 100_000
    for name, content in originals.items():
        yield "empty", name, b""
        yield "NUL bytes", name, b"\0" * 4096
        if name.endswith(".json"):
            yield "nested 100,000 deep", name, deep
            yield "an object nested 100,000 deep", name, b'{"a":' * 100_000 + b"1" + b"}" * 100_000
            yield "a number of 5,000 digits", name, b'{"a": ' + b"9" * 5000 + b"}"
            yield "a duplicate key", name, content.rstrip()[:-1] + b', "eos_token": "x", "eos_token": "a"}'
            yield "not UTF-8", name, content.replace(b"{", b'{"\xff\xfe": 1, ', 1)
            yield "a lone surrogate", name, content.replace(b"{", b'{"\\ud800": "\\udfff", ', 1)
            yield "NaN and Infinity", name, content.replace(b"{", b'{"x": NaN, "y": -Infinity, ', 1)
        if name.endswith(".safetensors"):
            yield from hostile_tensors(name, content)
    name = "single/config.json"
    config = json.loads(originals[name])
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        for value in (10**9, 2**63, 10**300, 0, -1, True, 2.5, "3", math.nan):
            yield f"{key} {value}", name, json.dumps(config | {key: value}).encode()
    odd = {"head_dim": 1, "num_attention_heads": 96, "num_key_value_heads": 32}  # which fit the tensors' shapes
    yield "heads of one dimension", name, json.dumps(config | odd).encode()
    yield "heads of any number", name, json.dumps(config | {"num_attention_heads": 5}).encode()
    for key in ("rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "dtype", "torch_dtype"):
        for value in (math.nan, math.inf, -1, 0, "int8", "nn", [], {"rope_theta": math.nan}, {"rope_theta": "x"}):
            yield f"{key} {value}", name, json.dumps(config | {key: value}).encode()
    for key in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        for value in (math.nan, math.inf, -1, 0, "x", 1.0, 4.0):
            rope = config["rope_parameters"] | {key: value}
            yield f"rope {key} {value}", name, json.dumps(config | {"rope_parameters": rope}).encode()
    name = "single/generation_config.json"
    for key in ("eos_token_id", "repetition_penalty"):
        for value in ("1", 1.5, 0, -1, True, [[]], [None], ["1"], {"1": 1}, math.nan, math.inf):
            yield f"{key} {value}", name, json.dumps({key: value}).encode()
    name = "sharded/model.safetensors.index.json"
    index = json.loads(originals[name])
    for value in ([], None, {"a": 1}, {"a": None}, {"a": ""}, {"a": "."}, {"a": ".."}, {"a": "/dev/zero"}, {"a": "\0"}):
        yield f"weight_map {value}", name, json.dumps(index | {"weight_map": value}).encode()
    name = "adapter/adapter_config.json"
    config = json.loads(originals[name])
    for key in ("r", "lora_alpha", "lora_dropout"):
        for value in (10**9, 2**63, 10**400, 0, -1, 4.0, 2.5, "3", math.nan, math.inf, True, None):
            yield f"{key} {value}", name, json.dumps(config | {key: value}).encode()
    name, text = "single/tokenizer.json", originals["single/tokenizer.json"]
    parsed = json.loads(text)
    panics = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    yield "a normalizer that panics", name, json.dumps(parsed | {"normalizer": panics}).encode()
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    yield "a pattern that backtracks", name, json.dumps(parsed | {"pre_tokenizer": slow}).encode()
    wrong = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    yield "a pattern that is none", name, json.dumps(parsed | {"pre_tokenizer": wrong}).encode()
    model = {"type": "WordLevel", "vocab": {"a": 0, "<|end_of_text|>": 1}, "unk_token": "none"}
    yield "words without an unknown", name, json.dumps(parsed | {"model": model}).encode()
    model = {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": False}
    yield "unigrams without an unknown", name, json.dumps(parsed | {"model": model}).encode()
    model = parsed["model"] | {"vocab": parsed["model"]["vocab"] | {"a": 5, "b": 5}}
    yield "two tokens of one id", name, json.dumps(parsed | {"model": model}).encode()
    name, text = "rows/rows.jsonl", originals["rows/rows.jsonl"]
    for what, line in {
        "not UTF-8": b'{"instruction": "a", "output": "\xff"}',
        "a lone surrogate": b'{"instruction": "a", "output": "\\ud800"}',
        "a lone surrogate as a column": b'{"\\ud800": "a", "output": "b"}',
        "a NUL byte": b'{"instruction": "a", "output": "b\0"}',
        "a NUL that is spelled": b'{"instruction": "a\\u0000", "output": "b\\u0000"}',
        "nested 100,000 deep": deep,
        "messages nested deep": b'{"messages": ' + deep + b"}",
        "a tree of 2,000 replies": b'{"prompt": '
        + b'{"role": "prompter", "text": "a", "replies": [' * 2000
        + b"]}" * 2000
        + b"}",
        "a number of 5,000 digits": b'{"instruction": "a", "output": "b", "x": ' + b"9" * 5000 + b"}",
        "a list": b"[1, 2]",
        "a duplicate key": b'{"instruction": "a", "output": "b", "output": "c"}',
        "turns that are none": b'{"messages": [1, null]}',
        "no turns": b'{"messages": []}',
        "a role that is a list": b'{"messages": [{"role": ["user"], "content": "a"}]}',
        "a message a row, of a list": b'{"message_id": [], "parent_id": {}, "text": "a", "role": "prompter"}',
    }.items():
        yield what, name, text + line
    yield "a message a row, of a list, alone", name, line


def hostile_tensors(name: str, content: bytes) -> Iterator[tuple[str, str, bytes]]:
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    for value in (2**63, 2**64 - 1, 2**40, 100_000_001, 1, 0):
        yield f"a header of {value} bytes", name, struct.pack("<Q", value) + content[8:]
    tensor = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    entry = header[tensor]
    start, end = entry["data_offsets"]
    for what, change in {
        "offsets that overlap": {"data_offsets": [0, end - start]},
        "offsets out of range": {"data_offsets": [start + 2**40, end + 2**40]},
        "offsets that run backwards": {"data_offsets": [end, start]},
        "offsets below zero": {"data_offsets": [-8, end]},
        "offsets of 2^64": {"data_offsets": [2**64 - 1, 2**64]},
        "a shape that overflows": {"shape": [2**33, 2**33]},
        "a shape of none by many": {"shape": [0, 10**18], "data_offsets": [start, start]},
        "a shape below zero": {"shape": [-1, -(end - start) // 4]},
        "a shape of 10,000 ones": {"shape": [1] * 10_000 + entry["shape"]},
        "a scalar": {"shape": []},
        "whole numbers": {"dtype": "I32"},
        "no dtype of any kind": {"dtype": "F33"},
        "complex numbers": {"dtype": "C64", "shape": [*entry["shape"][:-1], entry["shape"][-1] // 2]},
        "numbers of eight bits": {"dtype": "F8_E4M3", "shape": [*entry["shape"][:-1], 4 * entry["shape"][-1]]},
    }.items():
        yield what, name, pack(json.dumps(header | {tensor: entry | change}).encode(), body)
    yield "a name of escapes", name, pack(json.dumps(header | {"\x1b[2J\n\u202e": header[tensor]}).encode(), body)
    yield "metadata that is no text", name, pack(json.dumps(header | {"__metadata__": {"seconds": 1}}).encode(), body)
    for seconds in ("x", "nan", "-1", ""):
        metadata = {"__metadata__": {"seconds": seconds}}
        yield f"seconds {seconds}", name, pack(json.dumps(header | metadata).encode(), body)
    doubled = json.dumps(header)[:-1] + f', "{tensor}": {json.dumps(entry)}}}'
    yield "a tensor twice", name, pack(doubled.encode(), body)
    yield "nested 100,000 deep", name, pack(b'{"a":' + b"[" * 100_000, body)


# ------------------------------------------------------------------------------------------------------- the cases


def kilobytes(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def read(check: Callable, path: Path) -> dict:
    """How one case ends."""
    signal.setitimer(
        signal.ITIMER_PROF, SECONDS
    )  # nobody handles it, so it ends the process, in whichever library it is
    try:
        with contextlib.redirect_stdout(None):
            check(path.parent)
        return {"outcome": "loaded"}
    except UserError as mistake:
        names_it = re.match("the tokenizer cannot (en|de)code|.*" + re.escape(str(path.parent)) + ".{9}", str(mistake))
        return {"outcome": "refused" if names_it else "failed", "message": str(mistake)}
    except BaseException:  # where Rust panics, it is one that is no Exception
        return {"outcome": "failed", "message": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(folder: Path, seed: int, cases: int):
    global base, tokenizer
    base, tokenizer = load_model(folder / "single"), data.load_tokenizer(folder / "single")
    originals = {name: (folder / name).read_bytes() for name in TARGETS}
    for name, check in TARGETS.items():
        check((folder / name).parent)  # as they are, all load
    resource.setrlimit(resource.RLIMIT_AS, (kilobytes("VmSize") * 1024 + MEMORY, resource.RLIM_INFINITY))
    started = kilobytes("VmRSS")
    rng, names = random.Random(seed), list(TARGETS)
    todo = [("random", name, damage(name, originals[name], rng)) for name in (names * cases)[:cases]]
    for what, name, content in [*todo, *hostile(originals)]:
        print(json.dumps({"case": what, "file": name}), end="\t", flush=True)
        (folder / name).write_bytes(content)
        print(json.dumps(read(TARGETS[name], folder / name)), flush=True)
        (folder / name).write_bytes(originals[name])
    print(json.dumps({"peak_mb": round((kilobytes("VmHWM") - started) / 1024)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
