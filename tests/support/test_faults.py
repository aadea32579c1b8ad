"""Faults, one line each, and what must happen: a mistake of the user's ends with status 2 and a line that says so."""

import errno
import gzip
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from benchmark_rows import write_benchmarks
from conftest import BOS, EOS, PATIENCE, checkpoints_in, edit_json, make_checkpoint, make_tokenizer, write_rows
from hub import serve
from hypothesis import given, settings, strategies
from safetensors.torch import load_file, save_file
from test_runs import torchrun

import data
import evaluate
import lora
import train
from model import load_model
from paper import frozen, visualize
from sstoken import share_of
from support import files, ranks, runs, start
from support.files import UserError

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("paper/*.py")])
    if "run_script(main)" in path.read_text(encoding="utf-8")
]
SETTINGS = "--batch-size 4 --lora-rank 4 --dtype float32 --device cpu".split()


def end(main, argv, capsys) -> tuple[int, list[str]]:
    """Run a script in this process: its exit status, and the lines that it left on stderr."""
    capsys.readouterr()
    status = 0
    try:
        start.run_script(lambda: main([str(word) for word in argv]))
    except SystemExit as stop:
        status = stop.code
    return status, seen(capsys.readouterr().err)


def seen(stderr: str | bytes) -> list[str]:
    """The lines that a terminal shows: of a progress bar, its last state."""
    text = stderr if isinstance(stderr, str) else stderr.decode()
    return [line.rpartition("\r")[2] for line in text.strip().split("\n")]


def assert_refused(status: int, lines: list[str], words: str):
    text = "\n".join(lines)
    assert status == 2 and len(lines) <= 3 and "Traceback" not in text, text
    assert lines[-1].startswith("error: ") and words in lines[-1], text


# ------------------------------------------------------------------------------------------ what the table is made of


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A sharded checkpoint, rows, benchmarks and adapters that are all in order."""
    folder = tmp_path_factory.mktemp("originals")
    make_checkpoint(folder / "model", "qwen2", shard_size="100KB")
    make_checkpoint(folder / "wider", "qwen2", hidden_size=96)
    for name, base in (("adapter", "model"), ("adapter of wider", "wider")):
        lora.save_adapter(lora.add_lora(load_model(folder / base), rank=4), folder / name)
    write_rows(folder / "rows.jsonl")
    write_benchmarks(folder / "benchmarks")
    return folder


@pytest.fixture
def place(originals, tmp_path, monkeypatch):
    """Copies to break: `at / "model"`, `at / "rows.jsonl"`, ...; flags: more of them; patch: pytest's monkeypatch."""
    shutil.copytree(originals, tmp_path / "at")
    return SimpleNamespace(at=tmp_path / "at", model=tmp_path / "at" / "model", flags=[], patch=monkeypatch)


def train_command(place) -> list:
    given = {"--model": place.model, "--data": place.at / "rows.jsonl", "--out": place.at / "out"}
    return [*sum(given.items(), ()), *SETTINGS, *place.flags]


def evaluate_command(place) -> list:
    given = {"--model": place.model, "--data": place.at / "benchmarks", "--tasks": "arc_easy", "--limit": 1}
    return [*sum(given.items(), ()), "--device", "cpu", *place.flags]


INDEX, NORM = "model.safetensors.index.json", "model.norm.weight"


def holding(place, tensor: str) -> Path:
    return place.model / json.loads((place.model / INDEX).read_text())["weight_map"][tensor]


def tensors(name, change):
    """Change tensor `name`: change(the tensors of its shard)."""

    def apply(place):
        path = holding(place, name)
        content = load_file(path)
        change(content)
        save_file(content, path)

    return apply


def content(file, change):
    """Change the bytes of a file of the model."""
    return lambda place: (place.model / file).write_bytes(change((place.model / file).read_bytes()))


def shard(change):
    """Change the bytes of the shard that holds the last norm."""
    return lambda place: content(holding(place, NORM).name, change)(place)


def js(file, **changes):
    return lambda place: edit_json(place.model / file, lambda value: value.update(changes))


def listed(**changes):
    """Change what the index says."""
    names = {name.replace("__", "."): file for name, file in changes.items()}
    return lambda place: edit_json(place.model / INDEX, lambda value: value["weight_map"].update(names))


def gone(pattern):
    return lambda place: [path.unlink() for path in place.model.glob(pattern)]


def unlisted(tensor):
    """The index says nothing of one tensor."""
    return lambda place: edit_json(place.model / INDEX, lambda value: value["weight_map"].pop(tensor))


def both(*changes):
    return lambda place: [change(place) for change in changes]


def listed_twice(place):
    listed(extra=holding(place, NORM).name)(place)


def smaller_vocabulary(place):
    js("config.json", vocab_size=300)(place)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors(name, lambda held, name=name: held.update({name: held[name][:300].clone()}))(place)


def only_pickled(place):
    gone("*.safetensors*")(place)
    (place.model / "pytorch_model.bin").write_bytes(b"\x80\x02")


def link_out(place):
    """The shard is a link to a file that lies elsewhere, whole as it is."""
    shard = holding(place, NORM)
    shard.rename(place.at / "elsewhere.safetensors")
    shard.symlink_to(place.at / "elsewhere.safetensors")


