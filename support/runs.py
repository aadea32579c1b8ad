"""What a run keeps in its folder: record, log, checkpoints, snapshots; and how it goes on after a stop."""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from support import files
from support.files import UserError, check, is_number, read_log, writing
from support.losses import digest, fingerprint, read_state, write_state
from support.machine import peak_memory_mb, versions
from support.ranks import first_rank, gather, rank, ranks, say, sum_over_ranks
from support.sources import Account, source_names

FILES = ("run.json", "log.jsonl", "adapter_model.safetensors", "adapter_config.json", "merged")
INNER = ("reference", "part-*")  # runs that belong to a run
CHECKPOINT = "checkpoint-{:08d}.safetensors"  # its number: the optimizer steps done
SNAPSHOT = "step-{:08d}"  # a folder with the adapter after so many steps
ADAMW = ("step", "exp_avg", "exp_avg_sq")  # what it keeps of each parameter


def new_folder(args) -> Path:
    """The folder of a new run, --out or a fresh one. UserError if it holds another run."""
    name = f"{Path(args.model).name}-{args.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.out or f"runs/{name}")
    files.check_writable(folder / "run.json")
    check(not (folder / "config.json").exists(), f"{folder} holds a model (config.json): choose another --out")
    if (old := left_in(folder)) and not (args.overwrite or args.resume):
        raise UserError(f"{folder} holds another run ({old[0].name}): choose another --out, --resume or --overwrite")
    return folder


def left_in(folder: Path) -> list[Path]:
    """What a run has left in its folder. A link counts as itself, wherever it leads."""
    found = [folder / name for name in FILES if os.path.lexists(folder / name)]
    found += [*numbered(folder, CHECKPOINT).values(), *numbered(folder, SNAPSHOT).values()]
    if (folder / "run.json").exists():
        found += [path.parent for name in INNER for path in folder.glob(f"{name}/log.jsonl")]
    return found


def check_reads(folder: Path, arguments: dict):
    """UserError if a run in `folder` reads what it would replace there, by whatever name or link."""
    own = {path.resolve() for path in left_in(folder) if not path.is_symlink()}  # of a link, the link alone goes
    for flag in ("model", "reference", "data", "eval_data", "reference_data"):
        for source in source_names(arguments[flag]) if arguments[flag] else ():
            path = Path(source if os.path.exists(source) else source.split(":")[0])
            for read in (path, *path.glob("*")):
                if own & {read.resolve(), *read.resolve().parents}:
                    what = f"--{flag.replace('_', '-')} {source} reads {read}, which a run in {folder} replaces"
                    raise UserError(f"{what}: choose another --out")


def read_record(folder: Path) -> dict:
    """A run's run.json; {} if there is none yet. UserError if it is no record of a run."""
    path = folder / "run.json"
    record = files.read_json(path) if path.exists() else {}
    parts = [record.get(part, {}) for part in ("arguments", "fingerprints", "seconds")]
    fits = all(isinstance(part, dict) for part in parts) and all(map(is_number, parts[-1].values()))
    check(fits, f"{path} holds no record of a run")
    return record


def check_same(where: str, held: dict, now: dict):
    """UserError that names the first of a run's settings that has changed."""
    for name in sorted(held.keys() | now.keys()):
        then, value = held.get(name), now.get(name)
        check(then == value, f"{where} of another configuration: {name} was {then}, now it is {value}")


def numbered(folder: Path, form: str) -> dict[int, Path]:
    """The files or folders with names of this form, by their numbers, in order. checkpoint-x is none of them."""
    pattern = form.replace("{:08d}", "([0-9]{8,})")
    found = [(re.fullmatch(pattern, path.name), path) for path in folder.glob(form.replace("{:08d}", "*"))]
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def snapshots_in(folder: Path) -> dict[int, Path]:
    """The snapshots of its adapter in a run's folder (train.py --snapshot-every), by the steps done, in order."""
    return {step: path for step, path in numbered(folder, SNAPSHOT).items() if (path / "adapter_config.json").exists()}


