"""What a run keeps: its folder, checkpoints, how it goes on after a stop; the reports of evaluations.

A run's folder holds adapter_model.safetensors and adapter_config.json (peft's format), run.json (every argument,
versions, seed), log.jsonl (a line an optimizer step), its last two checkpoints and, where asked for, merged/ (a whole
model) and snapshots of its adapter, step-.../. Runs inside a run have folders of their own: reference/, part-1/, ...
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from support import files
from support.checkpoint import open_safetensors
from support.files import LINE, UserError, is_number, read_log, writing
from support.machine import peak_memory_mb, versions
from support.ranks import first_rank, gather, rank, ranks, say, sum_over_ranks
from support.sources import Account, source_names

FILES = ("run.json", "log.jsonl", "adapter_model.safetensors", "adapter_config.json", "merged")
INNER = ("reference", "part-*")  # runs that belong to a run
CHECKPOINT = "checkpoint-{:08d}.safetensors"  # its number is that of the optimizer steps done
SNAPSHOT = "step-{:08d}"  # a folder with the adapter as it was after so many
FAILED = "failed-step-{:08d}.safetensors"  # the samples of a step that gave no number


def new_folder(out: str | None, name: str, overwrite: bool = False, resume: bool = False) -> Path:
    """The folder of a new run: `out`, or a fresh one under runs/ that is called after `name` and the time.

    Raises UserError when `out` holds a run already, unless with `overwrite` or `resume`. Nothing is deleted yet.
    """
    folder = Path(out) if out else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a model (config.json): choose another --out")
    old = left_in(folder)
    if old and not (overwrite or resume):
        raise UserError(f"{folder} holds another run ({old[0].name}): choose another --out, --resume or --overwrite")
    files.check_writable(folder / "run.json")
    return folder


def left_in(folder: Path) -> list[Path]:
    """What a run's folder holds of it; links among them, wherever they lead."""
    found = [folder / name for name in FILES if os.path.lexists(folder / name)]
    found += [path for form in (CHECKPOINT, SNAPSHOT, FAILED) for path in numbered(folder, form)]
    if (folder / "run.json").exists():
        found += [path for name in INNER for path in folder.glob(name) if (path / "log.jsonl").exists()]
    return found


def check_reads(folder: Path, arguments: dict):
    """UserError if a run in `folder` reads what it would replace there, by a name of its own or by a link."""
    own = {path.parent.resolve() / path.name for path in left_in(folder)}  # of a link, the link alone
    for flag in ("model", "reference", "data", "eval_data", "reference_data"):
        for source in source_names(arguments[flag]) if arguments[flag] else ():
            path = Path(source if os.path.exists(source) else source.split(":")[0])
            for read in (path, path.parent, *path.glob("*")):
                real, named = read.resolve(), read.parent.resolve() / read.name
                if own & {real, named, *real.parents, *named.parents}:
                    name = f"--{flag.replace('_', '-')} {source}"
                    raise UserError(f"{name} reads {read}, which a run in {folder} replaces: choose another --out")


def read_record(folder: Path) -> dict:
    """A run's run.json, {} before it is there. UserError unless its parts are objects, and its seconds numbers."""
    path = folder / "run.json"
    record = files.read_json(path) if path.exists() else {}
    parts = [record.get(part, {}) for part in ("arguments", "fingerprints", "seconds")]
    if not all(isinstance(part, dict) for part in parts) or not all(map(is_number, parts[-1].values())):
        raise UserError(f"{path} holds no record of a run")
    return record


def check_same(where: str, held: dict, now: dict):
    """UserError that names the first of a run's settings that differs from what it was."""
    for name in sorted(held.keys() | now.keys()):
        if (then := held.get(name)) != now.get(name):
            raise UserError(f"{where} of another configuration: {name} was {then}, now it is {now.get(name)}")


def numbered(folder: Path, form: str) -> list[Path]:
    """What a folder holds under names of this form, the least number first; checkpoint-x is nobody's checkpoint."""
    start, end = form.split("{:08d}")
    found = {path.name.removeprefix(start).removesuffix(end): path for path in folder.glob(f"{start}*{end}")}
    return [found[number] for number in sorted(found, key=lambda n: (len(n), n)) if re.fullmatch("[0-9]{8,}", number)]


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that a run's folder holds, the newest last."""
    return numbered(folder, CHECKPOINT)