def as_in_the_cache(place):
    repository = place.at / "models--who--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").mkdir()
    place.model.rename(repository / "snapshots" / "c0ffee")
    place.model = repository / "snapshots" / "c0ffee"
    for file in list(place.model.iterdir()):
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(Path("../../blobs") / file.name)


def text(value):
    return lambda place: (place.at / "rows.jsonl").write_bytes(value if isinstance(value, bytes) else value.encode())


def rows(*given):
    return text("".join(json.dumps(row) + "\n" for row in given))


def says(*messages):
    return rows({"messages": list(messages)})


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def flags(*more):
    return lambda place: place.flags.extend(str(word).replace("AT", str(place.at)) for word in more)


def refuses(what, reason):
    """The system refuses to do something to OUT: what it says on a read-only file system."""

    def apply(place):
        real = getattr(Path, what)

        def refuse(path, *given, **named):
            if path.is_relative_to(place.at / "out"):
                raise OSError(reason, os.strerror(reason), str(path))
            return real(path, *given, **named)

        place.patch.setattr(Path, what, refuse)

    return apply


def write(place, file, content):
    (place.at / file).parent.mkdir(exist_ok=True)
    (place.at / file).write_text(content)


def norm(change):
    return tensors(NORM, change)


def adapter_says(**changes):
    return lambda place: edit_json(place.at / "adapter" / "adapter_config.json", lambda config: config.update(changes))


def adapter_holds(change):
    """Change which tensors the adapter's file has."""

    def apply(place):
        path = place.at / "adapter" / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return apply


half_of_the_adapter = adapter_holds(lambda held: {k: v for k, v in held.items() if "k_proj" not in k and "up" not in k})
no_tensors = adapter_holds(lambda held: {})


def pickled_adapter(place):
    (place.at / "adapter" / "adapter_model.safetensors").rename(place.at / "adapter" / "adapter_model.bin")


def pipe(place):
    shard = holding(place, NORM)
    shard.unlink()
    os.mkfifo(shard)


def only_the_parts(place):
    gone("tokenizer.json")(place)
    (place.model / "vocab.json").write_text("{}")
    (place.model / "merges.txt").write_text("")


def packed_and_cut(place):
    (place.at / "rows.jsonl.gz").write_bytes(gzip.compress((place.at / "rows.jsonl").read_bytes())[:-20])
    flags("--data", "AT/rows.jsonl.gz")(place)


# -------------------------------------------------------------------------------------------------------- the table
# (fault, how it comes about, words of the error)

NOT_WHOLE, OUTSIDE = "is not a whole safetensors file", "which is not a file of its own folder"
# fmt: off
MODEL = [  # both scripts refuse these
    ("folder missing", flags("--model", "no/where/at/all"), "no/where/at/all is neither a local folder nor available"),
    ("path missing", flags("--model", "AT/nowhere"), "at/nowhere is neither a local folder nor available"),
    ("no config", gone("config.json"), "model has no config.json"),
    ("config is not JSON", content("config.json", lambda b: b[:-9]), "config.json cannot be read as JSON"),
    ("config is a list", content("config.json", lambda b: b"[]"), "config.json holds no JSON object"),
    ("model_type unknown", js("config.json", model_type="gpt2"), "model_type gpt2 is not one of"),
    ("no weights", gone("*.safetensors*"), "model has no model.safetensors"),
    ("only pickled weights", only_pickled, "only pytorch_model.bin: pickled weights can run any program"),
    ("shard missing", lambda place: holding(place, NORM).unlink(), NOT_WHOLE),
    ("shard truncated", shard(lambda b: b[:-10]), NOT_WHOLE),
    ("shard longer than it says", shard(lambda b: b + b"more"), NOT_WHOLE),
    ("shard empty", shard(lambda b: b""), NOT_WHOLE),
    ("header shorter than it says", shard(lambda b: b"\x05" + b[1:]), NOT_WHOLE),
    ("header longer than the file", shard(lambda b: b"\xff" * 7 + b"\x7f" + b[8:]), NOT_WHOLE),
    ("header is not JSON", shard(lambda b: b[:8] + b"?" + b[9:]), NOT_WHOLE),
    ("index is not JSON", content(INDEX, lambda b: b[:-9]), "index.json cannot be read as JSON"),
    ("index without a map", js(INDEX, weight_map=[NORM]), "index.json has no weight_map"),
    ("index puts a tensor in no file", js(INDEX, weight_map={NORM: None}), "index.json has no weight_map"),
    ("index names a shard that is not there", listed(model__norm__weight="x.safetensors"), "x.safetensors is not a"),
    ("index lacks a tensor", unlisted(NORM), "puts model.norm.weight in None, the shards in model-0"),
    ("index has one too many", listed_twice, "puts extra in"),
    ("index leads up", listed(model__norm__weight="../../x"), f"names ../../x, {OUTSIDE}"),
    ("index leads to a root", listed(model__norm__weight="/etc/passwd"), f"names /etc/passwd, {OUTSIDE}"),
    ("index names a shard by its whole path",
        lambda p: listed(model__norm__weight=str(holding(p, NORM)))(p), OUTSIDE),
    ("index names the folder above", listed(model__norm__weight=".."), NOT_WHOLE),
    ("index names a pipe, which nothing comes out of", pipe, NOT_WHOLE),
    ("only a part of a tied head's names", js("config.json", tie_word_embeddings=True), "lm_head.weight differs from"),
    ("model is an adapter", flags("--model", "AT/adapter"), "adapter is an adapter of "),
    ("only the parts of a tokenizer", only_the_parts, "has no tokenizer.json; transformers may make it"),
    ("tensor of another shape", norm(lambda t: t.update({NORM: torch.ones(47)})), "has shape [47], the config asks"),
    ("tensor missing", both(norm(lambda t: t.pop(NORM)), unlisted(NORM)), "no tensor model.norm.weight"),
    ("config of a larger model", js("config.json", hidden_size=96), "the config asks for [400, 96]"),
    ("tokenizer missing", gone("tokenizer.json"), "model has no tokenizer.json"),
    ("tokenizer_config missing", gone("tokenizer_config.json"), "model has no tokenizer_config.json"),
    ("tokenizer broken", content("tokenizer.json", lambda b: b[:-9]), "tokenizer.json cannot be read"),
    ("no end of text", js("tokenizer_config.json", eos_token=None), "eos_token None is no token of the vocabulary"),
    ("end of text unknown", js("tokenizer_config.json", eos_token="<x>"), "eos_token '<x>' is no token of the vocab"),
    ("vocabulary larger than the embedding", smaller_vocabulary, "the embedding"),
    ("no chat template", flags("--template", "model"), "model has no chat template: leave --template out"),
    ("a chat template that is none", both(js("tokenizer_config.json", chat_template="{% if"),
        flags("--template", "model")), "the chat template of "),
]