class StepRecord:
    """What the log says of one optimizer step. Its sums stay on the device until they are read, all at once."""

    def __init__(self, number: int, batch: list[list[int]], examples: list, device: torch.device):
        self.start, self.number = time.perf_counter(), number
        self.samples = {i: examples[i] for micro_batch in batch for i in micro_batch}
        self.sums = torch.zeros(3, device=device)  # loss, tokens with a weight, signals

    def add(self, loss: Tensor, selected: list[Tensor]):
        """Add a micro-batch: its part of the loss, and the mask or the weights of each sample's tokens."""
        self.sums[0] += loss.detach()
        for mask in selected:
            self.sums[1] += (mask != 0).sum()

    def read(self, gradient_norm: Tensor, signal: int = 0) -> tuple[float, int, float, bool]:
        """Over all ranks: loss, tokens with a weight, the gradient's norm, whether any has got a signal."""
        self.sums[2] += signal
        sum_over_ranks([self.sums])  # the step's one message but for the gradients, then its one read from the device
        self.loss, selected, signalled, norm = torch.cat([self.sums, gradient_norm.view(1)]).tolist()
        self.selected = int(selected)
        return self.loss, self.selected, norm, signalled > 0

    def line(self, lr: float) -> dict:
        """The step's line of the log, at its end."""
        line = {"step": self.number, "loss": self.loss, "lr": lr}
        line["tokens"] = sum(len(ids) for ids, _ in self.samples.values())
        line["response_tokens"] = sum(int(response.sum()) for _, response in self.samples.values())
        line |= {"selected_tokens": self.selected, "seconds": round(time.perf_counter() - self.start, 3)}
        line["peak_memory_mb"] = round(peak_memory_mb(self.sums.device), 1)
        return line if self.selected else line | {"skipped": "no token was selected, and nothing was changed"}


class Stopped(Exception):
    """A signal has ended the run early, and it can go on: (the signal's number, what to tell the user)."""


