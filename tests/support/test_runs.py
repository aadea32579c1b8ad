"""What a run keeps and who takes part: killed runs end as others do, several ranks train as one process does."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, checkpoints_in, edit_json, make_checkpoint, write_rows
from interrupt import interrupted
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from model import load_model
from support import files, runs
from support.files import UserError, check_writable, read_log, write_whole

ROOT = Path(__file__).parents[2]
# with the state that is easiest to lose: dropout (0.1) draws random numbers, and the history is an average
SETTINGS = "--batch-size 8 --lora-rank 4 --dtype float32 --lr 0.01 --max-length 128".split()
AVERAGE = ["--history", "ema"]  # where no other history or method is asked for
LONG = ["--epochs", "40", "--checkpoint-every", "3"]  # 120 steps


def command(model, rows, out, *more) -> list[str]:
    history = [] if {"--method", "--history", "auto"} & set(more) else AVERAGE
    flags = ["--model", model, "--data", rows, "--out", out, *SETTINGS, *history, *more]
    return [sys.executable, str(ROOT / "train.py"), *map(str, flags)]


def main(*given):
    """The same run in this process."""
    train.main(command(*given)[2:])


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def log(folder: Path) -> list[dict]:
    """Its lines, without what differs from one time to the next."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_mb")} for line in lines]


def wait_for_a_step(process, folder: Path):
    """Until the log in `folder` has grown, or the process has ended."""
    size = lambda: (folder / "log.jsonl").stat().st_size if (folder / "log.jsonl").exists() else 0
    before = size()
    while size() <= before and process.poll() is None:
        time.sleep(0.005)
        before = min(before, size())  # a run that goes on first cuts the log


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint*"))


@pytest.fixture(scope="module")
def setting(llama, tmp_path_factory) -> SimpleNamespace:
    """A model, rows to train it on, and the folder of a long run that never stopped."""
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.jsonl")
    subprocess.run(command(llama, rows, folder / "whole", *LONG), check=True, capture_output=True)
    return SimpleNamespace(model=llama, rows=rows, whole=folder / "whole")