EXCHANGE, ALPACA = {"prompt": "Q", "completion": "A"}, {"instruction": "Q", "output": "A"}
DATA = [
    ("file missing", flags("--data", "AT/no.jsonl"), "no.jsonl cannot be read: [Errno 2]"),
    ("file is of no known kind", flags("--data", "AT/model/config.txt"), "config.txt is neither a local folder"),
    ("a table without rows", both(lambda place: write(place, "t.csv", "a,b"), flags("--data", "AT/t.csv")), "no rows"),
    ("a table of other columns", both(lambda place: write(place, "t.csv", "a,b\n1,2"), flags("--data", "AT/t.csv")),
        "t.csv, row 1: columns a, b fit no schema"),
    ("a table with a field too many",
        both(lambda place: write(place, "t.csv", "prompt,completion\n1,2,3"), flags("--data", "AT/t.csv")),
        "t.csv, line 2: not 2 columns"),
    ("a table with an open quote",
        both(lambda place: write(place, "t.csv", 'prompt,completion\n1,"2'), flags("--data", "AT/t.csv")),
        "t.csv cannot be read: unexpected end of data"),
    ("a file of another kind", both(lambda place: write(place, "t.txt", "Q"), flags("--data", "AT/t.txt")),
        "t.txt is no .parquet, .arrow, .jsonl, .ndjson, .csv, .json file"),
    ("a packed file that is cut", packed_and_cut, "rows.jsonl.gz cannot be read: Compressed file ended"),
    ("a file with a split", flags("--data", "AT/rows.jsonl:test"), "is one file, it has no split test"),
    ("a folder without rows", flags("--data", "AT/benchmarks:train"), "csv, json file of a split named train"),
    ("an address", flags("--data", "https://example.org/rows.jsonl"), "is no file, no folder, and no NAME, NAME:"),
    ("rows under two names", text('{"data": [], "train": []}'), "row 1: columns data, train fit no schema"),
    ("an earlier turn that is no pair", rows(ALPACA | {"history": [["Q"]]}), "row 1: history is no list of [quest"),
    ("tools", rows({"messages": [], "tools": [{"name": "f"}]}), "row 1: column tools beside messages changes what is"),
    ("a preference", rows(EXCHANGE | {"label": False}), "column label beside prompt/completion says"),
    ("input and context", rows(ALPACA | {"input": "I", "context": "C"}), "row 1: both input and context"),
    ("two system messages", rows({"messages": [{"role": "system", "content": "S"}], "system": "T"}), "row 1: a column"),
    ("a call of a tool", says(user("Q"), assistant("") | {"tool_calls": [{"id": 1}]}), "key tool_calls of a me"),
    ("a weight between", says(user("Q"), assistant("A") | {"weight": 0.5}), "row 1: a message has weight 0.5"),
    ("a user to be supervised", says(user("Q") | {"train": True}, assistant("A")), "message has train True: only"),
    ("weights that disagree", says(user("Q"), assistant("A") | {"weight": 1, "train": False}), "1, train False, wh"),
    ("empty", text(""), "rows.jsonl has no rows"),
    ("blank lines only", text("\n\n"), "rows.jsonl has no rows"),
    ("not UTF-8", text('{"prompt": "caf\u00e9", "completion": "A"}'.encode("latin-1")), "'utf-8' codec can't decode"),
    ("a broken line", text(json.dumps(EXCHANGE) + '\n\n{"prompt": \n'), "rows.jsonl, line 3: not JSON"),
    ("a row is no object", rows(EXCHANGE, "text"), "row 2: a str, not an object with columns"),
    ("unknown schema", rows({"question": "Q", "answer": "A"}),
        "row 1: columns answer, question fit no schema (messages; conversations; prompt/completion; instruction/out"),
    ("half of the rows of no schema", rows(EXCHANGE, {"prompt": "Q"}), "row 2: columns prompt fit no schema (messages"),
    ("messages are no list", rows({"messages": "Q"}), "row 1: messages is no list of messages, nor its JSON, nor"),
    ("messages of two forms", rows({"messages": ["Q", {}]}), "row 1: a message is str, not an object with a role"),
    ("two answers to one question", rows(ALPACA | {"output": ["A", "B"]}), "row 1: a message is str, not an object"),
    ("role unknown", says(user("Q"), {"role": "tool", "content": "A"}), "row 1: role 'tool' is not system, user or"),
    ("content null", says(user("Q"), assistant(None)), "row 1: the assistant's content is NoneType, not text"),
    ("content a list of texts", says(user(["Q"]), assistant("A")), "the user's content is list, not text"),
    ("an image", says(user([{"type": "image", "url": "Q"}]), assistant("A")), "has a part of type image, not text"),
    ("nothing to supervise", says(user("Q")), "no response token within 2048 tokens in any of 1 samples"),
    ("no messages at all", says(), "no response token within 2048 tokens in any of 1 samples"),
    ("a prompt of 10 MB", says(user("word " * 2_000_000), assistant("A")), "no response token within 2048 tokens"),
    ("longer than the model reads", says(user("Q"), assistant("word " * 9999)), "lower --max-length to 512"),
]

