"""
The device to compute on, the dtype of its matrix products, and its peak speed.
"""

import contextlib
import ctypes
import platform
import re
from collections.abc import Iterator

import torch

# Dense bfloat16 peak in FLOP/s from the manufacturers' data sheets, by a word of the device's name.
# The first match counts, so that longer names come first.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 4080": 97.5e12,
    "RTX 3090": 71e12,
    "RTX 3080": 59.5e12,
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> str:
    """The device for --device=name; auto is CUDA, else MPS, else the CPU. Raises ValueError for a
    device that is unknown or not available."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, is_available in available.items() if is_available)
    device_type, colon, index = name.partition(":")
    if device_type not in available or (colon and not index.isdigit()):
        raise ValueError(f"--device={name}: must be auto, cpu, cuda, cuda:N or mps")
    has_index = device_type != "cuda" or not index or int(index) < torch.cuda.device_count()
    if not available[device_type] or not has_index:
        raise ValueError(f"--device={name}: this machine has no such device, try --device=auto")
    return name if device_type == "cuda" else device_type


def pick_dtype(name: str, device: str) -> str:
    """The dtype of matrix products for --dtype=name. auto is bfloat16 if the hardware multiplies it
    fast, else float32."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float32"
    if device == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return "bfloat16"
    return "float32"


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager[object]:
    """A context for forward passes with matrix products in dtype; float32 changes nothing."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.partition(":")[0], dtype=DTYPES[dtype])


def peak_flops(device: str) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or None if it is unknown."""
    if not device.startswith("cuda"):
        return None
    device_name = torch.cuda.get_device_name(device)
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return peak
    return None


def disable_malloc_trim() -> None:
    """Keep freed memory in the process, on glibc. A training step frees and allocates the same
    large tensors again. By default glibc returns them to the kernel, which clears every page."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


@contextlib.contextmanager
def translate_oom() -> Iterator[None]:
    """Replace PyTorch's out-of-memory errors by a ValueError with advice for training."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise ValueError(
                "out of memory: halve --batch_size and double --gradient_accumulation_steps, "
                "or give --activation_checkpointing=True"
            ) from error
        raise