# ------------------------------------------------------------------------------------------- checkpoints, resume


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_adapter_of_one_that_never_stopped(setting, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    resumed = command(setting.model, setting.rows, out, *LONG, "--resume")
    for _ in range(20):
        environment = interrupted(out, signal.SIGKILL, rng.randint(1, 24), tmp_path / "site")
        assert subprocess.run(resumed, env=environment, capture_output=True).returncode == -signal.SIGKILL
        assert not (out / "adapter_model.safetensors").exists()
    subprocess.run(resumed, check=True, capture_output=True)
    assert adapter(out) == adapter(setting.whole)
    assert log(out) == log(setting.whole) and len(log(out)) == 120
    assert left_in(out) == [runs.CHECKPOINT.format(step) for step in (117, 120)]


@pytest.mark.parametrize(
    "flags, inner",
    [("self-evolving", ["part-1", "part-3"]), ("tokencleaning --reference-data ROWS", ["reference", "."])],
)
@pytest.mark.slow
def test_a_baseline_that_is_killed_goes_on_too(llama, rows, tmp_path, flags, inner):
    """In the parts of self-evolving, while the reference is trained, and after it."""
    flags = ["--method", *flags.replace("ROWS", str(rows)).split(), "--epochs", "12", "--checkpoint-every", "2"]
    main(llama, rows, tmp_path / "whole", *flags)
    resumed = command(llama, rows, tmp_path / "killed", *flags, "--resume")
    for name in inner:
        for operation in (5, 14):
            environment = interrupted(tmp_path / "killed" / name, signal.SIGKILL, operation, tmp_path / "site")
            assert subprocess.run(resumed, env=environment, capture_output=True).returncode == -signal.SIGKILL
            assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    subprocess.run(resumed, check=True, capture_output=True)
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_the_step_it_came_in(setting, tmp_path, number):
    out, flags = tmp_path / "out", [*LONG[:2], "--checkpoint-every", "1000"]
    given = command(setting.model, setting.rows, out, *flags)
    environment = interrupted(out, number, 50, tmp_path / "site")
    stopped = subprocess.run(given, env=environment, capture_output=True, text=True)
    done = len(log(out))
    assert stopped.returncode == 128 + number and 1 <= done < 120
    assert stopped.stderr.strip().endswith(f"\nstopped after step {done}; with --resume it goes on")
    assert left_in(out) == [runs.CHECKPOINT.format(done)]
    assert not (out / "adapter_model.safetensors").exists()
    subprocess.run([*given, "--resume"], check=True, capture_output=True)
    assert adapter(out) == adapter(setting.whole) and log(out) == log(setting.whole)


@pytest.fixture
def finished(llama, rows, tmp_path) -> Path:
    main(llama, rows, tmp_path / "run", "--eval-data", rows)
    return tmp_path / "run"


def test_a_tenth_of_the_run_lies_between_two_checkpoints(llama, rows, tmp_path):
    main(llama, rows, tmp_path / "run", "--epochs", "10")  # 30 steps
    assert left_in(tmp_path / "run") == [runs.CHECKPOINT.format(step) for step in (27, 30)]


@pytest.mark.parametrize("history", ["base", "ema", "checkpoint --history-every 4", "checkpoint --history-every 100"])
def test_every_history_goes_on_from_a_checkpoint_bit_for_bit(llama, rows, tmp_path, history):
    flags = ["--epochs", "4", "--checkpoint-every", "2", "--history", *history.split()]
    main(llama, rows, tmp_path, *flags)
    whole, lines = adapter(tmp_path), log(tmp_path)
    names = load_file(checkpoints_in(tmp_path)[0]).keys()
    assert ("history.0.0" in names) == (history not in ("base", "checkpoint --history-every 100"))
    checkpoints_in(tmp_path)[-1].unlink()  # that of step 12
    (tmp_path / "adapter_model.safetensors").unlink()
    main(llama, rows, tmp_path, *flags, "--resume")
    assert adapter(tmp_path) == whole and log(tmp_path) == lines


def test_a_finished_run_stays_as_it_is_when_it_is_to_go_on(finished, llama, rows):
    before, lines = adapter(finished), (finished / "log.jsonl").read_text()
    record = json.loads((finished / "run.json").read_text())
    main(llama, rows, finished, "--eval-data", rows, "--resume")
    assert adapter(finished) == before and (finished / "log.jsonl").read_text() == lines
    again = json.loads((finished / "run.json").read_text())
    for when in ("before", "after"):
        assert again[f"held_out_loss_{when}"] == record[f"held_out_loss_{when}"]


def test_without_a_checkpoint_resume_starts_and_a_new_run_wants_a_folder_of_its_own(finished, llama, rows):
    before = adapter(finished)
    with pytest.raises(UserError, match="holds another run"):
        main(llama, rows, finished)
    for path in [finished / "adapter_model.safetensors", *checkpoints_in(finished)]:
        path.unlink()
    with pytest.raises(UserError, match="checkpoint"):  # checkpoints alone are a run too
        write_whole(finished / runs.CHECKPOINT.format(1), lambda path: path.write_text(""))
        (finished / "run.json").rename(finished / "kept.json")
        (finished / "log.jsonl").rename(finished / "kept.jsonl")
        (finished / "adapter_config.json").unlink()
        main(llama, rows, finished)
    (finished / runs.CHECKPOINT.format(1)).unlink()
    (finished / "kept.jsonl").rename(finished / "log.jsonl")
    main(llama, rows, finished, "--resume")
    assert adapter(finished) == before and len(log(finished)) == 3


DIFFERENCES = {
    "--lr was 0.01, now it is 0.02": ["--lr", "0.02"],
    "--rho was 0.6, now it is 0.5": ["--rho", "0.5"],
    "--epochs was 1, now it is 2": ["--epochs", "2"],
    "--history was ema, now it is checkpoint": ["--history", "checkpoint"],
    "--seed was 42, now it is 7": ["--seed", "7"],
    "--gradient-checkpointing was False, now it is True": ["--gradient-checkpointing"],
}


@pytest.mark.parametrize("message", DIFFERENCES)
def test_a_checkpoint_of_another_configuration_is_refused(finished, llama, rows, message):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(UserError, match=message):
        main(llama, rows, finished, *DIFFERENCES[message], "--resume")
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_another_method_does_not_go_on_with_a_run(llama, rows, tmp_path):
    main(llama, rows, tmp_path / "a", "--method", "self-evolving")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    for flags in ([], ["--method", "rho1", "--reference-data", rows]):
        with pytest.raises(UserError, match="of another configuration: --(history|method|loss-mean) was"):
            main(llama, rows, tmp_path / "a", "--resume", *flags)
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before


def test_overwrite_removes_a_run_s_own_folders_and_no_others(llama, rows, tmp_path):
    main(llama, rows, tmp_path / "a", "--method", "rho1", "--reference-data", rows)
    (tmp_path / "a" / "part-00000.parquet").write_text("a user's")
    main(llama, rows, tmp_path / "a", "--overwrite")
    assert not (tmp_path / "a" / "reference").exists() and (tmp_path / "a" / "part-00000.parquet").exists()
    (tmp_path / "runs" / "reference").mkdir(parents=True)
    (tmp_path / "runs" / "reference" / "log.jsonl").write_text("{}")
    main(llama, rows, tmp_path / "runs", "--overwrite")  # it holds no run itself
    assert (tmp_path / "runs" / "reference" / "log.jsonl").exists()


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def merged(llama, tmp_path_factory) -> Path:
    """A run with merged/, a reference of its own and snapshots."""
    folder = tmp_path_factory.mktemp("merged")
    rows = write_rows(folder / "rows.jsonl")
    flags = ["--method", "rho1", "--reference-data", rows, "--merge", "--snapshot-every", "2"]
    main(llama, rows, folder / "run", *flags)
    return folder / "run"


# What a new run in AT/run may read of the old one there, by any way
READERS = {
    "--model": lambda at: ["--model", at / "run" / "merged"],
    "--model by a link": lambda at: ["--model", link(at / "a", at / "run" / "merged")],
    "--model by a link in its folder": lambda at: ["--model", link(at / "a", at / "run") / "merged"],
    "--model of links": lambda at: ["--model", linked(at / "run" / "merged", at / "a")],
    "--model by dots": lambda at: ["--model", at / "run" / "merged" / ".." / "merged"],
    "--reference": lambda at: ["--method", "rho1", "--reference", at / "run" / "reference"],
    "--reference itself": lambda at: ["--method", "rho1", "--reference", at / "run"],
    "--reference of a step": lambda at: ["--method", "rho1", "--reference", at / "run" / "step-00000002"],
    "--eval-data": lambda at: ["--eval-data", shutil.copy(at / "rows.jsonl", at / "run" / "merged")],
    "--reference-data": lambda at: [
        *("--method", "rho1", "--reference-data"),
        link(at / "b.jsonl", shutil.copy(at / "rows.jsonl", at / "run" / "reference")),
    ],
}


def link(path: Path, target) -> Path:
    path.symlink_to(target)
    return path


def linked(folder: Path, copy: Path) -> Path:
    """A folder of links to another's files, as the hub's cache is."""
    copy.mkdir()
    for path in folder.iterdir():
        link(copy / path.name, path)
    return copy


@pytest.mark.parametrize("way", READERS)
@pytest.mark.parametrize("flags", [["--overwrite"], ["--overwrite", "--merge"]])
def test_overwrite_deletes_nothing_that_the_new_run_reads(llama, merged, tmp_path, way, flags):
    shutil.copytree(merged, tmp_path / "run")
    rows = shutil.copy(merged.parent / "rows.jsonl", tmp_path)
    reads = READERS[way](tmp_path)
    before = files_below(tmp_path)
    with pytest.raises(UserError, match=f"{way.split()[0]} .* a run in .*run replaces: choose another --out"):
        main(llama, rows, tmp_path / "run", *flags, *reads)
    assert files_below(tmp_path) == before


def test_a_merge_does_not_take_its_base_s_place(llama, merged, tmp_path):
    """--resume where there is no run yet, beside a model that bears merged/'s name."""
    shutil.copytree(merged / "merged", tmp_path / "run" / "merged")
    before = files_below(tmp_path)
    with pytest.raises(UserError, match="--model .* replaces: choose another --out"):
        main(tmp_path / "run" / "merged", merged.parent / "rows.jsonl", tmp_path / "run", "--resume", "--merge")
    assert files_below(tmp_path) == before


def test_what_is_read_may_lie_beside_and_a_link_is_cut_not_followed(llama, merged, tmp_path):
    """Rows, a cache and somebody else's model in the run's folder; merged/, a snapshot and run.json that are links."""
    run, store = shutil.copytree(merged, tmp_path / "run"), tmp_path / "store"
    store.mkdir()
    for name in ("merged", "step-00000002", "run.json"):
        (run / name).rename(store / name)
        (run / name).symlink_to(store / name)
    (run / "step-00000004").symlink_to(tmp_path / "nothing")
    (run / "checkpoint-x.safetensors").write_text("a user's")
    (run / "step-²").mkdir()
    before = files_below(store)
    rows = shutil.copy(merged.parent / "rows.jsonl", run / "rows.jsonl")
    main(store / "merged", rows, run, "--overwrite", "--cache", run / "cache")
    assert files_below(store) == before
    assert not os.path.lexists(run / "merged") and not os.path.lexists(run / "step-00000004")
    assert (run / "rows.jsonl").exists() and (run / "checkpoint-x.safetensors").exists() and (run / "step-²").exists()
    assert not (run / "run.json").is_symlink() and not (run / "reference").exists()


@pytest.mark.parametrize("mistake", ["--layer 9", "--eval-data nothing.jsonl", "NaN"])
def test_a_run_that_does_not_start_deletes_nothing(llama, merged, tmp_path, mistake):
    run, model = shutil.copytree(merged, tmp_path / "run"), llama
    flags = mistake.split() if mistake != "NaN" else ["--eval-data", merged.parent / "rows.jsonl"]
    if mistake == "NaN":  # seen when the held-out rows are, before the first step
        model = shutil.copytree(llama, tmp_path / "model")
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"] *= torch.nan
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    before = files_below(run)
    with pytest.raises(UserError):
        main(model, merged.parent / "rows.jsonl", run, "--overwrite", *flags)
    assert files_below(run) == before


def resave(change):
    """A checkpoint with other tensors under the same header."""

    def damage(path: Path):
        with safe_open(path, "pt") as file:
            head = file.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors, head)
        save_file(tensors, path, metadata=head)

    return damage