FLAGS = [
    ("rho 0", flags("--rho", "0"), "--rho is 0.0; it must be in (0, 1]"),
    ("rho above 1", flags("--rho", "1.01"), "--rho is 1.01; it must be in (0, 1]"),
    ("rho not a number", flags("--rho", "nan"), "--rho is nan; it must be in (0, 1]"),
    ("gamma below 0", flags("--gamma", "-0.1"), "--gamma is -0.1; it must be in [0, 1]"),
    ("gamma above 1", flags("--gamma", "1.5"), "--gamma is 1.5; it must be in [0, 1]"),
    ("a layer that does not exist", flags("--layer", "3"), "layer 3 does not exist: layers are 0 to 2"),
    ("the same from the end", flags("--layer", "-4"), "layer -4 does not exist: layers are 0 to 2"),
    ("warm-up over 1", flags("--warmup-ratio", "1.1"), "--warmup-ratio is 1.1; it must be in [0, 1]"),
    ("batches that do not divide", flags("--micro-batch-size", "3"), "--micro-batch-size 3 does not divide --batch-s"),
    ("a flag that does not exist", flags("--roh", "0.5"), "unrecognized arguments: --roh"),
    ("a value of another kind", flags("--batch-size", "many"), "argument --batch-size: invalid int value: 'many'"),
    ("held-out losses without held-out rows", flags("--eval-every", "2"), "--eval-every measures the loss of held-out"),
    ("resume and overwrite", flags("--resume", "--overwrite"), "--resume goes"),
    ("a reference of another base", flags("--method", "rho1", "--reference", "AT/adapter of wider"),
        "has shape [96, 4], not [48, 4]"),
    ("a reference that is not whole", both(half_of_the_adapter, flags("--method", "rho1", "--reference", "AT/adapter")),
        "12 of 42 tensors are missing"),
    ("a reference that is neither", flags("--method", "rho1", "--reference", "AT/benchmarks"), "holds neither an ada"),
    ("a cache in a file", flags("--cache", "AT/rows.jsonl/cache"), "cache/losses cannot be written (Not a directory)"),
]

OUT = [
    ("another run", lambda place: write(place, "out/run.json", "{}"), "holds another run (run.json): choose another"),
    ("another's checkpoint", lambda place: write(place, f"out/{runs.CHECKPOINT.format(1)}", ""), "--resume or --over"),
    ("a file", lambda place: write(place, "out", ""), "out/run.json cannot be written (File exists)"),
    ("in a file", both(lambda place: write(place, "x", ""), flags("--out", "AT/x/out")), "cannot be written (Not a di"),
    ("read-only above", refuses("mkdir", errno.EROFS), "out/run.json cannot be written (Read-only file system)"),
    ("read-only", refuses("write_text", errno.EROFS), "out/run.json cannot be written (Read-only file system)"),
    ("read-only, seen at the first try", refuses("touch", errno.EROFS), "out/run.json cannot be written (Read-only"),
    ("someone else's", refuses("write_text", errno.EACCES), "out/run.json cannot be written (Permission denied)"),
]