@contextlib.contextmanager
def on_signals(handler):
    """A context in which SIGTERM and Ctrl-C call handler(number, frame)."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Checkpoints:
    """The state of a run after every so many of its steps and the last, as safetensors files to go on from.

    steps: of the whole run; every: by default a tenth of them; settings: what a run that goes on must share.
    """

    def __init__(self, folder: Path | None = None, steps: int = 0, every: int | None = None, settings=None):
        """Reads the newest whole checkpoint in `folder`. UserError if all are damaged, or if its settings differ."""
        self.folder, self.steps, self.every = folder, steps, every or math.ceil(steps / 10)
        self.done, self.held, self.signal = 0, {}, 0
        self.settings = gather(settings)[0]  # the first rank's; a shard's content would differ
        found = [*numbered(folder, CHECKPOINT).values()] if folder else []
        while found and not self.held:
            try:
                head, self.held = read_state(path := found.pop())
            except UserError as damage:
                check(found, f"{damage}; there is no other: remove it, or add --overwrite")
                files.note(f"{damage}; the run goes on from {found[-1].name}")
        if self.held:
            self.done = int(head["step"])
            check_same(f"{path} is", json.loads(head["settings"]), self.settings)

    def note(self, number: int, frame):
        """A handler of signals: the step at work becomes the last. A second Ctrl-C ends the run at once."""
        if self.signal and number == signal.SIGINT and ranks() == 1:  # torchrun sends it twice
            raise KeyboardInterrupt
        self.signal = number
        if first_rank():
            print("\nstopping after this step; Ctrl-C again: at once", file=sys.stderr)

    def restore(self, adapters: list[nn.Parameter], optimizer, history, device) -> int:
        """Put back what the newest checkpoint holds; returns the steps done. `write` saves these objects later."""
        self.adapters, self.optimizer, self.history, self.device = adapters, optimizer, history, device
        held, self.held = self.held, {}
        if not held:
            return 0
        for i, parameter in enumerate(adapters):
            parameter.data.copy_(held[f"adapter.{i}"])
        moved = [i for i in range(len(adapters)) if f"optimizer.{i}.step" in held]  # none before a step has a token
        moments = {i: {name: held[f"optimizer.{i}.{name}"] for name in ADAMW} for i in moved}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})  # the rest comes from the settings
        if history and "history.0.0" in held:
            names = [[f"history.{i}.{j}" for j in range(2)] for i in range(len(adapters) // 2)]
            history.factors = [tuple(held[name].to(device) for name in of_layer if name in held) for of_layer in names]
        torch.set_rng_state(held[f"random.{rank()}.cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(held[f"random.{rank()}.cuda"], device)
        return self.done

    def after(self, step: int, stop: bool):
        """Write a checkpoint if one is due; end the script if a signal to any rank asked for it."""
        if self.folder and (stop or step % self.every == 0 or step == self.steps):
            self.write(step)
            if stop and step < self.steps:
                raise Stopped(self.signal or signal.SIGTERM, f"stopped after step {step}; with --resume it goes on")

    def check_numbers(self, step: int, loss: float, gradient: float, samples: dict[int, tuple[Tensor, Tensor]]):
        """UserError for a step without finite numbers, before anything of it is kept."""
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            said = f"step {step}: the loss is {loss}, the gradient's norm {gradient}; the last checkpoint is untouched"
            said += f". The step's samples, counted from 0, are {', '.join(map(str, sorted(samples)))}"
            raise UserError(f"{said}. Look at their text, and try a lower --lr or --dtype float32")

    def write(self, step: int):
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {f"adapter.{i}": parameter.detach() for i, parameter in enumerate(self.adapters)}
        for i, states in enumerate(gather(random)):
            tensors |= {f"random.{i}.{kind}": state for kind, state in states.items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": moments[name] for name in ADAMW}
        for i, factors in enumerate((self.history and self.history.factors) or []):
            tensors |= {f"history.{i}.{j}": factor for j, factor in enumerate(factors)}
        if first_rank():
            head = {"step": str(step), "settings": json.dumps(self.settings)}
            write_state(self.folder / CHECKPOINT.format(step), tensors, head)
            found = numbered(self.folder, CHECKPOINT)
            for number in found.keys() - [number for number in found if number <= step][-2:]:  # later: damaged
                found[number].unlink()


class Run:
    """A run's folder, and run.json there: every argument, versions, what it was trained on, seconds."""

    def __init__(self, args, model: nn.Module, examples: list, account: Account):
        """Opens the folder that `args` names, or a new one. examples: (ids, response) each; account: of their rows."""
        self.first, self.trained = first_rank(), set()
        self.weights = digest(fingerprint(p for p in model.parameters() if not p.requires_grad), model.config.raw)
        self.folder = gather(new_folder(args) if self.first else None)[0]
        check_reads(self.folder, vars(args))
        if args.resume and (held := read_record(self.folder).get("arguments")):
            check_same(f"{self.folder} holds a run", settings(held, {}), settings(vars(args), {}))
        content = {"--model": self.weights, "--data": fingerprint(chain(*examples))}
        self.record = {"arguments": vars(args), "versions": versions(), "fingerprints": content}
        self.record |= {"samples": len(examples)} | account.record()
        self.held_out_loss = None  # where there are held-out samples: () -> their loss

    def introduce(self, model: nn.Module, examples: list, lengths: str):
        """Say how large the model and the data are, and what became of long samples."""
        trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad is on) for on in (True, False))
        tokens, answers = sum(len(ids) for ids, _ in examples), sum(int(response.sum()) for _, response in examples)
        say(f"model: {self.record['arguments']['model']}, {frozen:,} frozen parameters, {trained:,} trained")
        say(f"data: {len(examples):,} samples, {tokens:,} tokens, {answers:,} of them responses; {lengths}")

    def report_held_out(self, when: str):
        """Say and record the loss of the held-out samples, "before" or "after" training."""
        if self.held_out_loss:
            loss = self.record[f"held_out_loss_{when}"] = self.held_out_loss()
            say(f"held-out response loss {when} training: {loss:.4f} nats a token")

    def save(self):
        if self.first:
            files.write_json(self.folder / "run.json", self.record)

    def written(self) -> list[str]:
        return [file for file in (*FILES, "tokenizer.json") if (self.folder / file).exists()]

    @contextlib.contextmanager
    def training(self, args, samples: list, content: dict, folder: Path, steps: int, save_adapter):
        """A context for a training into `folder`. It gives (log, checkpoints); log takes a step's line.

        content: what the adapter depends on beside the arguments. save_adapter(folder) writes it.
        """
        rows = fingerprint(chain(*samples))
        content = {"the content of --model": self.weights, "the content of --data": rows} | content
        if args.overwrite and self.first and not self.trained:  # all that is read has been read by now
            for old in left_in(self.folder):
                with writing(old):
                    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        # refuses another configuration's checkpoint before anything is written
        checkpoints = Checkpoints(folder, steps, args.checkpoint_every, settings(vars(args), content))
        self.trained.add(folder)
        self.save()
        path = folder / "log.jsonl"
        if self.first:
            files.check_writable(path)
            files.write_lines(path, read_log(folder)[: checkpoints.done])  # a later step is done again
        with tqdm(total=steps, desc=folder.name, unit="step", disable=not self.first) as bar:
            bar.set_postfix_str(f"at work on step {checkpoints.done + 1}, {args.batch_size} samples")

            def log(line):
                held_out = ""
                if args.eval_every and line["step"] % args.eval_every == 0:
                    line["held_out_loss"] = self.held_out_loss()  # of all ranks together
                    held_out = f", held out {line['held_out_loss']:.3f}"
                if self.first:
                    with writing(path), path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    if args.snapshot_every and line["step"] % args.snapshot_every == 0:
                        save_adapter(folder / SNAPSHOT.format(line["step"]))
                share, speed = line["selected_tokens"] / line["response_tokens"], line["tokens"] / line["seconds"]
                bar.set_postfix_str(f"loss {line['loss']:.3f}{held_out}, {speed:.0f} tokens/s, {share:.1%} selected")
                bar.update(line["step"] - bar.n)

            with on_signals(checkpoints.note):
                yield log, checkpoints
        if self.first:
            save_adapter(folder)

    def finish(self, seconds: dict[str, float], auto: dict):
        """Add the `seconds` of each part and what --rho auto did to the record."""
        inner = self.folder / "reference"
        logs = {"reference": read_log(inner) if inner in self.trained else [], "training": read_log(self.folder)}
        seconds |= {what: sum(line["seconds"] for line in lines) for what, lines in logs.items()}
        self.record["seconds"] = {what: round(taken, 3) for what, taken in seconds.items()}
        self.record |= {"auto": auto} if auto else {}
        self.save()


