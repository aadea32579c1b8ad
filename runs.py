"""What a run keeps: its folder, its log (one JSON line an optimizer step), its settings; and how every script ends.

A run's folder holds adapter_model.safetensors and adapter_config.json (peft's format), run.json (every argument,
versions, seed), log.jsonl and, where asked for, merged/ (a whole checkpoint).
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model import UserError, read_json, write_json

FILES = ("run.json", "log.jsonl", "adapter_model.safetensors", "adapter_config.json", "merged")
PACKAGES = ("torch", "safetensors", "tokenizers", "huggingface-hub", "numpy", "pyarrow")


def new_folder(out: str | None, name: str, overwrite: bool = False) -> Path:
    """The folder of a new run: `out`, or a fresh one under runs/ that is called after `name` and the time.

    Raises UserError when `out` holds a run already, unless `overwrite`, which deletes that run's files.
    """
    folder = Path(out) if out else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    old = [folder / file for file in FILES if (folder / file).exists()]
    if old and not overwrite:
        raise UserError(f"{folder} holds another run ({old[0].name}); choose another --out or add --overwrite")
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise UserError(f"--out {folder} cannot be made: {reason.strerror}") from None
    return folder


def append_line(path: Path, value: dict):
    """Add one line of JSON to a log that is always whole on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


class Report:
    """An evaluation's records, one for each (model, adapter, dtype), in one file that each save rewrites whole."""

    def __init__(self, path: Path | None):
        self.path, self.records = path, []
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
    third of a forward pass.
    """
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

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def run_script(main: Callable[[], None]):
    """Run a script's main; a mistake of the user's ends it with status 2 and one line that says which."""
    reuse_memory()
    try:
        main()
    except UserError as mistake:
        print(f"error: {' '.join(str(mistake).split())}", file=sys.stderr)
        sys.exit(2)
