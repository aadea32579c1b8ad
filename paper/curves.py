"""How a run went, the explorer's second view: the curves of its log, and the tokens' two signals at its snapshots."""

import math
from pathlib import Path
from typing import NamedTuple

import lora
from model import Transformer
from support import command
from support.adapters import find_adapter, read_adapter
from support.files import UserError, is_number, read_log
from support.runs import INNER, read_record, snapshots_in

MOST = 600  # points of a curve: of a longer run, each is the mean of several steps


def read_run(folder: Path) -> dict:
    """A run as the page holds it; UserError where the folder has no log that train.py has written.

    name; folder; steps: those done; every: steps of one point; points: a list for each of CURVES; held_out: [[step,
    nats a token], ...], from 0 on; states, which `with_states` fills.
    """
    lines, inner = read_log(folder), [path.parent for name in INNER for path in folder.glob(f"{name}/log.jsonl")]
    if not lines:
        instead = f"; inside it there are {', '.join(map(str, sorted(inner)))}" if inner else ""
        raise UserError(f"{folder} has no log.jsonl, or no step in it yet{instead}")
    record, last, every = read_record(folder), lines[-1]["step"], math.ceil(len(lines) / MOST)
    held_out = [(0, record.get("held_out_loss_before"))]
    held_out += [(line["step"], line.get("held_out_loss")) for line in lines]
    held_out += [(last, record.get("held_out_loss_after"))]
    blocks = [lines[start : start + every] for start in range(0, len(lines), every)]
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "steps": last,
        "every": every,
        "points": {key: [value(block) for block in blocks] for key, value in CURVES.items()},
        "held_out": [*{step: [step, loss] for step, loss in held_out if is_number(loss)}.values()],
        "states": {},
    }


def ratio(block: list[dict], above: str, below: str) -> float | None:
    total = sum(line[below] for line in block)
    return sum(line[above] for line in block) / total if total > 0 else None


# What is drawn of a few lines of a log that stand beside each other
CURVES = {
    "step": lambda block: block[-1]["step"],
    "loss": lambda block: sum(line["loss"] for line in block) / len(block),
    "lr": lambda block: block[-1]["lr"],
    "share": lambda block: ratio(block, "selected_tokens", "response_tokens"),
    "speed": lambda block: ratio(block, "tokens", "seconds"),
}


class State(NamedTuple):
    """A model on the page: its label, its adapter's folder, and of which run it is the adapter after which step."""

    label: str
    adapter: Path | None = None
    run: Path | None = None
    step: int = 0


def find_states(adapters: list[str], model: Transformer) -> list[State]:
    """The base model, then each run's snapshots and last adapter. UserError for an adapter that does not fit."""
    states = [State("base model")]
    for adapter, name in zip(adapters, command.short_names(adapters), strict=True):
        run = Path(adapter)
        going = snapshots_in(run) and not (run / "adapter_config.json").exists()
        run = run if going else find_adapter(adapter)
        states += [State(f"{name}, step {step}", part, run, step) for step, part in snapshots_in(run).items()]
        states += [] if going else [State(name, run, run, len(read_log(run)))]
    for state in states[1:]:
        read_adapter(state.adapter, lora.decoder_linears(model))
    return states


def with_states(logs: list[dict], states: list[State]) -> list[dict]:
    """The runs of the page: `logs`, and those of its models with a log; with "states": {step: a model's number}."""
    given, shown = {run["folder"]: run for run in logs}, {}
    for number, state in enumerate(states):
        folder = str(state.run)
        if state.run and folder not in shown and (state.run / "log.jsonl").exists():
            shown[folder] = given.get(folder) or read_run(state.run)
        if folder in shown:
            shown[folder]["states"][state.step] = number
    found = [*(shown | given).values()]
    names = [run["name"] for run in found]
    for run in found:
        run["states"] |= {0: 0} if run["states"] else {}
        run["name"] = run["folder"] if names.count(run["name"]) > 1 else run["name"]
    return found