def halve(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "half of it zeros": halve,
    "all of it zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-7] + b"\x01" + path.read_bytes()[-6:]),
    "no adapter": resave(lambda tensors, head: tensors.pop("adapter.0")),
    "no moments": resave(lambda tensors, head: tensors.pop("optimizer.1.exp_avg_sq")),
    "no random state": resave(lambda tensors, head: tensors.pop("random.0.cpu")),
    "no history": resave(lambda tensors, head: tensors.pop("history.1.0")),
    "another shape": resave(lambda tensors, head: tensors.update({"adapter.0": tensors["adapter.0"][:1].clone()})),
    "other numbers": resave(lambda tensors, head: tensors["adapter.3"].add_(1e-3)),
    "another step": resave(lambda tensors, head: head.update(step="2")),
    "a step that is none": resave(lambda tensors, head: head.update(step="²")),
    "settings that are none": resave(lambda tensors, head: head.update(settings="[]")),
    "no header": resave(lambda tensors, head: head.clear()),
}


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    main(llama, write_rows(folder / "rows.jsonl"), folder / "run", "--checkpoint-every", "1")
    return folder / "run"


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(llama, whole, tmp_path, capsys, what):
    run, rows = shutil.copytree(whole, tmp_path / "run"), whole.parent / "rows.jsonl"
    (run / "adapter_model.safetensors").unlink()
    DAMAGE[what](run / runs.CHECKPOINT.format(3))
    main(llama, rows, run, "--checkpoint-every", "1", "--resume")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert str(run / runs.CHECKPOINT.format(3)) in line and line.endswith(f"from {runs.CHECKPOINT.format(2)}")
    assert adapter(run) == adapter(whole) and log(run) == log(whole)
    assert load_file(run / runs.CHECKPOINT.format(3)).keys() == load_file(whole / runs.CHECKPOINT.format(3)).keys()


