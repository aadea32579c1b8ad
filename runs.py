"""What a run keeps and who takes part in it: folder and log, checkpoints and resume, torchrun's ranks; how scripts end.

A run's folder holds adapter_model.safetensors and adapter_config.json (peft's format), run.json (every argument,
versions, seed), log.jsonl (a line an optimizer step), its last two checkpoints and, where asked for, merged/ (a whole
model) and snapshots of its adapter, step-.../. Runs inside a run have folders of their own: reference/, part-1/, ...
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from model import (
    Transformer,
    UserError,
    find_tensors,
    open_safetensors,
    read_json,
    read_weights,
    write_json,
    write_whole,
    writing,
)

FILES = ("run.json", "log.jsonl", "adapter_model.safetensors", "adapter_config.json", "merged")
INNER = ("reference", "part-*")  # runs that belong to a run
CHECKPOINT = "checkpoint-{:08d}.safetensors"  # its number is that of the optimizer steps done
SNAPSHOT = "step-{:08d}"  # a folder with the adapter as it was after so many
FAILED = "failed-step-{:08d}.safetensors"  # the samples of a step that gave no number
PACKAGES = ("torch", "safetensors", "tokenizers", "huggingface-hub", "numpy", "pyarrow")


def new_folder(out: str | None, name: str, overwrite: bool = False, resume: bool = False) -> Path:
    """The folder of a new run: `out`, or a fresh one under runs/ that is called after `name` and the time.

    Raises UserError when `out` holds a run already, unless with `overwrite`, which deletes that run's files, or
    `resume`, which leaves them.
    """
    folder = Path(out) if out else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    old = [path for name in FILES for path in folder.glob(name)] + checkpoints_in(folder) + snapshots_in(folder)
    old += folder.glob(FAILED.replace("{:08d}", "*"))
    if (folder / "run.json").exists():
        old += [path for name in INNER for path in folder.glob(name) if (path / "log.jsonl").exists()]
    if old and not (overwrite or resume):
        raise UserError(f"{folder} holds another run ({old[0].name}): choose another --out, --resume or --overwrite")
    for path in old if overwrite else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_arguments(folder: Path, arguments: dict, free: set[str]):
    """UserError if the run that `folder` holds was started with other arguments than these, the `free` ones aside."""
    if not (folder / "run.json").exists():
        return
    held = read_json(folder / "run.json").get("arguments", {})
    for name in sorted((held.keys() | arguments.keys()) - free):
        if held.get(name) != arguments.get(name):
            flag, then, now = f"--{name.replace('_', '-')}", held.get(name), arguments.get(name)
            raise UserError(f"{folder} holds a run of another configuration: {flag} was {then}, now it is {now}")


def open_folder(out: str | None, name: str, overwrite: bool, resume: bool) -> Path:
    """The folder of a run, which the first rank makes and all use; arguments as `new_folder`'s."""
    return gather(new_folder(out, name, overwrite, resume) if first_rank() else None)[0]


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log, one for each optimizer step that it holds; none before the first."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_line(path: Path, value: dict):
    """Add one line of JSON to a log that is always whole on disk."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


class Report:
    """An evaluation's records, one for each (model, adapter, dtype), in one file that each save rewrites whole."""

    def __init__(self, path: Path | None):
        self.path, self.records = path, []
        if path:
            with writing(path):  # before the work, not after it
                path.parent.mkdir(parents=True, exist_ok=True)
        if path and path.exists():
            held = read_json(path)
            self.records = held.get("runs", [held])
            if not all(isinstance(record, dict) and "results" in record for record in self.records):
                raise UserError(f"--out {path} exists and holds no evaluation")

    def record(self, key: str, head: dict) -> dict:
        """The record of the same model, adapter and dtype: as held if its key is the same, else a new one."""
        for record in self.records:
            if all(record[field] == head[field] for field in ("model", "adapter", "dtype")):
                if record["key"] != key:  # the weights have changed since
                    record.update(key=key, results={}, timing={}, keys={}, seconds=0.0)
                record.update(head)
                return record
        self.records.append({**head, "key": key, "results": {}, "seconds": 0.0, "timing": {}, "keys": {}})
        return self.records[-1]

    def save(self):
        if self.path:
            write_json(self.path, self.records[0] if len(self.records) == 1 else {"runs": self.records})


