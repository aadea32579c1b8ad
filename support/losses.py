"""Per-token losses of frozen models, kept on disk under a digest of all that they depend on."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from support.checkpoint import TOKENIZER_FILES, find_tensors
from support.files import UserError
from support.ranks import first_rank, gather
from support.runs import read_state, write_state

LOSSES = 1  # how they are computed; a change to that makes it 2, and what an older version kept is not found again


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
    """A digest of all files that a model's answers depend on, in its folder and, perhaps, in that of an adapter.

    They are weights, configurations, tokenizer and templates; of the weights it reads no more than size and time,
    unless they are to count by their content too (`whole`).
    """
    weights = {stored.path for stored in find_tensors(model).values()}
    patterns = ("config.json", "generation_config.json", "chat_template*", *TOKENIZER_FILES)
    files = {path for pattern in patterns for path in model.glob(pattern) if path.is_file()}
    if adapter:
        weights.add(adapter / "adapter_model.safetensors")
        files.add(adapter / "adapter_config.json")
    return files_key(files | weights) if whole else files_key(files, weights)


def losses_key(
    model: Path, adapter: Path | None, examples: Iterable[tuple[Tensor, Tensor]], dtype: str, device: str
) -> str:
    """A digest of all that per-token losses depend on, in full: nothing that has changed hides behind an old name.

    That is `model_key`, every token of `examples` and whether it is supervised, hence template, rows and length limit,
    and dtype and kind of device.
    """
    digest = hashlib.sha256(f"{LOSSES} {dtype} {device} {model_key(model, adapter, whole=True)}".encode())
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
        head, tensors = read_state(path) if path and first_rank() and path.exists() else ({}, {})
        return gather((tensors["nll"], float(head["seconds"])) if tensors else None)[0]

    try:
        if cache and first_rank():
            cache.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        if found := held():
            return found
        start = time.perf_counter()
        nll, seconds = compute(), time.perf_counter() - start
        if path and first_rank():
            write_state(path, {"nll": nll.contiguous()}, {"seconds": f"{seconds:.3f}"}, others_write=True)
    except OSError as reason:
        raise UserError(f"--cache {cache} cannot be used: {reason}") from None
    return held() or (nll, seconds)