def test_where_no_checkpoint_is_whole_nothing_starts_anew(llama, whole, tmp_path):
    run, rows = shutil.copytree(whole, tmp_path / "run"), whole.parent / "rows.jsonl"
    for path in checkpoints_in(run):
        halve(path)
    before = files_below(run)
    with pytest.raises(UserError, match=f"{runs.CHECKPOINT.format(2)} is damaged.*there is no other"):
        main(llama, rows, run, "--checkpoint-every", "1", "--resume")
    assert {name: content for name, content in files_below(run).items() if name in before} == before


RECORDS = [
    '{"arguments": []}', '{"arguments": null}', '{"arguments": "x"}', '{"fingerprints": 5}', '{"seconds": [1]}',
    '{"seconds": {"training": "x"}}', '{"seconds": {"training": 1e999}}', "[]", "5", "",
    '{"arguments": {"a": "\\udfff"}}',
    '{"seconds": {"training": ' + "9" * 400 + "}}", "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", RECORDS)
def test_a_record_of_another_shape_is_named(llama, whole, tmp_path, text):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "run.json").write_text(text)
    with pytest.raises(UserError, match="run.json"):
        main(llama, whole.parent / "rows.jsonl", run, "--checkpoint-every", "1", "--resume")


STEP = {"step": 1, "loss": 1.0, "lr": 1.0, "tokens": 1, "response_tokens": 1, "selected_tokens": 1, "seconds": 1.0}
LINES = {
    "\xff\n": "line 1",
    "5\n": "line 1: no number step",
    json.dumps(STEP | {"loss": None}) + "\n": "line 1: no number loss",
    json.dumps(STEP) + "\n" + json.dumps(STEP | {"lr": math.inf}) + "\n": "line 2: no number lr",
    json.dumps(STEP | {"seconds": 10**400}) + "\n": "line 1: no number seconds",
    json.dumps(STEP | {"tokens": True}) + "\n": "line 1: no number tokens",
    "[" * 100_000 + "\n": "line 1: maximum recursion",
}