ADAPTER = [  # of evaluate.py
    ("missing", flags("--adapter", "AT/nothing"), "nothing is neither a local folder nor available from the hub"),
    ("no adapter", flags("--adapter", "AT/benchmarks"), "benchmarks has no adapter_config.json"),
    ("a whole model", flags("--adapter", "AT/model"), "has no adapter_config.json, but config.json: a whole model"),
    ("half of it", both(half_of_the_adapter, flags("--adapter", "AT/adapter")), "12 of 42 tensors are missing"),
    ("a header alone", both(no_tensors, flags("--adapter", "AT/adapter")), "42 of 42 tensors are missing"),
    ("pickled", both(pickled_adapter, flags("--adapter", "AT/adapter")), "has only adapter_model.bin: pickled w"),
    ("something new switched on", both(adapter_says(use_new=True), flags("--adapter", "AT/adapter")), "use_new True"),
    ("the second of two", flags("--adapter", "AT/adapter", "--adapter", "AT/nothing"), "nothing is neither a local"),
    ("trained in another template than the other", both(
        lambda place: write(place, "adapter/run.json", '{"arguments": {"template": "model"}}'),
        flags("--adapter", "AT/adapter", "--adapter", "AT/adapter of wider")), "trained in different templates"),
    ("of another base", flags("--adapter", "AT/adapter of wider"), "has shape [96, 4], not [48, 4]"),
    ("of another rank", both(adapter_says(r=8), flags("--adapter", "AT/adapter")), "has shape [4, 96], not [8, 96]"),
    ("without weights", both(lambda place: (place.at / "adapter" / "adapter_model.safetensors").unlink(),
        flags("--adapter", "AT/adapter")), NOT_WHOLE),
    ("folder of the results missing", flags("--out", "AT/rows.jsonl/results.json"), "cannot be written (File exists)"),
]
# fmt: on


def cases(table):
    return pytest.mark.parametrize("change, words", [pytest.param(*rest, id=name) for name, *rest in table])


@cases(MODEL)
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_broken_model_is_refused(place, capsys, script, change, words):
    change(place)
    main, command = {"train": (train.main, train_command), "evaluate": (evaluate.main, evaluate_command)}[script]
    assert_refused(*end(main, command(place), capsys), words)
    assert not (place.at / "out").exists()  # so the corrected command can be run at once


@cases(DATA + FLAGS)
def test_data_and_flags_that_cannot_work_are_refused(place, capsys, change, words):
    change(place)
    assert_refused(*end(train.main, train_command(place), capsys), words)
    assert not list((place.at / "out").glob("*"))


@cases(OUT)
def test_a_folder_that_cannot_take_the_run_is_refused(place, capsys, change, words):
    change(place)
    before = {path: path.read_bytes() for path in (place.at / "out").rglob("*")}
    assert_refused(*end(train.main, train_command(place), capsys), words)
    assert {path: path.read_bytes() for path in (place.at / "out").rglob("*")} == before


@cases(ADAPTER)
def test_an_adapter_that_does_not_fit_is_refused(place, capsys, change, words):
    change(place)
    assert_refused(*end(evaluate.main, evaluate_command(place), capsys), words)


@pytest.mark.parametrize("change", [as_in_the_cache, link_out])
def test_nothing_is_wrong_with_the_originals_nor_with_links_as_the_hub_s_client_makes_them(place, capsys, change):
    change(place)
    assert end(train.main, [*train_command(place), "--max-steps", "1"], capsys)[0] == 0
    assert end(evaluate.main, evaluate_command(place), capsys)[0] == 0


# ------------------------------------------------------------------------------------------------- how scripts end


@pytest.mark.parametrize("script", SCRIPTS)
def test_debug_shows_the_traceback_of_a_mistake(script, monkeypatch, capsys):
    main = importlib.import_module(script).main
    status, lines = end(main, ["--no-such-flag"], capsys)
    assert_refused(status, lines, "--help")
    monkeypatch.setattr(sys, "argv", [script, "--no-such-flag", "--debug"])
    status, lines = end(main, sys.argv[1:], capsys)
    assert status == 2 and lines[0] == "Traceback (most recent call last):" and lines[-1].startswith("error: ")


def test_debug_shows_what_a_mistake_was_made_from(place, capsys):
    (place.at / "rows.jsonl").unlink()
    status, plain = end(train.main, train_command(place), capsys)
    assert_refused(status, plain, "rows.jsonl cannot be read")
    command = [sys.executable, str(ROOT / "train.py"), *map(str, train_command(place)), "--debug"]
    debug = subprocess.run(command, capture_output=True)
    assert debug.returncode == 2 and seen(debug.stderr)[-1] == plain[-1]
    assert b"FileNotFoundError: [Errno 2]" in debug.stderr and b"in find_files\n" in debug.stderr


@pytest.mark.slow  # three processes that import torch
def test_the_hub_s_reason_comes_with_the_next_step(originals, tmp_path):
    repositories = {("model", "who/tiny", "main"): originals / "model"}

    def start(name, environment):
        command = [sys.executable, str(ROOT / "train.py"), "--model", name, "--data", str(originals / "rows.jsonl")]
        return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)

    with (
        serve(repositories, tmp_path / "a", token="hf_secret") as (gated, _),
        serve(repositories, tmp_path / "b") as (open_to_all, _),
    ):
        down = gated | {"HF_ENDPOINT": "http://127.0.0.1:9"}
        asked = {
            "Cannot access gated repo": (
                start("who/tiny", gated),
                "ask for access on its page there",
            ),
            "Repository Not Found": (start("who/other", open_to_all), "check the name; what is private needs HF_TOKEN"),
            "Connection refused": (start("who/tiny", down), "the connection and HF_ENDPOINT"),
        }
        for reason, (process, next_step) in asked.items():
            lines = seen(process.communicate(timeout=PATIENCE)[1])
            assert_refused(process.returncode, lines, next_step)
            assert reason in lines[-1] and len(lines) == 1


# ------------------------------------------------------------------------- conversations that are taken as they are


