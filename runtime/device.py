"""
Where and how precisely to compute: the device, the number format, its peak speed.
"""

import contextlib
import ctypes
import platform
import re
from collections.abc import Iterator

import torch

# Dense bfloat16 peak in FLOP/s from the makers' data sheets, by a part of the device's name;
# the first that matches counts, so the longer names come first.
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "GH200": 989e12,
    "B200": 2250e12, "B100": 1750e12, "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12,
    "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "T4": 65e12, "V100": 125e12,
    "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 4080": 97.5e12, "RTX 3090": 71e12, "RTX 3080": 59.5e12,
}  # fmt: skip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> str:
    """The device to use: auto is CUDA, then MPS, then the CPU. Raises ValueError, naming the
    flag, for a device that is unknown or not there."""
    if name == "auto":
        return (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    kind, colon, index = name.partition(":")
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in there or (colon and not index.isdigit()):
        raise ValueError(f"--device={name}: must be auto, cpu, cuda, cuda:N or mps")
    if not there[kind] or (kind == "cuda" and index and int(index) >= torch.cuda.device_count()):
        raise ValueError(f"--device={name}: this machine has no such device, try --device=auto")
    return name if kind == "cuda" else kind


def pick_dtype(name: str, device: str) -> str:
    """The number format of the matrix products: auto is bfloat16 where the hardware multiplies
    it fast, else float32."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float32"
    if device == "cpu":
        capabilities = (
            torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        )
        return (
            "bfloat16"
            if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
            else "float32"
        )
    return "float32"


def autocast(device: str, dtype: str):
    """The context for a forward pass: matrix products in dtype, all else as PyTorch sees fit."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.partition(":")[0], dtype=DTYPES[dtype])


def peak_flops(device: str) -> float | None:
    """The device's peak in FLOP/s, or None where we do not know it."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None
    )


def disable_malloc_trim():
    """Have the C library keep what this process frees. A training step frees and takes the same large
    tensors again; by default glibc hands each back to the kernel, which clears every page anew."""
    if platform.libc_ver()[0] == "glibc":
        set_option = ctypes.CDLL(None).mallopt
        set_option(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        set_option(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


@contextlib.contextmanager
def translate_oom() -> Iterator[None]:
    """Raise ValueError, with advice, in the place of an out-of-memory error."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            advice = "halve --batch_size and double --gradient_accumulation_steps"
            more = "or give --activation_checkpointing=True"
            raise ValueError(f"out of memory: {advice}, {more}") from error
        raise