@pytest.mark.parametrize("text", LINES)
def test_a_log_of_another_shape_is_named_with_its_line(tmp_path, text):
    (tmp_path / "log.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"log.jsonl, {LINES[text]}"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(json.dumps(STEP).encode() + b"\n" + text.encode("latin-1")[:1])
    assert read_log(tmp_path) == [STEP]  # what follows is half a line


@pytest.mark.parametrize("name", ["run.json", "log.jsonl", runs.CHECKPOINT.format(3)])
def test_a_pipe_in_a_run_s_folder_is_named_not_waited_for(llama, whole, tmp_path, name):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(UserError, match=f"{name}.*it is no regular file"):
        main(llama, whole.parent / "rows.jsonl", run, "--checkpoint-every", "1", "--resume")


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
def test_a_name_too_long_for_a_file_is_named(llama, rows, tmp_path, flags):
    with pytest.raises(UserError, match=r"run.json cannot be written \(File name too long\)"):
        main(llama, rows, tmp_path / ("o" * 5000), *flags)


def test_folders_that_are_no_snapshots_are_none(tmp_path):
    for name in ("step-x", "step-²", "step-4", "step-00000007", "step-00000007x", "step-100000000", "step-00000012"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    assert list(runs.snapshots_in(tmp_path)) == [7, 12, 100_000_000]


def test_other_rows_or_weights_are_another_configuration(finished, llama, rows):
    text = rows.read_text()
    rows.write_text(text.replace("Repeat 7 words", "Repeat 8 words"))
    with pytest.raises(UserError, match="the content of --data"):
        main(llama, rows, finished, "--resume")
    rows.write_text(text)
    config = (llama / "config.json").read_text()
    edit_json(llama / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    with pytest.raises(UserError, match="the content of --model"):
        main(llama, rows, finished, "--resume")
    (llama / "config.json").write_text(config)
    tensors = load_file(llama / "model.safetensors")
    weights = (llama / "model.safetensors").read_bytes()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 1
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    try:
        with pytest.raises(UserError, match="the content of --model"):
            main(llama, rows, finished, "--resume")
    finally:
        (llama / "model.safetensors").write_bytes(weights)


def test_what_may_differ_does(finished, llama, rows, tmp_path):
    before = adapter(finished)
    finished.rename(tmp_path / "moved")
    main(llama, rows, tmp_path / "moved", "--resume", "--checkpoint-every", "1", "--merge")
    assert adapter(tmp_path / "moved") == before and (tmp_path / "moved" / "merged" / "config.json").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda temporary: temporary.write_text("first"))

    def half(temporary):
        temporary.write_text("sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_text() == "first"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/null", path)])
