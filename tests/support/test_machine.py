"""What support/machine.py finds out about a machine, against what the kernel or a stand-in says of it."""

import platform
from pathlib import Path

import pytest
import torch

import evaluate
import train
from support import machine

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="reads an x86 Linux kernel's word")
def test_float32_is_the_default_where_the_kernel_names_no_instruction_for_bfloat16():
    flags = set(next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split())
    usual = "bfloat16" if {"avx512bw", "avx512vl", "avx512dq"} <= flags else "float32"
    assert machine.usual_dtype(torch.device("cpu")) == usual


@pytest.mark.parametrize(("cores", "usual"), [("AVX512", "bfloat16"), ("AVX2", "float32"), ("DEFAULT", "float32")])
def test_a_dtype_that_is_not_given_is_the_one_that_the_device_computes_quickly(monkeypatch, cores, usual):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cores)
    for script in (train, evaluate):
        argv = ["--model", "any", "--device", "cpu"]
        assert script.parse_arguments(argv).dtype == usual
        for dtype in ("bfloat16", "float32"):
            assert script.parse_arguments([*argv, "--dtype", dtype]).dtype == dtype
    assert machine.usual_dtype(torch.device("cuda")) == "bfloat16"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # a build without oneDNN
    assert machine.usual_dtype(torch.device("cpu")) == "float32"