def write_lines(path: Path, values: list[dict]):
    """Write a log anew, whole or not at all."""
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# -------------------------------------------------------------------------------------- losses of frozen models

LOSSES = 1  # how they are computed; a change to that makes it 2, and what an older version kept is not found again


def losses_key(
    model: Path, adapter: Path | None, examples: Iterable[tuple[Tensor, Tensor]], dtype: str, device: str
) -> str:
    """A digest of all that per-token losses depend on, in full: nothing that has changed hides behind an old name.

    That is every byte of the weights and configurations in the folders of a model and, perhaps, of an adapter, every
    token of `examples` and whether it is supervised, hence tokenizer, template, rows and length limit, and dtype and
    kind of device.
    """
    digest = hashlib.sha256(f"{LOSSES} {dtype} {device}".encode())
    files = [model / "config.json", *sorted(set(find_tensors(model).values()))]
    files += [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"] if adapter else []
    for path in files:
        digest.update(f" {path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    for ids, response in examples:
        digest.update(f" {len(ids)} ".encode() + ids.numpy().tobytes() + response.numpy().tobytes())
    return digest.hexdigest()


def kept_losses(cache: Path | None, key: str, compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """compute()'s losses, and the seconds that they took; with a `cache`, a folder, they are kept and found there.

    Several runs may use one cache at once: a file appears in it whole, and where two compute the same, the first
    to write it is the one that both go on with.
    """
    path = cache / f"{key}.safetensors" if cache else None

    def held():
        if path is None or not path.exists():
            return None
        file = open_safetensors(path)
        seconds, nll = (file.metadata() or {}).get("seconds", ""), file.get_tensor("nll")
        if not re.fullmatch(r"\d+\.\d+", seconds) or nll.dtype != torch.float32 or nll.dim() != 1:
            raise UserError(f"{path} holds no losses: remove it")
        return nll, float(seconds)

    try:
        if cache and first_rank():
            cache.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        if (found := gather(held() if first_rank() else None)[0]) is not None:
            return found
        start = time.perf_counter()
        nll, seconds = compute(), time.perf_counter() - start
        if path and first_rank():
            content, metadata = {"nll": nll.contiguous()}, {"seconds": f"{seconds:.3f}"}
            write_whole(path, lambda file: save_file(content, file, metadata=metadata), others_write=True)
    except (OSError, SafetensorError) as reason:
        raise UserError(f"--cache {cache} cannot be used: {reason}") from None
    return gather(held() if first_rank() else None)[0] if path else (nll, seconds)


# --------------------------------------------------------------------------------------------- checkpoints, resume


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that a run's folder holds, the newest last."""
    return sorted(folder.glob(CHECKPOINT.replace("{:08d}", "*")))


def snapshots_in(folder: Path) -> list[Path]:
    """The snapshots of its adapter that a run's folder holds (train.py --snapshot-every), the first one first."""
    found = folder.glob(SNAPSHOT.replace("{:08d}", "*"))
    return sorted(path for path in found if (path / "adapter_config.json").exists())


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """What tells these tensors from others without reading all of them: a digest of shapes and of first elements."""
    digest = hashlib.sha256()
    for tensor in tensors:
        start = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().flatten()[:4096]
        digest.update(repr(tensor.shape).encode() + start.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


ADAMW = ("step", "exp_avg", "exp_avg_sq")  # what it keeps of each parameter


class Stopped(Exception):
    """A signal has ended the run early, and it can go on: (the signal's number, what to tell the user)."""


class Checkpoints:
    """The state of a run after some of its steps, written to its folder as a whole, so that the run can go on from it.

    steps: of the whole run; every: how many lie between two checkpoints, by default a tenth; the last step leaves one
    too. settings: what a run that goes on must share with the one that wrote the checkpoint. The last two are kept.
    Each is a safetensors file, in whose header step and settings stand as text: nothing is ever unpickled.
    Without a folder nothing is written. While it is entered (`with`), SIGTERM and Ctrl-C are noted, and after the step
    in which they came a checkpoint is written and the script ends.
    """

    def __init__(self, folder: Path | None = None, steps: int = 0, every: int | None = None, settings=None):
        """Reads the newest checkpoint in `folder`; a UserError says in what its settings differ, if they do."""
        self.folder, self.steps, self.every = folder, steps, every or math.ceil(steps / 10)
        self.done, self.signal = 0, 0
        self.settings = gather(settings)[0]  # the first rank's; a shard's content would differ
        self.newest = max(checkpoints_in(folder), default=None) if folder else None
        if self.newest:
            head = open_safetensors(self.newest).metadata() or {}
            try:
                self.done, held = int(head["step"]), json.loads(head["settings"])
            except (KeyError, ValueError):
                raise UserError(f"{self.newest} is no checkpoint of train.py: remove it, or add --overwrite") from None
            for name in sorted(held.keys() | self.settings.keys()):
                then, now = held.get(name), self.settings.get(name)
                if then != now:
                    raise UserError(f"{self.newest} is of another configuration: {name} was {then}, now it is {now}")

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
        done = self.done
        if self.folder and first_rank() and (log := self.folder / "log.jsonl").exists():
            keep_lines(log, done)
        if not done:
            return 0
        held = {name: tensor.clone() for name, tensor in load_file(self.newest).items()}  # not a mapping of the file
        with torch.no_grad():
            for i, parameter in enumerate(adapters):
                parameter.copy_(held[f"adapter.{i}"])
        moments = {i: {name: held[f"optimizer.{i}.{name}"] for name in ADAMW} for i in range(len(adapters))}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})  # the rest comes from the settings
        if "history.0.0" in held:
            names = [[f"history.{i}.{j}" for j in range(2)] for i in range(len(adapters) // 2)]
            history.factors = [tuple(held[name].to(device) for name in of_layer if name in held) for of_layer in names]
        torch.set_rng_state(held[f"random.{rank()}.cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(held[f"random.{rank()}.cuda"], device)
        return done

    def after(self, step: int):
        """Write a checkpoint if one is due after this step; end the script if a signal asked for it."""
        if not self.folder:
            return
        stop = int(sum_over_ranks([torch.tensor(float(self.signal), device=self.device)])[0])
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
                write_whole(path, lambda file: save_file(content, file, metadata=about))
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
        for i, factors in enumerate(self.history.factors or []):
            tensors |= {f"history.{i}.{j}": factor for j, factor in enumerate(factors)}
        head = {"step": str(step), "settings": json.dumps(self.settings)}
        if first_rank():
            write_whole(self.folder / CHECKPOINT.format(step), lambda path: save_file(tensors, path, metadata=head))
            for old in checkpoints_in(self.folder)[:-2]:
                old.unlink()


def keep_lines(log: Path, count: int):
    """Cut a log after its first `count` lines; a step that was logged after its last checkpoint is done again.

    The last line may be half a line, where the disk was full.
    """
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    write_whole(log, lambda path: path.write_text("".join(lines), encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------- ranks


def start_ranks(device: str) -> torch.device:
    """Join the other ranks if torchrun started this process. Returns the device of this one, as `find_device`."""
    if "LOCAL_RANK" not in os.environ:
        return find_device(device)
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(local)
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default, whatever the machine has
        torch.set_num_threads(max(1, cores() // here))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    return find_device(f"cuda:{local}" if on_gpu else device)


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def started_by_torchrun() -> bool:
    return distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def first_rank() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def share(items: list) -> list:
    """What this rank is to do of a list that all ranks hold."""
    return items[rank() :: ranks()]


def share_passes(micro_batches: list[list[int]]) -> list[list[int]]:
    """The micro-batches of this rank: as many on each, since sharded weights need all ranks; some may be empty."""
    return share(micro_batches + [[] for _ in range(-len(micro_batches) % ranks())])


def gather(value) -> list:
    """The values of all ranks, in their order, on each of them."""
    values = [value]
    if distributed.is_initialized():
        values = [None] * ranks()
        distributed.all_gather_object(values, value)
    return values


def sum_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Add up each of `tensors`, all of one dtype, over the ranks, in place and in one message; returns them."""
    if distributed.is_initialized():
        message = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(message)
        for tensor, summed in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
    return tensors


def shard(model: Transformer, probed: nn.Module, device: torch.device):
    """Cut the frozen weights of `model`, on the meta device, into one part a rank (FSDP2), and read this rank's part.

    A layer's weights are gathered when it computes and dropped after; adapters stay whole on every rank. What is used
    outside of its module's own forward pass is gathered in it and stays until the backward pass comes by: the `probed`
    layer for the attention score, embedding and head (the root's) for the loss. Adapters are to be drawn after it.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.init_device_mesh(device.type, (ranks(),))
    adapters = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=layer is not probed, ignored_params=adapters)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=adapters)
    model.to_empty(device=device)
    model.tie_weights()
    read_weights(model)


# ------------------------------------------------------------------------------------------------- machine, script


def versions() -> dict[str, str]:
    """What the numbers of a run depend on: Python, the packages, the machine."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    } | found


def reuse_memory():
    """Have glibc keep the memory that large tensors leave and hand it to the next; does nothing elsewhere.

    By default each large tensor is mapped from the kernel, which clears its pages anew: on a CPU that costs up to a
    third of a forward pass. Those of 2 MiB and more ask for huge pages, where the kernel grants them to who asks. And
    torch and oneDNN, which multiplies bfloat16 for it, each keep what was prepared for the last 1,024 shapes: with
    batches of all lengths that is hundreds of MiB. A layer's few dozen are enough.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch when it allocates its first tensor
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's, oneDNN's: read at first use
        os.environ.setdefault(cache, "64")
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes: what lies free at the end of the heap stays there
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes: the largest that glibc takes


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far, MiB: the GPU's where one computes, else the process's resident maximum."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if (status := Path("/proc/self/status")).exists():  # Linux, where ru_maxrss starts from the parent's size
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS, in bytes


def find_device(name: str) -> torch.device:
    """The device that torch calls `name`; auto: a GPU if there is one, else the CPU. UserError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as reason:
        raise UserError(f"--device {name} cannot be used: {str(reason).splitlines()[0]}") from None
    if device.type == "meta":
        raise UserError("--device meta computes nothing")
    return device


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with each flag's default, where it has one to show."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with defaults in its help and one line for a mistake instead of the whole usage."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=ShowDefaults, allow_abbrev=False)
        say = "show the traceback of a mistake too, such as a flag or a file that cannot work"
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=say)  # for run_script

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def one_line(text: str) -> str:
    """`text` on one line of a terminal, with what is not printable spelled out: parts may come from anyone's file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def cell(text: str) -> str:
    """A name for a cell of a Markdown table: what would be markup in it is escaped."""
    return re.sub(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(text))


def run_script(main: Callable[[], None]):
    """Run a script's main; a mistake of the user's ends it with status 2 and one line that says which.

    With --debug its traceback comes first. Any other error is one of ours, and always has it.
    """
    reuse_memory()
    status = 0
    try:
        main()
    except UserError as mistake:
        if "--debug" in sys.argv:
            mistake.__suppress_context__ = False  # what it was made from as well
            traceback.print_exc()
        print(f"error: {one_line(str(mistake))}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as reason:
        number, message = reason.args or (signal.SIGINT, "stopped")
        if first_rank():
            print(message, file=sys.stderr)
        status = 128 + number
    if distributed.is_initialized():  # not after an error: the others may never come to the same place
        distributed.destroy_process_group()
    if status:
        sys.exit(status)
