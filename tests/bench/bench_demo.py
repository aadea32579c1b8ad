"""The demo by several methods and seeds: exact match on its test prompts and held-out loss, as a table.

python tests/bench/bench_demo.py [--seeds 5] [--methods full,random,sstoken,auto,oracle] [-- FLAGS OF train.py]

auto: `--rho auto`. oracle: trained on the tokens alone that the rows' column "noise" does not mark.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))
import data
import train
from paper import baselines, visualize
from support import command
from support.sources import load_rows
from support.start import run_script

ROOT = Path(__file__).parents[2]
METHODS = {name: ["--method", name] for name in baselines.METHODS}
METHODS |= {"auto": ["--rho", "auto"], "oracle": ["--method", "full"]}


def run(script: str, *flags) -> str:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)], check=True, capture_output=True
    ).stdout


def train_oracle(argv: list[str]):
    """train.py, but for what is trained on: the tokens that are not marked."""
    args = train.parse_arguments(argv)
    tokenizer, rows = data.load_tokenizer(args.model), load_rows(args.data)
    examples, _ = data.load_examples(args.data, tokenizer, args.max_length)
    noise = visualize.marked(rows, examples, tokenizer)
    baselines.make_selection = lambda *_: baselines.PrecomputedSelection([~mask for mask in noise])
    train.main(argv)


def measure(folder: Path, method: str | None = None, *flags) -> tuple[float, float, float]:
    """(exact match in percent, held-out loss, seconds of training) of one run; without a method, of the base model."""
    model, out = train.DEMO_FILES["model"], folder / "results.json"
    if method:
        script = ["tests/bench/bench_demo.py", "--oracle", "--"] if method == "oracle" else ["train.py"]
        run(*script, "--out", folder, *METHODS[method], *flags)
    adapter = ["--adapter", folder] if method else []
    asked = ["--tasks", "instructions", "--data", train.DEMO_FOLDER]
    run("evaluate.py", "--model", model, *adapter, *asked, "--out", out)
    exact = 100 * json.loads(out.read_text())["results"]["instructions"]["exact_match"]
    record = json.loads((folder / "run.json").read_text()) if method else {}
    return exact, record.get("held_out_loss_after"), record.get("seconds", {}).get("training")


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    parser = command.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default="full,random,sstoken,auto,oracle", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--oracle", action="store_true", help="only train one, with the flags behind --")
    argv = sys.argv[1:]
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    if args.oracle:
        return train_oracle(flags)
    with tempfile.TemporaryDirectory() as place:
        print(f"before: exact match {measure(Path(place))[0]:.1f} %", flush=True)
        print(
            "| method | exact match, % | held-out response loss | seconds of training |\n| --- | ---: | ---: | ---: |"
        )
        for method in args.methods.split(","):
            found = []
            for seed in range(42, 42 + args.seeds):
                found.append(measure(Path(place) / f"{method}-{seed}", method, "--seed", seed, *flags))
                print(f"{method}, seed {seed}: {found[-1]}", file=sys.stderr, flush=True)
            exact, loss, seconds = zip(*found, strict=True)
            print(f"| {method} | {spread(exact, 1)} | {spread(loss, 3)} | {spread(seconds, 0)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
