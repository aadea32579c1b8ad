"""What a run keeps and who takes part: killed runs end as others do, several ranks train as one process does."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, make_checkpoint, write_rows
from interrupt import interrupted
from safetensors.torch import load_file, save_file

import train
from model import load_model
from support import runs
from support.files import UserError, write_whole

ROOT = Path(__file__).parents[2]
# with the state that is easiest to lose: dropout (0.1) draws random numbers, and the history is an average
SETTINGS = (
    "--batch-size 8 --lora-rank 4 --dtype float32 --lr 0.01 --max-length 128 --history ema --ema-alpha 0.9".split()
)
LONG = ["--epochs", "40", "--checkpoint-every", "3"]  # 120 steps


def command(model, rows, out, *more) -> list[str]:
    flags = ["--model", model, "--data", rows, "--out", out, *SETTINGS, *more]
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
    names = load_file(runs.checkpoints_in(tmp_path)[0]).keys()
    assert ("history.0.0" in names) == (history not in ("base", "checkpoint --history-every 100"))
    runs.checkpoints_in(tmp_path)[-1].unlink()  # that of step 12
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
    for path in [finished / "adapter_model.safetensors", *runs.checkpoints_in(finished)]:
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
    "--history was ema, now it is base": ["--history", "base"],
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
        with pytest.raises(UserError, match="of another configuration: --(method|loss-mean) was"):
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


def test_other_rows_or_weights_are_another_configuration(finished, llama, rows):
    text = rows.read_text()
    rows.write_text(text.replace("Repeat 7 words", "Repeat 8 words"))
    with pytest.raises(UserError, match="the content of --data"):
        main(llama, rows, finished, "--resume")
    rows.write_text(text)
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
                ("qwen3", ["--shard", "--method", "random", "--rho", "0.05", "--history", "base"]),
                ("llama", ["--method", "self-evolving", "--merge"]),
                ("llama", ["--shard", "--method", "eaft"]),
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
    assert any(files[0][name].abs().max() > 1e-3 for name in files[0] if "lora_B" in name)  # it has learned something
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
    runs.checkpoints_in(tmp_path / "stopped")[-1].unlink()  # that of step 12
    (tmp_path / "stopped" / "adapter_model.safetensors").unlink()
    process = torchrun(2, llama, rows, tmp_path / "stopped", *flags, "--resume")
    assert process.wait(timeout=PATIENCE) == 0, process.stderr.read()
    assert adapter(tmp_path / "stopped") == whole and log(tmp_path / "stopped") == log(tmp_path / "whole")
    state = load_file(runs.checkpoints_in(tmp_path / "whole")[-1])
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