# Flags that may differ after a stop. Where one of them changes what is trained on, `content` below differs
FREE = "out overwrite resume checkpoint_every snapshot_every eval_every merge merge_dtype eval_data skip_bad_rows"
FREE = {*FREE.split(), "cache", "debug"}


def settings(arguments: dict, content: dict) -> dict:
    """All that the adapter depends on, by the names that a user knows. content: digests of what the flags name."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in arguments.items() if name not in FREE}
    kind = str(arguments.get("device")).split(":")[0]  # a run may go on on another card of the same kind
    return flags | {"--device": kind, "the number of ranks": ranks()} | content


def check_flags(args):
    """UserError for flags of a run that do not go together."""
    rule = "--resume goes on with the run in --out: it needs that flag, and does not go with --overwrite"
    check(not args.resume or (args.out and not args.overwrite), rule)
    check(not (args.compile and args.shard), "--compile does not go with --shard")
    rule = "--eval-every measures the loss of held-out rows: give them as --eval-data"
    check(args.eval_data or not args.eval_every, rule)


def add_flags(parser):
    add = parser.group("folder of the run")
    every = functools.partial(add, type=int, bound="at least 1", metavar="N")
    # fmt: off
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    every("--checkpoint-every", help="steps between checkpoints; the last two are kept (default: a tenth of the run)")
    every("--snapshot-every", help="keep the adapter every N steps in OUT/step-..., for paper.visualize")
    every("--eval-every", help="log the held-out loss every N steps (default: only before and after)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out; start if there is none")
    add("--merge", action="store_true", help="also write OUT/merged, base and adapter as one model")
    add("--merge-dtype", choices=("bfloat16", "float32"),
        help="dtype of OUT/merged (default: --dtype). bfloat16 loses most of a short run's update, float32 keeps it")
    add("--cache", metavar="DIR",
        help="folder that keeps the losses of frozen models, for later runs with the same weights and rows")
    # fmt: on
