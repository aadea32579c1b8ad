"""What is computed once and kept under a digest of all that it depends on: losses, answers."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoint import TOKENIZER_FILES, find_tensors, open_safetensors
from support.files import check, check_writable, is_number, read_json, told, write_json, write_whole
from support.ranks import first_rank, gather

LOSSES = 1  # how they are computed; a change to that makes it 2, and what an older version kept is not found again


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


def fingerprint(tensors: Iterable[Tensor], most: int | None = 4096) -> str:
    """A digest of the tensors' shapes and of their first elements, or of all: `most` None."""
    digest = hashlib.sha256()
    for tensor in tensors:
        start = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().flatten()[:most]
        digest.update(repr((tensor.shape, tensor.dtype)).encode())
        digest.update(start.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def content_digest(head: dict[str, str], tensors: dict[str, Tensor]) -> str:
    names = sorted(tensors)
    return digest(sorted(head.items()), names, fingerprint(map(tensors.get, names), most=None))


def write_state(path: Path, tensors: dict[str, Tensor], head: dict[str, str], others_write: bool = False):
    """Write tensors, with what `head` says of them and a digest of all; arguments as write_whole's."""
    about = head | {"digest": content_digest(head, tensors)}
    write_whole(path, lambda file: save_file(tensors, file, metadata=about), others_write)


def read_state(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What `write_state` has written: (head, tensors). UserError for a damaged file."""
    file = open_safetensors(path)
    tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}  # not a mapping of the file
    head = file.metadata() or {}
    stored = head.pop("digest", "")
    check(stored == content_digest(head, tensors), f"{path} is damaged: its content is not what its digest says")
    return head, tensors


def files_key(whole: Iterable[Path], dated: Iterable[Path] = ()) -> str:
    """A digest of files: names, sizes and contents; of `dated` files the time instead of the content."""

    def state(path: Path) -> list:
        with path.open("rb") as file:
            content = path.stat().st_mtime_ns if path in dated else hashlib.file_digest(file, "sha256").hexdigest()
        return [os.fsencode(path.name).hex(), path.stat().st_size, content]

    return digest(sorted(map(state, {*whole, *dated}), key=str))


def model_key(model: Path, adapter: Path | None = None, whole: bool = False) -> str:
    """A digest of all files that a model's answers depend on; weights by size and time, unless `whole`."""
    weights = {stored.path for stored in find_tensors(model).values()}
    patterns = ("config.json", "generation_config.json", "chat_template*", *TOKENIZER_FILES)
    files = {path for pattern in patterns for path in model.glob(pattern) if path.is_file()}
    if adapter:
        weights.add(adapter / "adapter_model.safetensors")
        files.add(adapter / "adapter_config.json")
    return files_key(files | weights) if whole else files_key(files, weights)


def losses_key(model: Path, adapter: Path | None, examples: Iterable[tuple], dtype: str, device: str) -> str:
    """A digest of all that losses depend on; examples: (ids, response) each."""
    weights, samples = model_key(model, adapter, whole=True), fingerprint(chain(*examples), most=None)
    return digest(LOSSES, dtype, device, weights, samples)


def kept_losses(cache: Path | None, key: str, compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """compute()'s losses, and the seconds that it took. The folder `cache` keeps those of the first run that ends."""
    path = cache / f"{key}.safetensors" if cache and first_rank() else None
    if path:
        check_writable(path)  # before the work, not after it

    def held():
        head, tensors = read_state(path) if path and path.exists() else ({}, {})
        return gather((tensors["nll"], float(head["seconds"])) if tensors else None)[0]

    if found := held():
        return found
    start = time.perf_counter()
    nll, seconds = compute(), time.perf_counter() - start
    if path:
        write_state(path, {"nll": nll.contiguous()}, {"seconds": f"{seconds:.3f}"}, others_write=True)
    return held() or (nll, seconds)


SAME = ("model", "adapter", "dtype", "template", "data", "limit")  # who answers what, in which form
PARTS = ("results", "keys", "timing")  # of a record, each by task


class Report:
    """An evaluation's records in one file, one for each SAME. Several processes may add to it at once."""

    def __init__(self, path: Path | None):
        self.path = path
        if path:
            check_writable(path)  # before the work, not after it
        self.records()

    def records(self) -> dict[tuple, dict]:
        """The records that the file holds by now, by their values of SAME. UserError if it holds anything else."""
        held = read_json(self.path) if self.path and self.path.exists() else {"runs": []}
        with told(another := f"--out {self.path} exists and holds no evaluation"):
            found = {tuple(map(record.get, SAME)): record for record in list.copy(held.get("runs", [held]))}
            for record in found.values():
                parts = [record["timing"], *record["results"].values()]
                numbers = all(n is None or is_number(n) for part in parts for n in part.values())
                check(numbers and isinstance(record["keys"], dict), another)
        return found

    def record(self, key: str, head: dict) -> dict:
        """`head` with the answers that the file holds of its SAME. None if `key`, the model's, has changed."""
        held = self.records().get(tuple(map(head.get, SAME)), {})
        return head | {"key": key} | {part: held[part] if held.get("key") == key else {} for part in PARTS}

    @contextlib.contextmanager
    def saving(self, record: dict):
        """A context in which no other process writes. `record` gets what the file holds, and is saved at the end."""
        if not self.path:
            yield
            return
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            now = self.record(record["key"], record)
            record |= {part: record[part] | now[part] for part in PARTS}
            yield
            records = [*(self.records() | {tuple(map(record.get, SAME)): record}).values()]
            write_json(self.path, record if len(records) == 1 else {"runs": records})
        finally:
            os.close(folder)