def snapshots_in(folder: Path) -> list[Path]:
    """The snapshots of its adapter that a run's folder holds (train.py --snapshot-every), the first one first."""
    return [path for path in numbered(folder, SNAPSHOT) if (path / "adapter_config.json").exists()]


def snapshot_step(folder: Path) -> int:
    """After how many steps of its run a snapshot was taken."""
    return int(folder.name.removeprefix(SNAPSHOT.partition("{")[0]))


def fingerprint(tensors: Iterable[Tensor], most: int | None = 4096) -> str:
    """What tells these tensors from others: a digest of shapes and of the first elements, or of all: `most` None."""
    digest = hashlib.sha256()
    for tensor in tensors:
        start = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().flatten()[:most]
        digest.update(repr((tensor.shape, tensor.dtype)).encode())
        digest.update(start.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


ADAMW = ("step", "exp_avg", "exp_avg_sq")  # what it keeps of each parameter


class StepRecord:
    """What the log says of one optimizer step: sums that stay on the device until they are read, at once."""

    def __init__(self, number: int, batch: list[list[int]], examples: list, device: torch.device):
        self.start, self.number, self.device = time.perf_counter(), number, device
        self.samples = {i: examples[i] for micro_batch in batch for i in micro_batch}
        self.loss, self.selected = torch.zeros(2, device=device)

    def add(self, loss: Tensor, selected: list[Tensor]):
        """A micro-batch's part of the loss, and which tokens of its samples were selected, or have a weight."""
        self.loss += loss.detach()
        for mask in selected:
            self.selected += (mask != 0).sum()

    def line(self, lr: float, gradient_norm: Tensor, signal: int = 0) -> tuple[dict, float, bool]:
        """The step's line of the log, over all ranks; the gradient's norm; whether any rank has got a signal.

        The step's one message but for the gradients, and its one read from the device.
        """
        signals = torch.full_like(self.loss, signal)
        sums = sum_over_ranks([self.loss, self.selected, signals])
        loss, selected, signalled, norm = torch.stack([*sums, gradient_norm]).tolist()
        sizes = [(len(ids), int(response.sum())) for ids, response in self.samples.values()]
        seconds = round(time.perf_counter() - self.start, 3)
        values = (self.number, loss, lr, *map(sum, zip(*sizes, strict=True)), int(selected), seconds)
        line = dict(zip(LINE, values, strict=True)) | {"peak_memory_mb": round(peak_memory_mb(self.device), 1)}
        return line, norm, signalled > 0


class Stopped(Exception):
    """A signal has ended the run early, and it can go on: (the signal's number, what to tell the user)."""


class Checkpoints:
    """The state of a run after some of its steps, written to its folder as a whole, so that the run can go on from it.

    steps: of the whole run; every: how many lie between two checkpoints, by default a tenth; the last step leaves one
    too. settings: what a run that goes on must share with the one that wrote the checkpoint. The last two are kept.
    Each is a safetensors file, in whose header step, settings and a digest of all stand as text: nothing is unpickled.
    Without a folder nothing is written. While it is entered (`with`), SIGTERM and Ctrl-C are noted, and after the step
    in which they came a checkpoint is written and the script ends.
    """

    def __init__(self, folder: Path | None = None, steps: int = 0, every: int | None = None, settings=None):
        """Reads the newest checkpoint in `folder` that is whole; UserError if none is, or its settings differ."""
        self.folder, self.steps, self.every = folder, steps, every or math.ceil(steps / 10)
        self.done, self.held, self.signal, damage = 0, {}, 0, ""
        self.settings = gather(settings)[0]  # the first rank's; a shard's content would differ
        for path in reversed(checkpoints_in(folder) if folder else []):
            try:
                head, self.held = read_state(path)
                self.done, held = int(head["step"]), json.loads(head["settings"])
            except UserError as reason:
                damage = damage or str(reason)
                continue
            if damage:
                files.note(f"{damage}; the run goes on from {path.name}")
            return check_same(f"{path} is", held, self.settings)
        if damage:
            raise UserError(f"{damage}; there is no other: remove it, or add --overwrite")

    def __enter__(self):
        def note(number, frame):
            if self.signal and number == signal.SIGINT and ranks() == 1:  # torchrun sends it twice
                raise KeyboardInterrupt
            self.signal = number
            if first_rank():
                print("\nstopping after this step; Ctrl-C again: at once", file=sys.stderr)

        self.handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def restore(self, adapters: list[nn.Parameter], optimizer, history, device) -> int:
        """Put everything back that the newest checkpoint holds; returns the steps done, 0 where there is none.

        From then on these same objects are what is written. The log loses the lines of later steps.
        """
        self.adapters, self.optimizer, self.history, self.device = adapters, optimizer, history, device
        done, held, self.held = self.done, self.held, {}
        if self.folder and first_rank() and (log := self.folder / "log.jsonl").exists():
            files.write_lines(log, read_log(self.folder)[:done])  # a step after the checkpoint is done again
        if not done:
            return 0
        with torch.no_grad():
            for i, parameter in enumerate(adapters):
                parameter.copy_(held[f"adapter.{i}"])
        moments = {i: {name: held[f"optimizer.{i}.{name}"] for name in ADAMW} for i in range(len(adapters))}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})  # the rest comes from the settings
        if history and "history.0.0" in held:
            names = [[f"history.{i}.{j}" for j in range(2)] for i in range(len(adapters) // 2)]
            history.factors = [tuple(held[name].to(device) for name in of_layer if name in held) for of_layer in names]
        torch.set_rng_state(held[f"random.{rank()}.cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(held[f"random.{rank()}.cuda"], device)
        return done

    def after(self, step: int, stop: bool):
        """Write a checkpoint if one is due after this step; end the script if a signal, of any rank, asked for it."""
        if not self.folder:
            return
        if stop or step % self.every == 0 or step == self.steps:
            self.write(step)
        if stop and step < self.steps:
            raise Stopped(self.signal or signal.SIGTERM, f"stopped after step {step}; with --resume it goes on")

    def check_numbers(self, step: int, loss: float, gradient: float, samples: dict[int, tuple[Tensor, Tensor]]):
        """Stop the run after a step whose loss or gradient's norm is no finite number, before any of it is kept.

        samples: those of the step, (ids, response) each, by their numbers from 0. They are written to the run's folder
        for whoever looks for the reason. All ranks have the same numbers, so all stop.
        """
        if math.isfinite(loss) and math.isfinite(gradient):
            return
        numbers, where = sorted(samples), ""
        if self.folder:
            path = self.folder / FAILED.format(step)
            content = {f"ids {i}": samples[i][0] for i in numbers} | {f"response {i}": samples[i][1] for i in numbers}
            about = {"step": str(step), "loss": str(loss), "gradient norm": str(gradient)}
            if first_rank():
                files.write_whole(path, lambda file: save_file(content, file, metadata=about))
            gather(None)  # a rank that ended now would have the others ended too
            where = f", saved in {path}; the last checkpoint is untouched"
        raise UserError(
            f"step {step}: the loss is {loss}, the gradient's norm {gradient}. Its samples, counted from 0, are "
            f"{', '.join(map(str, numbers))}{where}. Look at their text, and try a lower --lr or --dtype float32"
        )

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
        head = {"step": str(step), "settings": json.dumps(self.settings)}
        if first_rank():
            path = self.folder / CHECKPOINT.format(step)
            write_state(path, tensors, head)
            found = checkpoints_in(self.folder)
            for old in {*found} - {*[held for held in found if held <= path][-2:]}:  # what is later was damaged
                old.unlink()


def state_digest(tensors: dict[str, Tensor], head: dict[str, str]) -> str:
    names = sorted(tensors)
    return digest(sorted(head.items()), names, fingerprint((tensors[name] for name in names), None))


def write_state(path: Path, tensors: dict[str, Tensor], head: dict[str, str], others_write: bool = False):
    """Write tensors, with what `head` says of them and a digest of all; arguments as write_whole's."""
    said = head | {"digest": state_digest(tensors, head)}
    files.write_whole(path, lambda file: save_file(tensors, file, metadata=said), others_write)


def read_state(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What `write_state` has written: (head, tensors). UserError for a file that is not whole, or of other content."""
    file = open_safetensors(path)
    names, head = file.keys(), file.metadata() or {}
    tensors = {name: file.get_tensor(name).clone() for name in names}  # not a mapping of the file
    if head.pop("digest", None) != state_digest(tensors, head):
        raise UserError(f"{path} is damaged: its content is not what its digest says")
    return head, tensors


class Run:
    """A run's folder, and run.json there: every argument, versions, what it was trained on, seconds."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, examples: list, account: Account):
        """Opens the folder that `args` names, or a new one; examples: (ids, response) each, account: of their rows."""
        frozen = fingerprint(p for p in model.parameters() if not p.requires_grad)
        self.first, self.weights = first_rank(), digest(frozen, model.config.raw)
        name = f"{Path(args.model).name}-{args.method}"
        folder = new_folder(args.out, name, args.overwrite, args.resume) if self.first else None
        self.folder, self.trained = gather(folder)[0], set()
        check_reads(self.folder, vars(args))
        if args.resume and (held := read_record(self.folder).get("arguments")):
            check_same(f"{self.folder} holds a run", settings(held, {}), settings(vars(args), {}))
        content = {"--model": self.weights, "--data": fingerprint(tensor for example in examples for tensor in example)}
        self.record = {"arguments": vars(args), "versions": versions(), "fingerprints": content}
        self.record |= {"samples": len(examples)} | account.record()
        self.held_out_loss: Callable[[], float] | None = None  # where there are held-out samples: measures their loss

    def introduce(self, model: nn.Module, examples: list, lengths: str):
        """Say how large the model and the data are, and what became of long samples."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters()) - trained
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
    def training(self, args, samples: list, content: dict, folder: Path, steps: int, save_adapter: Callable):
        """One training of the run, into `folder`: yields what logs a step's line, and the checkpoints to go on from.

        content: what the arguments do not say of what the adapter depends on. save_adapter: folder -> the adapter is
        there; asked for snapshots, and when the training has ended well.
        """
        content = {
            "the content of --model": self.weights,
            "the content of --data": fingerprint(tensor for sample in samples for tensor in sample),
        } | content
        if args.overwrite and self.first and not self.trained:  # all that is read has been read by now
            for path in left_in(self.folder):
                with writing(path):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        # refuses another configuration's checkpoint before anything is written
        checkpoints = Checkpoints(folder, steps, args.checkpoint_every, settings(vars(args), content))
        with writing(folder):
            folder.mkdir(exist_ok=True)
        self.trained.add(folder)
        self.save()
        with tqdm(total=steps, desc=folder.name, unit="step", disable=not self.first) as bar, checkpoints:
            bar.set_postfix_str(f"at work on step {checkpoints.done + 1}, {args.batch_size} samples")

            def log(line):
                held_out = ""
                if args.eval_every and line["step"] % args.eval_every == 0:
                    line["held_out_loss"] = self.held_out_loss()  # of all ranks together
                    held_out = f", held out {line['held_out_loss']:.3f}"
                if self.first:
                    files.append_line(folder / "log.jsonl", line)
                    if args.snapshot_every and line["step"] % args.snapshot_every == 0:
                        save_adapter(folder / SNAPSHOT.format(line["step"]))
                share, speed = line["selected_tokens"] / line["response_tokens"], line["tokens"] / line["seconds"]
                bar.set_postfix_str(f"loss {line['loss']:.3f}{held_out}, {speed:.0f} tokens/s, {share:.1%} selected")
                bar.update(line["step"] - bar.n)

            yield log, checkpoints
        if self.first:
            save_adapter(folder)

    def finish(self, seconds: dict[str, float]):
        """Add to the record the `seconds` of each part, and those of the trainings, before a stop and after it."""
        inner = self.folder / "reference"
        logs = {"reference": read_log(inner) if inner in self.trained else [], "training": read_log(self.folder)}
        seconds |= {what: sum(line["seconds"] for line in lines) for what, lines in logs.items()}
        self.record["seconds"] = {what: round(taken, 3) for what, taken in seconds.items()}
        self.save()


SAME = ("model", "adapter", "dtype", "template", "data", "limit")  # who answers what, in which form
PARTS = ("results", "keys", "timing")  # of a record, each by task


class Report:
    """An evaluation's records in one file, one for each SAME; several processes may add to it at once."""

    def __init__(self, path: Path | None):
        self.path = path
        if path:
            files.check_writable(path)  # before the work, not after it
        self.records()

    def records(self) -> dict[str, dict]:
        """What the file holds by now, each record under a digest of its SAME; UserError for another file."""
        held = files.read_json(self.path) if self.path and self.path.exists() else {"runs": []}
        try:
            found = list.copy(held.get("runs", [held]))
            found = [record | {part: dict.copy(record[part]) for part in PARTS} for record in found]
            values = [part for record in found for part in (record["timing"], *record["results"].values())]
            if not all(n is None or is_number(n) for part in values for n in part.values()):
                raise TypeError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"--out {self.path} exists and holds no evaluation") from None
        return {digest(*map(record.get, SAME)): record for record in found}

    def record(self, key: str, head: dict) -> dict:
        """`head` with what is held of its SAME, if its key is the same; a model that has changed has no answers yet."""
        held = self.records().get(digest(*map(head.get, SAME)), {})
        return head | {"key": key} | {part: held[part] if held.get("key") == key else {} for part in PARTS}

    @contextlib.contextmanager
    def saving(self, record: dict):
        """A context in which no other process writes, and `record` has all that is held of it; its end is written."""
        if not self.path:
            yield
            return
        lock = os.open(self.path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            now = self.record(record["key"], record)
            record |= {part: record[part] | now[part] for part in PARTS}
            yield
            records = [*(self.records() | {digest(*map(record.get, SAME)): record}).values()]
            files.write_json(self.path, record if len(records) == 1 else {"runs": records})
        finally:
            os.close(lock)


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


# What may differ between a run and the one that goes on with it: none of it changes the adapter, but for --cache where
# ssToken's history comes from there, of which `settings` is told.
FREE = {"out", "overwrite", "resume", "checkpoint_every", "snapshot_every", "merge", "eval_data", "cache", "debug"}
FREE |= {"merge_dtype", "skip_bad_rows", "eval_every"}  # the content of --data is compared, whatever was left out of it


def settings(arguments: dict, content: dict) -> dict:
    """All that the adapter depends on, by the names that a user knows: for checkpoints, which hold for nothing else.

    content: what stands behind the arguments, such as the digest of a file that one of them names.
    """
    flags = {f"--{name.replace('_', '-')}": value for name, value in arguments.items() if name not in FREE}
    kind = str(arguments.get("device")).split(":")[0]  # each rank has a card of its own, and a run may go on on another
    return flags | {"--device": kind, "the number of ranks": ranks()} | content


def check_flags(args: argparse.Namespace):
    """UserError for flags of a run that do not go together."""
    if args.resume and (args.overwrite or not args.out):
        raise UserError("--resume goes on with the run in --out: it needs that flag, and does not go with --overwrite")
    if args.eval_every and not args.eval_data:
        raise UserError("--eval-every measures the loss of held-out rows: give them as --eval-data")


def add_flags(parser):
    """The flags of a run's folder, and of how it goes on after a stop."""
    add = parser.group("folder of the run")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    # fmt: off
    add("--checkpoint-every", type=int, bound="at least 1", metavar="N",
        help="steps between two checkpoints, of which OUT keeps the last two; default: a tenth of the run")
    add("--snapshot-every", type=int, bound="at least 1", metavar="N",
        help="keep the adapter as it is after every N steps, in OUT/step-...: paper.visualize shows them one by one")
    add("--eval-every", type=int, bound="at least 1", metavar="N",
        help="add the loss of --eval-data to the log at every N-th step; default: before and after alone")
    add("--resume", action="store_true",
        help="go on from the newest checkpoint in --out, with the same adapter in the end as a run that never stopped; "
        "where there is none, start")
    add("--merge", action="store_true", help="also write OUT/merged, base and adapter in one checkpoint")
    add("--merge-dtype", choices=("bfloat16", "float32"),
        help="of OUT/merged; default: --dtype. bfloat16 rounds most of a short run's update away, float32 keeps it")
    add("--cache", metavar="DIR",
        help="keep the per-token losses of frozen models there, and take from there what earlier runs on the same "
        "weights and rows have kept; several runs may share it")
    # fmt: on
