"""Per-token losses of frozen models, kept on disk under a digest of all that they depend on."""

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoint import find_tensors, open_safetensors
from support.files import UserError, write_whole
from support.ranks import first_rank, gather

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
    files = [model / "config.json", *sorted({stored.path for stored in find_tensors(model).values()})]
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
