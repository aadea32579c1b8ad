"""What is computed once and kept under a digest of all that it depends on: tensors, losses, answers of evaluations."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoint import TOKENIZER_FILES, find_tensors, open_safetensors
from support.files import UserError, check_writable, is_number, read_json, write_json, write_whole
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


def with_digest(head: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, str]:
    names = sorted(tensors)
    return head | {"digest": digest(sorted(head.items()), names, fingerprint(map(tensors.get, names), None))}


def write_state(path: Path, tensors: dict[str, Tensor], head: dict[str, str], others_write: bool = False):
    """Write tensors, with what `head` says of them and a digest of all; arguments as write_whole's."""
    write_whole(path, lambda file: save_file(tensors, file, metadata=with_digest(head, tensors)), others_write)


def read_state(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What `write_state` has written: (head, tensors). UserError for a file that is not whole, or of other content."""
    file = open_safetensors(path)
    names, said = file.keys(), file.metadata() or {}
    tensors = {name: file.get_tensor(name).clone() for name in names}  # not a mapping of the file
    head = {name: text for name, text in said.items() if name != "digest"}
    if with_digest(head, tensors) != said:
        raise UserError(f"{path} is damaged: its content is not what its digest says")
    return head, tensors


def files_key(whole: Iterable[Path], dated: Iterable[Path] = ()) -> str:
    """A digest of files by their names, sizes and contents; of the `dated` ones the time stands for the content."""
    digest, dated = hashlib.sha256(), set(dated)
    for path in sorted({*whole, *dated}, key=lambda path: path.name):
        status = path.stat()
        digest.update(os.fsencode(path.name) + f" {status.st_size} {path in dated and status.st_mtime_ns} ".encode())
        with path.open("rb") as file:
            while path not in dated and (block := file.read(2**22)):
                digest.update(block)
    return digest.hexdigest()


def model_key(model: Path, adapter: Path | None = None, whole: bool = False) -> str:
    """A digest of all files that a model's answers depend on; of its weights by size and time alone, unless `whole`."""
    weights = {stored.path for stored in find_tensors(model).values()}
    patterns = ("config.json", "generation_config.json", "chat_template*", *TOKENIZER_FILES)
    files = {path for pattern in patterns for path in model.glob(pattern) if path.is_file()}
    if adapter:
        weights.add(adapter / "adapter_model.safetensors")
        files.add(adapter / "adapter_config.json")
    return files_key(files | weights) if whole else files_key(files, weights)


def losses_key(model: Path, adapter: Path | None, examples: Iterable[tuple], dtype: str, device: str) -> str:
    """A digest of all that losses depend on: files' contents, dtype, kind of device; examples: (ids, response) each."""
    digest = hashlib.sha256(f"{LOSSES} {dtype} {device} {model_key(model, adapter, whole=True)}".encode())
    for ids, response in examples:
        digest.update(f" {len(ids)} ".encode() + ids.numpy().tobytes() + response.numpy().tobytes())
    return digest.hexdigest()


def kept_losses(cache: Path | None, key: str, compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """compute()'s losses, and the seconds that they took; in a `cache`, a folder, what the first run has kept holds."""
    path = cache / f"{key}.safetensors" if cache and first_rank() else None

    def held():
        head, tensors = read_state(path) if path and path.exists() else ({}, {})
        return gather((tensors["nll"], float(head["seconds"])) if tensors else None)[0]

    try:
        if path:
            cache.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        if found := held():
            return found
        start = time.perf_counter()
        nll, seconds = compute(), time.perf_counter() - start
        if path:
            write_state(path, {"nll": nll.contiguous()}, {"seconds": f"{seconds:.3f}"}, others_write=True)
    except OSError as reason:
        raise UserError(f"--cache {cache} cannot be used: {reason}") from None
    return held() or (nll, seconds)


SAME = ("model", "adapter", "dtype", "template", "data", "limit")  # who answers what, in which form
PARTS = ("results", "keys", "timing")  # of a record, each by task


class Report:
    """An evaluation's records in one file, one for each SAME; several processes may add to it at once."""

    def __init__(self, path: Path | None):
        self.path = path
        if path:
            check_writable(path)  # before the work, not after it
        self.records()

    def records(self) -> dict[str, dict]:
        """What the file holds by now, each record under a digest of its SAME; UserError for another file."""
        held = read_json(self.path) if self.path and self.path.exists() else {"runs": []}
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
            write_json(self.path, record if len(records) == 1 else {"runs": records})
        finally:
            os.close(lock)