@pytest.mark.parametrize("ask", [check_writable, lambda path: write_whole(path, lambda file: file.write_text("new"))])
def test_what_is_no_regular_file_is_named_and_stays(tmp_path, make, ask):
    make(path := tmp_path / "out.json")
    before = path.lstat()
    with pytest.raises(UserError, match=r"out.json cannot be written \((it is no regular file|Is a directory)\)"):
        ask(path)
    assert path.lstat().st_mode == before.st_mode and path.lstat().st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_of_an_argument_that_are_no_utf_8_are_spelled_in_the_record(llama, rows, tmp_path):
    main(llama, rows, os.fsdecode(bytes(tmp_path) + b"/caf\xe9"), "--cache", os.fsdecode(bytes(tmp_path) + b"/\xff"))
    arguments = json.loads((tmp_path / "caf\\xe9" / "run.json").read_text(encoding="utf-8"))["arguments"]
    assert [Path(arguments[flag]).name for flag in ("out", "cache")] == ["caf\\xe9", "\\xff"]


# ----------------------------------------------------------------------------------------------------------- ranks

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
EXACT = ["--lora-dropout", "0", "--lr", "0.001", "--epochs", "2"]


def torchrun(ranks, *given, script=None, **options):
    script = script or [str(ROOT / "train.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, str(ranks), *script, *command(*given)[2:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        **options,
    )


@pytest.mark.slow  # a rank imports torch, and so does what starts it
def test_a_rank_ends_at_once_when_its_work_is_done(tmp_path):
    """A usual exit takes apart what gloo's threads may still hold, and then aborts: seldom, by chance."""
    (tmp_path / "script.py").write_text(
        "import atexit\n"
        "from support import ranks, start\n"
        "def main():\n"
        "    atexit.register(print, 'a usual exit')\n"
        "    ranks.start_ranks('cpu')\n"
        "    print('worked', ranks.ranks())\n"
        "start.run_script(main)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, "1", str(tmp_path / "script.py")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (found.returncode, found.stdout) == (0, "worked 1\n"), found.stderr


@pytest.mark.parametrize(
    "family, flags",
    [
        ("llama", ["--shard", "--merge"]),
        *(
            pytest.param(family, flags, marks=pytest.mark.slow)  # seconds each: both ranks import torch
            for family, flags in [
                ("llama", []),
                ("qwen3", ["--shard", "--method", "rho1", "--excess", "current", "--reference", "OTHER"]),
                ("qwen2", ["--shard", "--layer", "0", "--gradient-checkpointing", "--method", "sstoken"]),
                ("qwen3", ["--shard", "--method", "random", "--rho", "0.05"]),
                ("llama", ["--method", "self-evolving", "--merge"]),
                ("llama", ["--shard", "--method", "eaft"]),
                ("llama", ["--shard", "--method", "profit"]),  # random weights find no token likely: no step has one
                ("qwen2", ["--rho", "auto"]),
                ("qwen2", ["--method", "surprise", "--micro-batch-size", "8"]),
                ("qwen3", ["--method", "self-evolving", "--shard"]),
                (
                    "qwen2",
                    "--shard --method tokencleaning --rho 0.3 --reference-data ROWS --cache CACHE".split(),
                ),
                ("llama", ["--shard", "--history", "base", "--micro-batch-size", "8", "--cache", "CACHE"]),
            ]
        ),
    ],
)
def test_two_ranks_train_as_one_process(tmp_path, rows, family, flags):
    model = make_checkpoint(tmp_path / "model", family, adds_bos=True, vocab_size=401)  # odd: the shards differ
    if "OTHER" in flags:
        other = make_checkpoint(tmp_path / "other", family, adds_bos=True, vocab_size=401)
        tensors = {name: tensor * 1.1 for name, tensor in load_file(other / "model.safetensors").items()}
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    paths = {"ROWS": str(rows), "OTHER": str(tmp_path / "other")}
    of = lambda name: [(paths | {"CACHE": tmp_path / f"cache-{name}"}).get(flag, flag) for flag in flags]
    held_out = "--eval-data", rows, "--eval-every", "2"
    process = torchrun(2, model, rows, tmp_path / "two", *EXACT, *of("two"), *held_out)
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    main(model, rows, tmp_path / "one", *EXACT, *(f for f in of("one") if f != "--shard"), *held_out)
    if "CACHE" in flags:
        kept = [{path.name: path for path in (tmp_path / f"cache-{name}").iterdir()} for name in ("one", "two")]
        shared = kept[0].keys() & kept[1].keys()  # a reference trained by two ranks may differ in a last digit
        assert shared and len(kept[0]) == len(kept[1])
        for name in shared:
            assert torch.allclose(*(load_file(files[name])["nll"] for files in kept), atol=1e-5)
    assert out.count("wrote ") == out.count("data: 20 samples") == 1  # one of them speaks
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == (10 if "self-evolving" in flags else 6)
    for a, b in zip(one, two, strict=True):
        for loss in ("loss", "held_out_loss") if "held_out_loss" in a else ("loss",):
            assert a.pop(loss) == pytest.approx(b.pop(loss), abs=1e-5)
        assert a == b
    assert "held_out_loss" in log(tmp_path / "one")[1]
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    learned = any(files[0][name].abs().max() > 1e-3 for name in files[0] if "lora_B" in name)
    assert learned == ("profit" not in flags) == all("skipped" not in line for line in one)
    for name, tensor in files[0].items():
        assert (tensor - files[1][name]).abs().max() < 1e-5, name
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    for when in ("before", "after"):
        losses = [record[f"held_out_loss_{when}"] for record in records]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    if "--merge" in flags:
        ids = torch.arange(2, 42)[None]
        merged = [load_model(tmp_path / name / "merged")(ids) for name in ("one", "two")]
        assert (merged[0] - merged[1]).abs().max() < 1e-3 and not torch.equal(merged[0], load_model(model)(ids))


@pytest.mark.slow
def test_two_ranks_go_on_from_a_checkpoint(llama, rows, tmp_path):
    flags = ["--epochs", "4", "--checkpoint-every", "2"]
    for name in ("whole", "stopped"):
        process = torchrun(2, llama, rows, tmp_path / name, *flags)
        assert process.wait(timeout=PATIENCE) == 0, process.stderr.read()
    whole = adapter(tmp_path / "whole")
    assert adapter(tmp_path / "stopped") == whole
    checkpoints_in(tmp_path / "stopped")[-1].unlink()  # that of step 12
    (tmp_path / "stopped" / "adapter_model.safetensors").unlink()
    process = torchrun(2, llama, rows, tmp_path / "stopped", *flags, "--resume")
    assert process.wait(timeout=PATIENCE) == 0, process.stderr.read()
    assert adapter(tmp_path / "stopped") == whole and log(tmp_path / "stopped") == log(tmp_path / "whole")
    state = load_file(checkpoints_in(tmp_path / "whole")[-1])
    random = [state[name] for name in sorted(state) if name.startswith("random")]
    assert len(random) == 2 and not torch.equal(*random)
    with pytest.raises(UserError, match="the number of ranks was 2, now it is 1"):
        main(llama, rows, tmp_path / "whole", *flags, "--resume")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_stops_all_ranks_after_the_same_step(llama, rows, tmp_path, number):
    process = torchrun(2, llama, rows, tmp_path / "run", "--epochs", "1000", "--checkpoint-every", "10000")
    wait_for_a_step(process, tmp_path / "run")
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    done = len(log(tmp_path / "run"))
    assert left_in(tmp_path / "run") == [runs.CHECKPOINT.format(done)] and f"stopped after step {done};" in errors


FAILING = """
import os, sys
sys.path.insert(0, os.getcwd())
import train
from support import start
folder, way = sys.argv[1:3]
open(f"{folder}/{os.environ['RANK']}.pid", "w").write(str(os.getpid()))
real, calls = train.select, []
def select(*given):
    calls.append(0)
    if os.environ["RANK"] == "1" and way == "raise" and len(calls) > 20:
        raise RuntimeError("planted in rank 1")
    return real(*given)
train.select = select
start.run_script(lambda: train.main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["raise", "kill"])
@pytest.mark.parametrize("flags", [[], ["--shard"]])
def test_a_rank_that_dies_takes_the_job_down(llama, rows, tmp_path, way, flags):
    (tmp_path / "script.py").write_text(FAILING)
    script = [str(tmp_path / "script.py"), str(tmp_path), way]
    process = torchrun(2, llama, rows, tmp_path / "run", "--epochs", "1000", *flags, script=script)
    wait_for_a_step(process, tmp_path / "run")
    if way == "kill":
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode != 0
    assert ("RuntimeError: planted in rank 1" if way == "raise" else "Signal 9 (SIGKILL)") in errors
    for name in ("0.pid", "1.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)


SHARDED = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import torch, data, train
from model import load_model, response_nll
from support import ranks
args = train.parse_arguments(sys.argv[1:])
device = ranks.start_ranks("cpu")
examples, _ = data.load_examples(args.data, data.load_tokenizer(args.model), args.max_length)
model, base = train.prepare(args, device, examples), load_model(args.model)
assert len(set(ranks.gather(torch.rand(1).item()))) == 2  # dropout of its own on each rank
weights = {name: p for name, p in model.named_parameters() if not p.requires_grad}
assert all(torch.equal(p.full_tensor(), base.get_parameter(name)) for name, p in weights.items())
held = lambda: sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.model.layers.parameters())
adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
first = held() - adapters
with torch.no_grad():
    response_nll(model, *data.collate(examples[:2]))
found = ranks.gather([first, held() - adapters])
if ranks.first_rank():
    print(json.dumps([*found, sum(p.numel() for p in base.model.layers.parameters()), len(base.model.layers)]))
"""


@pytest.mark.slow
def test_shard_leaves_each_rank_its_part_of_the_checkpoint_s_weights(llama, rows, tmp_path):
    (tmp_path / "script.py").write_text(SHARDED)
    process = torchrun(2, llama, rows, tmp_path / "run", "--shard", script=[str(tmp_path / "script.py")])
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    (before, after), (before_1, after_1), whole, layers = json.loads(out)
    assert before + before_1 == whole and abs(before - before_1) < 0.1 * whole
    # after a pass the probed layer, the last, is still there as a whole: half of it more on each rank
    assert after == after_1 == pytest.approx(whole / 2 + whole / layers / 2, rel=0.05)


def test_shard_wants_torchrun(llama, rows, tmp_path):
    with pytest.raises(UserError, match="--shard .* torchrun"):
        main(llama, rows, tmp_path / "run", "--shard")
    assert not (tmp_path / "run").exists()


SHAPES = """
import torch
from support import machine
machine.reuse_memory()
weight, resident = torch.randn(64, 64).bfloat16(), []
for rows in range(400, 0, -1):
    torch.randn(rows, 64).bfloat16() @ weight
    resident.append(int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]))
print(resident[-1] - resident[99])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory as Linux tells it")
def test_memory_does_not_grow_with_the_shapes_multiplied():
    grown = subprocess.check_output([sys.executable, "-c", SHAPES], cwd=ROOT, text=True)  # caches are the process's own
    assert int(grown) < 50 * 1024  # KiB; 137 to 197 MiB where one of the caches has its usual size


def test_a_run_goes_on_on_another_card_and_not_on_another_kind_of_device():
    held = runs.settings({"device": "cuda:3", "rho": 0.6}, {})
    runs.check_same("it is", held, runs.settings({"device": "cuda:0", "rho": 0.6}, {}))
    with pytest.raises(UserError, match="it is of another configuration: --device was cuda, now it is cpu"):
        runs.check_same("it is", held, runs.settings({"device": "cpu", "rho": 0.6}, {}))
    with pytest.raises(UserError, match="--rho was 0.6, now it is 0.5"):
        runs.check_same("it is", held, runs.settings({"device": "cuda:0", "rho": 0.5}, {}))


NUMBERED = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
import train
from support import ranks, start
real = ranks.start_ranks
def start_ranks(*given):  # a device of its own for each rank, as GPUs have
    device = real(*given)
    return torch.device("cpu:0") if os.environ["RANK"] == "1" else device
ranks.start_ranks = start_ranks
start.run_script(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_on_devices_of_different_numbers_resume_their_run(llama, rows, tmp_path):
    (tmp_path / "script.py").write_text(NUMBERED)
    found = []
    for flags in ([], ["--resume"]):
        process = torchrun(2, llama, rows, tmp_path / "run", *flags, script=[str(tmp_path / "script.py")])
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors[-2000:]
        found.append(adapter(tmp_path / "run"))
        (tmp_path / "run" / "adapter_model.safetensors").unlink()
    assert found[0] == found[1]


def test_half_of_a_surrogate_pair_is_written_as_json_spells_it(tmp_path):
    value = {"text": "half \ud83d of one", "é": 1}  # as a file of rows may hold it, in a column that is passed on
    files.write_lines(tmp_path / "lines", [value])
    files.write_json(tmp_path / "value", value)
    assert json.loads((tmp_path / "lines").read_bytes()) == json.loads((tmp_path / "value").read_bytes()) == value
