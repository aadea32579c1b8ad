"""A long run: 500 steps of the demo, memory and file handles on the way, then the same with three kills (kill -9).

    python tests/bench/soak.py [--steps 500]

Prints what it saw, and ends with status 1 where memory after step 50 and at the end differ by 2 % or more, the number
of open files changes, or the run that was killed has another log or another adapter than the one that was not.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))

from support.command import ArgumentParser
from support.start import run_script

ROOT = Path(__file__).parents[2]

FROM = 50  # the step after which memory is to stand still


def start(folder: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(folder), "--epochs", "100", "--resume"]
    command += ["--max-steps", str(steps), "--snapshot-every", str(steps)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def steps_done(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        process, seen = start(whole, steps), {}
        while process.poll() is None:
            if FROM <= (done := steps_done(whole)) < steps:
                try:
                    now = resident_mb(process.pid), len(os.listdir(f"/proc/{process.pid}/fd"))
                except (OSError, IndexError):  # it has just ended
                    break
                then = seen.setdefault(done, now)
                seen[done] = then[0], min(then[1], now[1])  # a file is open while a line of the log is written
            time.sleep(0.02)
        if process.wait() or steps_done(whole) != steps:
            sys.exit(f"the run ended with {process.returncode} after {steps_done(whole)} steps")
        memory, files = [m for m, _ in seen.values()], {n for _, n in seen.values()}
        growth = memory[-1] / memory[0] - 1
        print(f"memory after step {min(seen)}: {memory[0]:.0f} MiB, after step {max(seen)}: {memory[-1]:.0f} MiB "
              f"({growth:+.2%}; at most {max(memory):.0f}); open files: {min(files)} to {max(files)}")  # fmt: skip
        wrong += ["memory"] * (abs(growth) >= 0.02) + ["open files"] * (len(files) > 1)

        rng = random.Random(0)
        for kill_at in sorted(rng.sample(range(FROM, steps), 3)):
            process = start(killed, steps)
            while steps_done(killed) < kill_at and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"killed after step {steps_done(killed)}")
        if start(killed, steps).wait():
            sys.exit("the run that was killed does not go on")
        logged = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
        wrong += ["the log"] * (logged != list(range(1, steps + 1)))
        same = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, killed)]
        wrong += ["the adapter"] * (same[0] != same[1])
        print(f"log: {len(logged)} lines, steps {logged[0]} to {logged[-1]}; adapters equal: {same[0] == same[1]}")
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    run_script(main)
