"""The GPU's check goes through all its stages on a CPU, in miniature; what it shows there is only that it runs."""

import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch


@pytest.mark.slow
def test_a_dry_run_asks_every_question_of_every_stage(tmp_path):
    command = [sys.executable, str(Path(gpu.__file__)), "--dry-run", "--minutes", "60", "--out", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert stages.keys() == gpu.STAGES.keys() and not any(stage["error"] for stage in stages.values())
    right = stages["right"]["results"]
    assert right["one seed twice: the same bits"] and right["resumed: the same bits"]
    assert all(value == 0 for question, value in right.items() if "--method" in question)  # a CPU beside itself
    assert stages["ranks"]["results"]["torchrun, one rank, --shard: status"] == 0
    assert (tmp_path / "gpu.txt").read_text().count("\n## ") == len(gpu.STAGES)


def test_a_stage_that_fails_is_told_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def wrong(setting, report):
        report("asked", 1)
        raise RuntimeError("no such kernel")

    def late(setting, report):
        raise gpu.OutOfTime

    stages = {"wrong": (wrong, 0.5), "late": (late, 0.1), "well": (lambda setting, report: report("said", 2), 0.1)}
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path), "--stages", "wrong,late,well"])
    with torch.random.fork_rng():
        assert gpu.main() == 1
    held = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert held["wrong"]["results"] == {"asked": 1} and "no such kernel" in held["wrong"]["error"]
    assert "Traceback" in capsys.readouterr().out
    assert held["late"]["error"] == "stopped: its time is up" and held["well"]["results"] == {"said": 2}
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path), "--stages", "well", "--minutes", "0"]
    )
    assert gpu.main() == 0
    assert "skipped" in json.loads((tmp_path / "gpu.json").read_text())["stages"]["well"]["error"]
