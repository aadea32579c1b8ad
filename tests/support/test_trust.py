"""No one let in: what the sources may not use, what is written and for whom, and files that strangers have damaged."""

import argparse
import ast
import builtins
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, TEXT, checkpoints_in, make_checkpoint, write_rows
from fuzz import TARGETS

import evaluate
import lora
import train
from model import load_model
from paper import reproduce
from paper.benchmarks import TABLE
from support import command, files, losses, runs, start
from support.checkpoint import save_model
from support.files import UserError, write_json

ROOT = Path(__file__).parents[2]
FOLDERS = ("support", "paper", "demo", "results")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))])

# ------------------------------------------------------------------------------------------- what the sources use

FORBIDDEN = {
    "runs what a file holds": "torch.load torch.save torch.hub torch.package torch.jit torch.export "
    "torch.serialization pickle _pickle cPickle cloudpickle marshal shelve dill joblib pandas numpy.load yaml "
    "eval exec compile __import__ builtins importlib.import_module importlib.util importlib.machinery runpy code "
    "transformers",
    "starts a process": "subprocess multiprocessing pty os.system os.popen os.fork os.forkpty os.posix_spawn "
    "os.posix_spawnp os.startfile os.execl os.execle os.execlp os.execlpe os.execv os.execve os.execvp os.execvpe "
    "os.spawnl os.spawnle os.spawnlp os.spawnlpe os.spawnv os.spawnve os.spawnvp os.spawnvpe asyncio",
    "opens a connection": "socket socketserver ssl urllib urllib3 http requests httpx aiohttp websockets ftplib "
    "smtplib poplib imaplib telnetlib xmlrpc webbrowser wandb mlflow comet_ml tensorboard sentry_sdk posthog",
}
HUB = ("snapshot_download", "list_repo_files", "errors")  # all that is used of huggingface_hub: the one way out


