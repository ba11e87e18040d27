"""
Converting a model needs memory for its largest tensor, whatever the size of the model.

    CRIA_CONVERT_GB=8 python -m pytest tests/formats/test_memory.py -s    for a model of 8 GB
"""

import os
import subprocess
import sys

import pytest
import torch

from formats.lazy_model import LazyModel, LazyTensor
from formats.registry import open_model
from formats.writer import write_model
from model import ModelArgs, parameter_shapes
from tests.processes import ROOT

GIGABYTES = float(os.environ.get("CRIA_CONVERT_GB", 0.3))  # of weights in bfloat16
CONSTANT = 100  # MB for blocks and for the allocator

# Linux counts VmHWM from the start of the program; ru_maxrss would include the parent's memory.
PEAK = "import re, runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]; {}; " + (
    "print('peak', re.search('VmHWM:\\\\s*([0-9]+)', open('/proc/self/status').read())[1])"
)


def peak_of(statement: str, *arguments) -> float:
    """The largest resident memory of a process, in MB."""
    command = [sys.executable, "-c", PEAK.format(statement), str(ROOT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1024


@pytest.fixture(scope="module")
def random_folder(tokenizer, tmp_path_factory):
    """A Hugging Face folder with random weights in bfloat16, and the size of its largest tensor in
    MB."""
    args = ModelArgs(dim=1024, n_heads=16, hidden_dim=16384, n_layers=1, vocab_size=512)
    per_layer = (
        sum(
            2 * torch.Size(shape).numel()
            for name, shape in parameter_shapes(args)
            if "layers" in name
        )
        / 1e9
    )
    args = ModelArgs(**{**vars(args), "n_layers": max(1, round(GIGABYTES / per_layer))})

    def random(shape):
        return LazyTensor(
            shape, torch.bfloat16, lambda: torch.randn(shape, dtype=torch.bfloat16).mul_(0.02)
        )

    tensors = {name: random(shape) for name, shape in parameter_shapes(args)}
    path = str(tmp_path_factory.mktemp("random") / "hf")
    write_model(LazyModel("random", args, tensors, lambda: tokenizer), path, "hf")
    return path, max(2 * torch.Size(shape).numel() for _, shape in parameter_shapes(args)) / 1e6


@pytest.fixture(scope="module")
def baseline() -> float:
    """The memory of a process after the imports, in MB."""
    return peak_of("import export")


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the system does not report peak memory"
)
@pytest.mark.parametrize("target", ["v0", "v2", "meta", "gguf", "q8_0"])
def test_a_conversion_needs_memory_for_its_largest_tensor_only(
    target, baseline, random_folder, tmp_path
):
    path, largest = random_folder
    options = ["--format=gguf", "--dtype=q8_0"] if target == "q8_0" else [f"--format={target}"]
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    peak = peak_of(run, ROOT / "export.py", tmp_path / "first", f"--from={path}", *options)
    back = peak_of(
        run, ROOT / "export.py", tmp_path / "back", f"--from={tmp_path / 'first'}", "--format=hf"
    )
    print(
        f"\n{target}: {peak:.0f} MB, back {back:.0f} MB; "
        f"baseline {baseline:.0f} MB, largest tensor {largest:.0f} MB"
    )
    limit = baseline + 2 * largest + CONSTANT  # v0 and v2 are float32, twice bfloat16
    assert max(peak, back) < limit
    assert open_model(str(tmp_path / "back")).args.n_layers == open_model(path).args.n_layers
