"""
A description of the machine, printed above every table.
"""

import os
import platform

import torch

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # that matrix products use


def describe_machine(device: str) -> str:
    """The device, threads, PyTorch version and system in one line."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    threads = torch.get_num_threads()
    return f"{device}: {name}, {threads} threads, PyTorch {torch.__version__}, {platform.system()}"


def cpu_name() -> str:
    """The processor's name; on Linux also its family, model and vector instructions."""
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as lines:
        pairs = (line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in pairs}
    name = fields.get("model name", platform.machine())
    flags = " ".join(flag for flag in CPU_FLAGS if flag in fields.get("flags", ""))
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')}; {flags})"
