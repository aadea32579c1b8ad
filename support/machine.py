"""The machine: device, cores, memory, and what else the numbers of a run depend on."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import resource
from pathlib import Path

import torch

from support.files import UserError

COMPILER = "inductor"
PACKAGES = ("torch", "safetensors", "tokenizers", "huggingface-hub", "numpy", "pyarrow")


def find_device(name: str) -> torch.device:
    """torch's device of this name; auto: a GPU if there is one, else the CPU. UserError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        number = torch.zeros(1, device=name)
        number.item()  # which the device meta does not have
    except (RuntimeError, AssertionError) as reason:
        raise UserError(f"--device {name} cannot be used: {str(reason).splitlines()[0]}") from None
    return number.device


def usual_dtype(device: torch.device) -> str:
    """bfloat16, but float32 on a CPU that multiplies it by a plain loop: a step then takes 20 times as long."""
    onednn, capability = torch.backends.mkldnn.is_available(), torch.backends.cpu.get_cpu_capability()
    quick = onednn and capability.startswith(("AVX512", "SVE"))  # SVE: Arm's server cores
    return "bfloat16" if device.type != "cpu" or quick else "float32"


def versions() -> dict[str, str]:
    """What the numbers of a run depend on: Python, the packages, the machine."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    return found | {package: importlib.metadata.version(package) for package in PACKAGES}


def reuse_memory():
    """Let glibc keep the memory of freed tensors: the kernel clears each new page. Elsewhere it does nothing."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages from 2 MiB on; torch reads it at its first tensor
    # torch and oneDNN each keep kernels for the last 1,024 shapes, hundreds of MiB; a layer has a few dozen shapes
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes: what lies free at the end of the heap stays there
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes: the largest that glibc takes


def compile_layers(model: torch.nn.Module):
    """torch.compile of each decoder layer, for any length. The first pass of each kind takes long."""
    torch._dynamo.config.recompile_limit = 64  # training and the history pass have their own
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # the probe sees what enters o_proj
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=COMPILER)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far, MiB: the GPU's, or on a CPU the process's resident maximum."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if (status := Path("/proc/self/status")).exists():  # Linux, where ru_maxrss starts from the parent's size
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS, in bytes


def compute_exactly(device: torch.device):
    """No TF32: a score is the same on every GPU. Deterministic kernels: one seed gives one adapter."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums of a product: in float32
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # in bfloat16 flash attention, not cuDNN's, which does not repeat
        torch.utils.deterministic.fill_uninitialized_memory = False
