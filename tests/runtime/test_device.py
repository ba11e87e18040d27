import platform
import subprocess
import sys

import pytest
import torch

from runtime.device import autocast, peak_flops, pick_device, pick_dtype
from tests.processes import ROOT


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=2, mps=False, ...) pretends to be one with these devices."""

    def pretend(cuda=0, mps=False, capability=(8, 0), cpu_capabilities=None, name=""):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: cpu_capabilities or {}, raising=False
        )

    return pretend


@pytest.mark.parametrize(
    "devices, expected",
    [
        ({}, "cpu"),
        (dict(mps=True), "mps"),
        (dict(cuda=1), "cuda"),
        (dict(cuda=1, mps=True), "cuda"),
    ],
    ids=str,
)
def test_auto_takes_cuda_then_mps_then_the_cpu(devices, expected, machine):
    machine(**devices)
    assert pick_device("auto") == expected


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1", "mps"])
def test_an_available_device_is_taken_by_name(name, machine):
    machine(cuda=2, mps=True)
    assert pick_device(name) == name


@pytest.mark.parametrize(
    "name", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "CUDA", "tpu:0", "mps:x", "auto:1"]
)
def test_an_unknown_device_is_refused_with_those_that_are_known(name, machine):
    machine(cuda=2, mps=True)
    with pytest.raises(
        ValueError, match=f"--device={name}: must be auto, cpu, cuda, cuda:N or mps"
    ):
        pick_device(name)


@pytest.mark.parametrize(
    "name, devices",
    [("cuda", {}), ("cuda:0", {}), ("cuda:2", dict(cuda=2)), ("mps", dict(cuda=1))],
    ids=str,
)
def test_a_missing_device_is_refused_with_advice(name, devices, machine):
    machine(**devices)
    with pytest.raises(
        ValueError, match=f"--device={name}: this machine has no such device, try --device=auto"
    ):
        pick_device(name)


@pytest.mark.parametrize(
    "device, machine_is, expected",
    [
        ("cpu", {}, "float32"),
        (
            "cpu",
            dict(cpu_capabilities={"avx512_bf16": False, "amx_bf16": False, "avx2": True}),
            "float32",
        ),
        ("cpu", dict(cpu_capabilities={"avx512_bf16": True}), "bfloat16"),
        ("cpu", dict(cpu_capabilities={"amx_bf16": True}), "bfloat16"),
        ("cuda", dict(cuda=1, capability=(9, 0)), "bfloat16"),
        ("cuda:0", dict(cuda=1, capability=(8, 0)), "bfloat16"),
        ("cuda", dict(cuda=1, capability=(7, 5)), "float32"),
        ("mps", dict(mps=True), "float32"),
    ],
    ids=str,
)
def test_auto_is_bfloat16_on_hardware_that_is_fast_at_it(device, machine_is, expected, machine):
    machine(**machine_is)
    assert pick_dtype("auto", device) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken(name):
    assert pick_dtype(name, "cpu") == name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrix_products_run_in_the_dtype(dtype):
    with autocast("cpu", dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
    ],
)
def test_the_peak_is_that_of_the_device(name, peak, machine):
    """nanoGPT PR #464: the MFU was always that of an A100."""
    machine(cuda=1, name=name)
    assert peak_flops("cuda") == peak


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA RTX A3000 Laptop GPU",
        "NVIDIA RTX A4000",
        "NVIDIA T400 4GB",
        "NVIDIA GeForce GTX 1080 Ti",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_an_unknown_device_has_no_peak(name, machine):
    machine(cuda=1, name=name)
    assert peak_flops("cuda") is None


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_only_cuda_devices_have_a_peak(device):
    assert peak_flops(device) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc to keep memory")
@pytest.mark.parametrize("keep", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_freed_memory_is_not_returned_to_the_kernel(keep):
    """Each page that the kernel hands out anew is a page fault."""
    code = f"""
import resource, torch
from runtime.device import disable_malloc_trim
if {keep}:
    disable_malloc_trim()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).add_(1)  # 64 MB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(20)))  # a block that is freed fits the next one sooner or later
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert (int(result.stdout) < 100) == keep
