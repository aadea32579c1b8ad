"""The demo by several methods and seeds: exact match on its test prompts and held-out loss, as a table.

python tests/bench/bench_demo.py [--seeds 5] [--methods full,random,sstoken] [-- FLAGS OF train.py]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))
from support.start import run_script

import train
from support import command

ROOT = Path(__file__).parents[2]


def run(script: str, *flags) -> str:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)], check=True, capture_output=True
    ).stdout


def measure(folder: Path, *flags) -> tuple[float, float, float]:
    """(exact match in percent, held-out loss, seconds of training) of one run; without flags, of the base model."""
    model, out = train.DEMO_FILES["model"], folder / "results.json"
    if flags:
        run("train.py", "--out", folder, *flags)
    adapter = ["--adapter", folder] if flags else []
    asked = ["--tasks", "instructions", "--data", train.DEMO_FOLDER]
    run("evaluate.py", "--model", model, *adapter, *asked, "--out", out)
    exact = 100 * json.loads(out.read_text())["results"]["instructions"]["exact_match"]
    record = json.loads((folder / "run.json").read_text()) if flags else {}
    return exact, record.get("held_out_loss_after"), record.get("seconds", {}).get("training")


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    parser = command.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default="full,random,sstoken")
    argv = sys.argv[1:]
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    with tempfile.TemporaryDirectory() as place:
        print(f"before: exact match {measure(Path(place))[0]:.1f} %", flush=True)
        print(
            "| method | exact match, % | held-out response loss | seconds of training |\n| --- | ---: | ---: | ---: |"
        )
        for method in args.methods.split(","):
            found = []
            for seed in range(42, 42 + args.seeds):
                found.append(measure(Path(place) / f"{method}-{seed}", "--method", method, "--seed", seed, *flags))
            exact, loss, seconds = zip(*found, strict=True)
            print(f"| {method} | {spread(exact, 1)} | {spread(loss, 3)} | {spread(seconds, 0)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