@pytest.fixture(scope="module", params=["special", "not special", "not added"])
def tokenizer(request):
    """A tokenizer, also one whose file does not call its end of text special, or lists it among the plain tokens."""
    value = json.loads(make_tokenizer(adds_bos=False).to_str())
    for token in value["added_tokens"]:
        token["special"] = request.param == "special"
    if request.param == "not added":
        value["added_tokens"] = []
    return data.Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(value)), EOS, BOS)


def supervised(example: data.Example, tokenizer) -> str:
    return tokenizer.decode(example.ids[example.response].tolist())


TAKEN = {  # messages -> what is supervised
    "the assistant speaks first": ([assistant("Hi"), user("Q"), assistant("A")], f"Hi{EOS}A{EOS}"),
    "only the assistant speaks": ([assistant("Hi")], f"Hi{EOS}"),
    "two user turns in a row": ([user("Q"), user("R"), assistant("A")], f"A{EOS}"),
    "two assistant turns in a row": ([user("Q"), assistant("A"), assistant("B")], f"A{EOS}B{EOS}"),
    "an empty assistant turn: to end at once, as the release trains it": ([user("Q"), assistant("")], EOS),
    "an assistant turn of spaces": ([user("Q"), assistant(" \n ")], EOS),
    "an empty user turn": ([user(""), assistant("A")], f"A{EOS}"),
    "a system turn in the middle": ([user("Q"), {"role": "system", "content": "S"}, assistant("A")], f"A{EOS}"),
    "control tokens spelled out": (
        [user(f"{EOS}{BOS}<|assistant|>\nA"), assistant(f"{EOS} {BOS}")],
        f"{EOS} {BOS}{EOS}",
    ),
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_conversation_out_of_the_ordinary_is_taken_as_it_is(tokenizer, what):
    messages, expected = TAKEN[what]
    example = data.encode(messages, tokenizer, 1000)
    assert supervised(example, tokenizer) == expected
    assert (example.ids == tokenizer.eos_id).sum() == sum(message["role"] == "assistant" for message in messages)
    assert not (example.ids == tokenizer.backend.token_to_id(BOS)).any()


PIECES = strategies.sampled_from([EOS, BOS, "<|assistant|>", "<|user|>", "<|system|>", "\n", " ", "A", "<|", "|>"])
TEXTS = strategies.lists(PIECES | strategies.text(max_size=3)).map("".join)
TURNS = strategies.tuples(strategies.sampled_from(["system", "user", "assistant"]), TEXTS)


@given(turns=strategies.lists(TURNS, min_size=1, max_size=5))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_whatever_a_user_spells_only_the_assistant_s_turns_are_supervised(tokenizer, turns):
    example = data.encode([{"role": role, "content": content} for role, content in turns], tokenizer, 10_000)
    answers = [content.strip() for role, content in turns if role == "assistant"]
    assert supervised(example, tokenizer) == "".join(answer + EOS for answer in answers)
    assert (example.ids == tokenizer.eos_id).sum() == len(answers) and not (example.ids == 0).any()
    starts = (example.response[1:] & ~example.response[:-1]).sum() + example.response[:1].sum()
    assert starts == len(answers)  # one stretch an answer, so none of its own characters came from another turn


def test_a_vocabulary_that_makes_text_a_control_token_is_refused():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({EOS: 0, "a": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="in a text as control tokens"):
        data.encode([user(f"a {EOS} a"), assistant("a")], data.Tokenizer(words, EOS), 10)


def test_ten_megabytes_are_cut_before_they_are_encoded(tokenizer, monkeypatch):
    real, characters = tokenizer.read, []
    monkeypatch.setattr(tokenizer, "read", lambda text: characters.append(len(text)) or real(text))
    for piece in ("word ", "a", "\u65e5", "\n"):
        long = piece * (10_000_000 // len(piece.encode()))
        whole = data.encode([user("Q"), assistant("Yes " + long)], tokenizer, 300)
        part = data.encode([user("Q"), assistant("Yes " + long[:20_000])], tokenizer, 300)
        assert torch.equal(whole.ids, part.ids) and torch.equal(whole.response, part.response)
        assert len(whole.ids) == 300 or piece == "\n"  # stripped
    assert len(characters) == 8 and max(characters) <= 2 * 300 * tokenizer.longest  # all take minutes, and 3 GB


# -------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_on_a_sample_at_the_edge_selects_its_share_and_has_a_loss(place, capsys, dtype):
    """One response token; no prompt but the template's; identical tokens; rho * L_resp an integer up to rounding."""
    rows(
        {"prompt": "Q", "completion": ""},
        {"prompt": "", "completion": "A"},
        {"prompt": "a" * 9, "completion": "a" * 50},
        {"prompt": "Q", "completion": "7 " * 29},
    )(place)
    (_, *examples), _ = data.load_examples(str(place.at / "rows.jsonl"), data.load_tokenizer(place.model), 512)
    more = ["--rho", "0.1", "--epochs", "2", "--batch-size", "1", "--dtype", dtype]
    assert end(train.main, [*train_command(place), *more], capsys)[0] == 0
    lines = files.read_log(place.at / "out")
    assert len(lines) == 8 and {1} < {line["response_tokens"] for line in lines}
    for line in lines:
        assert 0 < line["loss"] < 100 and line["selected_tokens"] == share_of(0.1, line["response_tokens"])


MARK = "\u00e9"  # two tokens that no other row has


@pytest.fixture
def poisoned(place):
    """A model that has no number for one of the rows, which comes in the last of the five steps: the row's number."""
    order = random.Random("42 0").sample(range(20), 20)
    lines = (place.at / "rows.jsonl").read_text().splitlines()
    lines[order[-1]] = json.dumps(json.loads(lines[order[-1]]) | {"instruction": MARK}, ensure_ascii=False)
    text("\n".join(lines))(place)
    ids = data.load_tokenizer(place.model).encode(MARK)[0]
    tensors("model.embed_tokens.weight", lambda held: held["model.embed_tokens.weight"][ids].fill_(0))(place)
    path = holding(place, "model.embed_tokens.weight")
    held = load_file(path)
    held["model.embed_tokens.weight"][ids] = torch.nan
    save_file(held, path)
    return order[-1]


def assert_stopped(place, error: str, number: int, step: int = 5):
    """It says the step and its samples; log and checkpoints end before it, and hold numbers."""
    out = place.at / "out"
    assert f"step {step}: the loss is " in error and "; the last checkpoint is untouched" in error
    numbers = list(map(int, re.search(r"samples, counted from 0, are ([\d, ]+)\.", error)[1].split(", ")))
    assert number in numbers and len(numbers) == 4 and numbers == sorted(numbers)
    assert [line["step"] for line in files.read_log(out)] == list(range(1, step))
    assert max(checkpoints_in(out)).name == runs.CHECKPOINT.format(step - 1)
    assert not (out / "adapter_model.safetensors").exists() and not list(out.glob("*.tmp"))


def test_a_loss_that_is_no_number_stops_the_run_before_anything_of_it_is_kept(place, poisoned, capsys):
    command = [*train_command(place), "--checkpoint-every", "1"]
    status, lines = end(train.main, command, capsys)
    assert_refused(status, lines, "the loss is nan, the gradient's norm nan")
    assert_stopped(place, lines[-1], poisoned)
    kept = max(checkpoints_in(place.at / "out")).read_bytes()
    assert end(train.main, [*command, "--resume"], capsys)[1][-1] == lines[-1]  # it comes back to the same step
    assert max(checkpoints_in(place.at / "out")).read_bytes() == kept
    assert "holds another run" in end(train.main, command, capsys)[1][-1]


@pytest.mark.parametrize("clip", ["0", "1"])
def test_a_gradient_that_is_infinite_stops_the_run_too(place, capsys, monkeypatch, clip):
    real = ranks.sum_over_ranks

    def overflow(given):
        if len(given) > 2 and len(files.read_log(place.at / "out")) == 4:
            given[3][0, 0] = torch.inf
        return real(given)

    monkeypatch.setattr(ranks, "sum_over_ranks", overflow)
    flags("--checkpoint-every", "1", "--max-grad-norm", clip)(place)
    status, lines = end(train.main, train_command(place), capsys)
    assert status == 2 and "the gradient's norm inf" in lines[-1] and "loss is nan" not in lines[-1]
    assert_stopped(place, lines[-1], random.Random("42 0").sample(range(20), 20)[-1])


@pytest.mark.slow
def test_all_ranks_stop_where_one_of_them_has_no_number(place, poisoned):
    flags = [*SETTINGS, *"--micro-batch-size 2 --lora-dropout 0 --history base --checkpoint-every 1".split()]
    process = torchrun(2, place.model, place.at / "rows.jsonl", place.at / "out", *flags)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode not in (0, None)
    (said,) = {line for line in errors.splitlines() if line.startswith("error: ")}
    assert_stopped(place, said, poisoned)


def test_frozen_losses_that_are_no_numbers_rank_nothing(place, poisoned, capsys):
    flags("--method", "rho1", "--reference", "AT/adapter")(place)
    status, lines = end(train.main, train_command(place), capsys)
    assert_refused(status, lines, f"the loss of samples {poisoned} (from 0) is no finite number")


def only(name: str, number: float, at=...):
    """A model that is in order but for some numbers of one tensor; 100 is a token of many answers."""
    return tensors(name, lambda held: held[name].__setitem__(at, number))


@pytest.mark.parametrize("asked", ["arc_easy", "truthfulqa_mc2", "triviaqa", "--ask", "explorer", "one row"])
@pytest.mark.parametrize(
    "change",
    [
        only(NORM, torch.nan, 0),
        only("lm_head.weight", torch.nan, 100),  # the likeliest token, for who does not look
        only("model.layers.1.mlp.down_proj.weight", torch.inf),
    ],
)
def test_a_model_without_numbers_is_asked_nothing(place, capsys, change, asked):
    change(place)
    report, page = place.at / "report.json", place.at / "page.html"
    command, main = [*evaluate_command(place), "--tasks", asked, "--out", report], evaluate.main
    if asked == "--ask":
        command = ["--model", place.model, "--device", "cpu", "--ask", "hello"]
    elif asked in ("explorer", "one row"):
        command, main = ["--model", place.model, "--data", place.at / "rows.jsonl", "--out", page], visualize.main
        command += ["--device", "cpu"] + ["--limit", "1"] * (asked == "one row")
    status, lines = end(main, command, capsys)
    assert_refused(status, lines, "no finite number")
    assert str(place.model) in lines[-1] and not report.exists() and not page.exists()


def test_an_adapter_without_numbers_is_refused_and_what_was_answered_before_is_kept(place, capsys):
    shutil.copytree(place.at / "adapter", place.at / "broken")
    path = place.at / "broken" / "adapter_model.safetensors"
    save_file({name: tensor.fill_(torch.nan) for name, tensor in load_file(path).items()}, path)
    report = place.at / "report.json"
    named = ["--adapter", place.at / "adapter", "--adapter", place.at / "broken", "--out", report]
    status, lines = end(evaluate.main, [*evaluate_command(place), *named], capsys)
    assert status == 2 and lines[-1].startswith("error: ") and "no finite number" in lines[-1]

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    held = json.loads(report.read_text(), parse_constant=refuse)
    assert [bool(record["results"]) for record in held["runs"]][:2] == [True, True]


# ------------------------------------------------------------------------------------------- disks that take no more

FULL_DISK = """
import resource, sys
import train
from support import runs, start

def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # writing more fails, after what fits has been written

class Checkpoints(runs.Checkpoints):
    def write(self, step):
        if (step, sys.argv[1]) == (3, "checkpoint"):
            allow(20_000)
        super().write(step)
        if (step, sys.argv[1]) == (2, "log"):
            allow((self.folder / "log.jsonl").stat().st_size + 30)

runs.Checkpoints = Checkpoints
start.run_script(lambda: train.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["checkpoint", "log"])
def test_a_full_disk_is_named_and_the_run_goes_on_from_its_last_checkpoint(place, capsys, file):
    command = [*train_command(place), "--checkpoint-every", "1"]
    script = [sys.executable, "-c", FULL_DISK, file, *map(str, command)]
    process, out = subprocess.run(script, capture_output=True, cwd=ROOT), place.at / "out"
    name = {"checkpoint": runs.CHECKPOINT.format(3), "log": "log.jsonl"}[file]
    assert_refused(process.returncode, seen(process.stderr), f"error: {out / name} cannot be written (")
    assert "what was there before is whole: make room, or write elsewhere" in seen(process.stderr)[-1]
    assert [path.name for path in checkpoints_in(out)] == [runs.CHECKPOINT.format(step) for step in (1, 2)]
    assert not list(out.glob("*.tmp"))  # nothing half, nothing that fills the disk
    if file == "log":
        assert not (out / "log.jsonl").read_text().endswith("\n")  # half a line
    assert end(train.main, [*command, "--resume"], capsys)[0] == 0
    assert [line["step"] for line in files.read_log(out)] == [1, 2, 3, 4, 5]
    place.flags += ["--out", place.at / "whole"]
    assert end(train.main, train_command(place), capsys)[0] == 0
    adapters = [folder / "adapter_model.safetensors" for folder in (out, place.at / "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize(
    "name", ["run.json", "adapter_model.safetensors", "adapter_config.json", "merged/model.safetensors"]
)
def test_no_file_of_a_run_appears_half(place, capsys, name):
    real = files._to_disk

    def refuse(path):
        if path.name.startswith(Path(name).name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path)

    place.patch.setattr(files, "_to_disk", refuse)
    status, lines = end(train.main, [*train_command(place), "--merge", "--max-steps", "1"], capsys)
    assert_refused(status, lines, f"out/{name} cannot be written (No space left on device)")
    assert not (place.at / "out" / name).exists() and not list((place.at / "out").rglob("*.tmp"))


# ----------------------------------------------------------------------------------- what is named is opened first


@pytest.mark.parametrize("adapters", [["adapter", "nothing"], ["adapter", "adapter of wider"]])
def test_every_adapter_is_opened_before_the_first_is_asked(place, capsys, monkeypatch, adapters):
    monkeypatch.setattr(evaluate, "answer", lambda *given: pytest.fail("work before the mistake was seen"))
    named = [word for name in adapters for word in ("--adapter", place.at / name)]
    assert_refused(*end(evaluate.main, [*evaluate_command(place), *named], capsys), adapters[1])


@pytest.mark.parametrize("reference", ["half", "adapter of wider", "wider"])
def test_a_reference_is_opened_before_anything_is_scored_or_written(place, capsys, monkeypatch, reference):
    shutil.copytree(place.at / "adapter", place.at / "half")
    held = load_file(place.at / "half" / "adapter_model.safetensors")
    save_file(dict(list(held.items())[2:]), place.at / "half" / "adapter_model.safetensors")
    edit_json(place.at / "wider" / "config.json", lambda config: config.update(num_hidden_layers=4))
    monkeypatch.setattr(frozen, "response_losses", lambda *given: pytest.fail("work before the mistake was seen"))
    flags = ["--method", "rho1", "--reference", place.at / reference]
    assert_refused(*end(train.main, [*train_command(place), *flags], capsys), reference)
    assert not (place.at / "out").exists()


def test_what_a_checkpoint_s_decoding_asks_for_is_read_before_the_first_task(place, capsys, monkeypatch):
    js("generation_config.json", num_beams=4)(place)
    monkeypatch.setattr(evaluate, "answer", lambda *given: pytest.fail("work before the mistake was seen"))
    command = [*evaluate_command(place), "--tasks", "arc_easy,triviaqa"]
    assert_refused(*end(evaluate.main, command, capsys), "num_beams 4 is not implemented")