def used(tree: ast.AST) -> Iterator[str]:
    """The dotted name of everything that a module uses of others and of Python, whatever it calls it itself."""
    known = {name: name for name in dir(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name
                known[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                yield f"{node.module}.{name.name}"
                known[name.asname or name.name] = f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts, node = [node.attr, *parts], node.value
        if isinstance(node, ast.Name) and node.id in known:
            yield ".".join([known[node.id], *parts])


def problems(source: str, may_start=False) -> list[str]:
    tree = ast.parse(source)
    names, found = set(used(tree)), []
    for what, forbidden in FORBIDDEN.items():
        for name in forbidden.split():
            if may_start and name == "subprocess":
                continue
            found += [f"{use} {what}" for use in names if f"{use}.".startswith(f"{name}.")]
    found += [use for use in names if use.startswith("huggingface_hub.") and use.split(".")[1] not in HUB]
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            arguments = {keyword.arg for keyword in call.keywords}
            found += [f"{name}=" for name in arguments & {"shell", "executable", "allow_pickle", "trust_remote_code"}]
            if "subprocess" in ast.unparse(call.func):
                first = call.args[0] if call.args else None
                is_list = isinstance(first, ast.List) or (
                    isinstance(first, ast.Call) and ast.unparse(first.func) == "list"
                )
                found += [] if is_list else [f"{ast.unparse(call)} takes no list"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_unpickles_evaluates_starts_a_process_or_connects(path):
    text = path.read_text(encoding="utf-8")
    found = problems(text, may_start=path.name == "reproduce.py")
    if path.name == "with_transformers.py":  # it is about other people's trainers, and runs where they are installed
        found = [
            problem for problem in found if not problem.startswith(("transformers.", "peft.", "datasets.", "trl."))
        ]
    assert found == [] and "trust_remote_code" not in text


@pytest.mark.parametrize(
    "source",
    [
        *("import torch\ntorch.load(x)", "import torch as t\nt.save(x, y)", "from torch import load as l\nl(x)"),
        *("import pickle", "from dill import loads", "import numpy as np\nnp.load(x)", "f(x, allow_pickle=True)"),
        *(
            "eval(x)",
            "f = exec",
            "compile(x, '', 'exec')",
            "__import__(x)",
            "import importlib\nimportlib.import_module(x)",
        ),
        *("import os\nos.system(x)", "from os import popen", "import subprocess\nsubprocess.run(['a'])"),
        *("import urllib.request", "from http import client", "import requests as r", "import torch.hub"),
        *("from huggingface_hub import hf_api", "f(x, trust_remote_code=True)"),
    ],
)
def test_the_check_of_the_sources_sees(source):
    assert problems(source)


def test_the_check_of_the_sources_lets_pass_what_only_looks_alike():
    fine = ["import re, torch, importlib.metadata", "re.compile(x)", "model.eval()", "model.load(x)", "requests = code"]
    fine += ["torch.compile(x)", "importlib.metadata.version(x)", "from safetensors.torch import load_file"]
    assert problems("\n".join(fine)) == []
    start = "import subprocess\nsubprocess.Popen({})"
    assert problems(start.format("list(x)"), may_start=True) == problems(start.format("['a', x]"), may_start=True) == []
    for arguments in ("'a b'", "x", "['a'], shell=True", "f'a {x}'"):
        assert problems(start.format(arguments), may_start=True)


WATCHED = """
import os, sys
import train
def watch(event, arguments):
    if event in ("pickle.find_class", "subprocess.Popen", "webbrowser.open") or event.split(".")[0] == "socket" or (
        event.startswith("os.") and event[3:] in ("system", "exec", "posix_spawn", "spawn", "fork", "forkpty")
    ):
        os.write(2, f"WATCHED {event} {arguments}\\n".encode())
sys.addaudithook(watch)
for umask in ("022", "077"):
    os.umask(int(umask, 8))
    flags = [*sys.argv[2:], "--out", f"{sys.argv[1]}/{umask}/run", "--cache", f"{sys.argv[1]}/{umask}/cache"]
    for more in (["--checkpoint-every", "1"], ["--resume", "--merge"]):
        train.main([*flags, *more])
"""


@pytest.fixture(scope="module")
def watched(llama, tmp_path_factory) -> Path:
    """A run that went on and was merged, in a folder for each of two umasks; `errors`: what it did that it may not."""
    folder = tmp_path_factory.mktemp("watched")
    flags = ["--model", llama, "--data", write_rows(folder / "rows.jsonl"), "--lora-rank", "2", "--batch-size", "8"]
    command = [sys.executable, "-c", WATCHED, folder, *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "errors").write_text(done.stderr)
    return folder


def test_training_connects_to_nobody_unpickles_nothing_and_starts_nothing(watched):
    assert "WATCHED" not in (watched / "errors").read_text()


# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("umask", ["022", "077"])
def test_files_can_be_read_by_whom_the_umask_says(watched, umask):
    folder = watched / umask
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    inside = ("run.json", "log.jsonl", "adapter_model.safetensors", "merged/model.safetensors", "merged/tokenizer.json")
    assert files.keys() > {f"run/{name}" for name in inside}
    assert len(checkpoints_in(folder / "run")) == 2 and len(list((folder / "cache").iterdir())) == 1
    for name, path in files.items():
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~int(umask, 8), name


def state_of(value: float) -> runs.Checkpoints:
    checkpoints = runs.Checkpoints(None, 1, settings={"value": value})
    checkpoints.adapters = [torch.nn.Parameter(torch.full((300,), value))]
    checkpoints.optimizer = torch.optim.AdamW(checkpoints.adapters)
    checkpoints.adapters[0].sum().backward()
    checkpoints.optimizer.step()
    checkpoints.history, checkpoints.device = SimpleNamespace(factors=None), torch.device("cpu")
    return checkpoints


def write_checkpoint(folder: Path, value: float, model):
    checkpoints = state_of(value)
    checkpoints.folder = folder
    checkpoints.write(1)


def write_report(folder: Path, value: float, model):
    report = losses.Report(folder / "out.json")
    with report.saving(report.record(f"{value}" * 40, {"model": "m", "adapter": None, "dtype": "float32"})):
        pass


WRITERS = {
    "adapter": lambda folder, value, model: lora.save_adapter(model, folder),
    "merged model": lambda folder, value, model: save_model(model, folder),
    "checkpoint": write_checkpoint,
    "losses": lambda folder, value, model: losses.kept_losses(folder, f"{value}", lambda: torch.full((500,), value)),
    "record": lambda folder, value, model: write_json(folder / "run.json", {"value": [value] * 40}),
    "log": lambda folder, value, model: files.write_lines(folder / "log.jsonl", [{"value": value}] * 40),
    "evaluation": write_report,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_leaves_whole_files(llama, tmp_path, name):
    """The old one or the new one, wherever writing stops; no file may grow beyond a limit, as on a full disk."""
    model = load_model(shutil.copytree(llama, tmp_path / "model"))
    with (model.folder / "tokenizer.json").open("a") as file:
        file.write(" " * 10**6)  # larger than the weights, so that some limit stops it and not them
    if name == "adapter":
        lora.add_lora(model, rank=2)
    contents = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir() if ".tmp" not in path.name}
    for place, value in (("old", 0.25), ("new", 0.5)):
        (tmp_path / place).mkdir()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        WRITERS[name](tmp_path / place, value, model)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    assert old and any(old.get(file) != content for file, content in new.items())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in sorted({0, 100, *(len(content) - 1 for content in new.values())}):
        folder = shutil.copytree(tmp_path / "old", tmp_path / f"{limit}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(Exception):  # noqa: B017 -- what it raises is test_faults.py's matter
                WRITERS[name](folder, 0.5, model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        for file, content in contents(folder).items():
            assert content in (old.get(file), new.get(file)), (file, limit)


# ------------------------------------------------------------------------------------ shell, path, markup, terminal


def test_a_name_is_no_markup_in_a_table_and_no_command_of_a_terminal(tmp_path, capsys):
    adapter = "runs/x|<b>[z](u)`y`_\x1b[2J\n|"
    line = evaluate.table([{"results": {}, "model": "m", "adapter": adapter}]).splitlines()[-1]
    assert r"| x\|\<b\>\[z\](u)\`y\`\_\\x1b\[2J \| | " in line and line.isprintable()
    assert command.cell("a_b-1.5B, -0.5+") == "a_b-1.5B, -0.5+"  # what is ordinary stays as it is
    assert command.cell("_a_ *b* ~c~ &amp; \\") == r"\_a\_ \*b\* \~c\~ \&amp; \\"

    line = reproduce.Line("BASE", [42], [[1.0] * (len(TABLE) + 1)], [])
    reproduce.report(argparse.Namespace(out=str(tmp_path), table=2, model="x/a|<b>"), [line], TABLE)
    assert r"Table 2, a\|\<b\>: " in (tmp_path / "table2.md").read_text(encoding="utf-8")

    def main():
        raise UserError("tensor \x1b]0;title\x07 \u202e\ud800 é\nof a file")

    with pytest.raises(SystemExit):
        start.run_script(main)
    assert capsys.readouterr().err == "error: tensor \\x1b]0;title\\x07 \\u202e\\ud800 é of a file\n"


def test_a_command_to_copy_is_quoted(llama, tmp_path, capsys):
    model = shutil.copytree(llama, tmp_path / "a $(touch b); c")
    rows = write_rows(tmp_path / "rows.jsonl")
    flags = ["--model", model, "--data", rows, "--out", tmp_path / "run", "--max-steps", "1", "--lora-rank", "1"]
    train.main(list(map(str, flags)))
    assert f"--model '{model}' --adapter" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- two runs that share a cache

AT_ONCE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
import train
from paper import frozen
from support import start
real = frozen.response_losses
def response_losses(*given):
    found = real(*given)
    Path(sys.argv[1], f"{os.getpid()}.here").touch()  # both have found nothing, and write at the same time
    start = time.monotonic()
    while len(list(Path(sys.argv[1]).glob("*.here"))) < 2 and time.monotonic() < start + 300:
        time.sleep(0.001)
    return found
frozen.response_losses = response_losses
start.run_script(lambda: train.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_runs_at_once_share_a_cache_and_end_as_they_would_alone(llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "script.py").write_text(AT_ONCE)
    flags = [
        "--model",
        llama,
        "--data",
        rows,
        "--lora-rank",
        "4",
        "--batch-size",
        "8",
        "--lr",
        "0.01",
        "--gamma",
        "0.7",
    ]

    def start(script, out, cache):
        given = [*script, *flags, "--out", tmp_path / out, "--cache", tmp_path / cache]
        return subprocess.Popen([sys.executable, *map(str, given)], cwd=ROOT, stderr=subprocess.PIPE, text=True)

    processes = [start([tmp_path / "script.py", tmp_path], name, "shared") for name in ("first", "second")]
    processes.append(start([ROOT / "train.py"], "alone", "own"))
    for process in processes:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    assert len(list(tmp_path.glob("*.here"))) == 2  # neither found the other's
    assert len(list((tmp_path / "shared").iterdir())) == 1  # one file, and nothing temporary
    adapters = [tmp_path / name / "adapter_model.safetensors" for name in ("first", "second", "alone")]
    assert len({path.read_bytes() for path in adapters}) == 1


# ------------------------------------------------------------------------------------------------------ the fuzz test


def make_targets(folder: Path):
    """Every kind of file that fuzz.py damages, as it should be."""
    make_checkpoint(folder / "single", "llama", adds_bos=True)
    make_checkpoint(folder / "sharded", "qwen3", shard_size="300KB")
    lora.save_adapter(lora.add_lora(load_model(folder / "single"), rank=4), folder / "adapter")
    losses.kept_losses(folder / "cache", "key", lambda: torch.rand(100))
    rows = [{"instruction": text, "input": "\U0001f44d" * (i % 2), "output": text[::-1]} for i, text in enumerate(TEXT)]
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes, é."}] for text in TEXT]
    for name, several in {"rows": rows, "turns": [{"messages": messages} for messages in turns]}.items():
        (folder / name).mkdir()
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in several)
        (folder / name / f"{name}.jsonl").write_text(text, encoding="utf-8")
    assert all((folder / name).exists() for name in TARGETS)


def test_damaged_files_load_as_what_they_say_or_are_refused(tmp_path, capsys):
    make_targets(tmp_path)
    seed, cases = 0, 300
    command = [sys.executable, str(ROOT / "tests" / "bench" / "fuzz.py"), str(tmp_path), str(seed), str(cases)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    *lines, last = result.stdout.splitlines()
    assert result.returncode == 0, f"ended by {result.returncode} in {last}: {result.stderr[-2000:]}"
    ends = [json.loads(case) | json.loads(end) for case, end in (line.split("\t") for line in lines)]
    assert [end for end in ends if end["outcome"] == "failed"] == [] and result.stderr == ""
    by_kind = [Counter(end["outcome"] for end in ends if (end["case"] == "random") == drawn) for drawn in (True, False)]
    assert by_kind[0].total() == cases and min(by_kind[0]["loaded"], by_kind[0]["refused"]) > cases / 20
    for name in TARGETS:  # nothing is refused whatever it says
        assert {end["outcome"] for end in ends if end["file"] == name} == {"loaded", "refused"}, name
    peak = json.loads(last)["peak_mb"]
    assert peak < 1000
    with capsys.disabled():
        random, hostile = ", ".join(f"{n} {end}" for end, n in by_kind[0].items()), by_kind[1]
        print(f" [fuzz: {cases} random cases, {random}; {hostile.total()} hostile ones, {dict(hostile)}; {peak} MB]")
