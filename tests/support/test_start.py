"""How scripts end: a closed pipe is nobody's mistake, and neither is a stream that is missing."""

import json
import os
import signal
import subprocess
import sys

import pytest
from test_faults import ROOT

ROWS = 300


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """More text than a pipe holds."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"prompt": "say hot, cold, up, down in opposites", "completion": "cold, hot, down, up " * 20, "note": 1}
    path.write_text("".join(json.dumps(row | {"prompt": f"{i}"}) + "\n" for i in range(ROWS)))
    return path


def head(command, lines=1) -> tuple[int, bytes]:
    """The status and stderr of a script whose reader goes away after some lines of its output."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    return process.wait(), errors


@pytest.mark.parametrize("script", ["training", "help"])
def test_a_reader_that_goes_away_ends_a_script_without_a_word(script, rows, tmp_path):
    given = ["--model", "demo/model", "--data", str(rows), "--device", "cpu"]
    command = {
        "training": ["train.py", *given, "--max-steps", "1", "--lora-rank", "2", "--out", str(tmp_path / "out")],
        "help": ["evaluate.py", "--help"],
    }[script]
    status, errors = head(command)
    assert status in (0, 128 + signal.SIGPIPE), errors
    assert b"Traceback" not in errors and b"Broken" not in errors


STREAMS = r"""
import os, sys
from support.start import run_script
def main():
    file = open("file", "w")
    print(repr(sys.stdin.readline()))
    print("caf\u00e9 \udcff", flush=True)
    print("caf\u00e9", file=sys.stderr)
    for number in (1, 2):  # as a library that is no Python may
        os.write(number, b"raw")
    file.write("kept")
run_script(main)
"""


def streams(folder, redirect: str, **environment) -> subprocess.CompletedProcess:
    """A script that uses all its streams; sh's `redirect` is what they are."""
    (folder / "script.py").write_text(STREAMS)
    command = f"printf 'caf\\351 caf\\303\\251\\n' | {sys.executable} script.py {redirect}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = kept | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True)


READ = rb"'caf\\xe9 caf"  # one byte that is no UTF-8, spelled out; then two that are


@pytest.mark.parametrize(("encoding", "e"), [("utf-8", "\u00e9".encode()), ("ascii", rb"\xe9"), ("cp437", b"\x82")])
def test_what_a_stream_cannot_read_or_write_is_spelled_out(encoding, e, tmp_path):
    found = streams(tmp_path, "", PYTHONIOENCODING=encoding)
    assert found.stdout.splitlines() == [READ + e + rb"\n'", b"caf" + e + rb" \udcff", b"raw"], found
    assert found.stderr.splitlines() == [b"caf" + e, b"raw"] and found.returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_missing_are_nothing_and_no_file_gets_what_is_printed(closed, tmp_path):
    found = streams(tmp_path, closed)
    assert found.returncode == 0 and (tmp_path / "file").read_text() == "kept", found
    read = b"''" if "<" in closed else READ + "\u00e9".encode() + rb"\n'"
    said = [read, "caf\u00e9 ".encode() + rb"\udcff", b"raw"]
    assert found.stdout.splitlines() == ([] if " >&-" in f" {closed}" else said)
    assert found.stderr.splitlines() == ([] if "2>&-" in closed else ["caf\u00e9".encode(), b"raw"])


@pytest.mark.slow
def test_a_run_without_streams_or_with_others_is_saved_and_ends_well(rows, tmp_path):
    given = f"train.py --model demo/model --data {rows} --limit 8 --max-steps 1 --lora-rank 2 --device cpu --out"
    for number, (redirect, encoding) in enumerate([("<&- >&- 2>&-", "utf-8"), ("", "ascii")]):
        out = tmp_path / f"\u00e9t\u00e9 {number}"
        command = f"{sys.executable} {given} '{out}' {redirect}"
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        found = subprocess.run(["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True)
        assert found.returncode == 0, found.stderr
        assert (out / "adapter_model.safetensors").exists() and (out / "README.md").exists()
