"""
Compiled decode steps (AOTInductor), made by another process while decoding goes on uncompiled.

A package has the code of a step for one architecture and number of rows, and no weights. It is kept
in a cache folder, so that later runs start with it. All options are inputs of the step; it is never
compiled again for another value. If compilation fails, decoding stays uncompiled.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from generation.inference_model import convert_weights
from generation.sampling import SamplingTensors
from generation.steps import StepInputs, StepOutput, decode_loop, decode_step
from model import ModelArgs, Transformer
from ops.kv_cache import KVCache
from ops.rope import RopeScaling

ROOT = Path(__file__).resolve().parent.parent
# The files that a compiled step is made from; a change of one makes new packages.
SOURCES = [
    ROOT / "model.py",
    *sorted((ROOT / "ops").glob("*.py")),
    ROOT / "generation" / "compile.py",
    ROOT / "generation" / "inference_model.py",
    ROOT / "generation" / "sampling.py",
    ROOT / "generation" / "steps.py",
]
INDUCTOR_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
}


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """All that the code of a compiled step depends on."""

    args: ModelArgs
    dtype: str  # of the matrices, see convert_weights
    packed_rows: int  # see convert_weights
    cache_dtype: str
    rows: int  # B, see StepInputs
    length: int  # T
    device: str
    threads: int

    @property
    def path(self) -> Path:
        """The file of the compiled package."""
        digest = hashlib.sha256(repr((self, torch.__version__, cpu_features())).encode())
        for path in SOURCES:
            digest.update(path.read_bytes())
        return cache_folder() / f"{digest.hexdigest()[:32]}.pt2"


def cache_folder() -> Path:
    """The folder of the compiled packages."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "cria"


def cpu_features() -> str:
    """The instruction sets of the processor, where Linux names them."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line for line in file if line.startswith(("flags", "Features"))), "")
    return torch.backends.cpu.get_cpu_capability()


class StepModule(nn.Module):
    """decode_step with tensors as its only arguments, as torch.export requires."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        step: tuple[Tensor, ...],
        cache: tuple[list[Tensor], ...],
        sampling: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """Map the tensors of StepInputs and KVCache to those of StepOutput.

        step: tokens, start_pos, positions, the number of tokens to generate, and a tensor
        (kv_len, 0): its size, which may vary without another compilation, is kv_len."""
        tokens, start_pos, positions, num_tokens, kv_len_carrier = step
        kv_len = kv_len_carrier.shape[0]
        inputs = StepInputs(tokens, start_pos, positions, kv_len, SamplingTensors(*sampling))
        if tokens.shape[1] > 1:
            return tuple(decode_step(self.model, KVCache(*cache), inputs))
        return tuple(decode_loop(self.model, KVCache(*cache), inputs, num_tokens))

    def constants(self) -> dict[str, Tensor]:
        """The weights and buffers by name."""
        named = [
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(remove_duplicate=False),
        ]
        return {name: tensor.detach() for name, tensor in named}


class CompiledStep:
    """A compiled decode_step with the weights of a model. Raises RuntimeError if it cannot load."""

    def __init__(self, path: Path, model: Transformer, device: torch.device) -> None:
        # What torch._inductor.aoti_load_package uses; importing that takes two seconds.
        index = -1 if device.index is None else device.index
        self.loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)
        constants = StepModule(model).constants()
        self.constants = {name: constants[name] for name in self.loader.get_constant_fqns()}
        self.loader.load_constants(self.constants, False, True, True)  # they stay the model's

    def __call__(
        self, model: Transformer, cache: KVCache, inputs: StepInputs, num_tokens: int = 1
    ) -> StepOutput:
        """As decode_step or, if T is 1, decode_loop. The shapes must be those of the StepSpec."""
        device = inputs.tokens.device
        step = [
            *inputs[:3],  # tokens, start_pos, positions
            torch.tensor(num_tokens, device=device),
            torch.empty(inputs.kv_len + num_tokens - 1, 0, device=device),
        ]
        outputs = self.loader.run([*step, *cache.keys, *cache.values, *inputs.sampling])
        return StepOutput(*outputs)


class StepCompiler:
    """The compiled steps of a model: finds them in the cache folder, or starts their compilation.

    Args:
        model: from convert_weights.
        spec: of the steps; rows and length are replaced.
        other: another compiler; if one of the two fails, neither starts another compilation, and
            only the first failure is printed.
    """

    def __init__(
        self, model: Transformer, spec: StepSpec, other: "StepCompiler | None" = None
    ) -> None:
        self.model = model
        self.spec = spec
        self.steps: dict[tuple[int, int], CompiledStep | None] = {}  # None: it failed
        self.workers: dict[tuple[int, int], Worker] = {}
        self.failures: list[str] = other.failures if other else []  # reasons

    def find(self, rows: int, length: int) -> CompiledStep | None:
        """The compiled step for these rows and this number of tokens, if there is one yet."""
        key = (rows, length)
        worker = self.workers.get(key)
        if worker is None and key in self.steps:
            return self.steps[key]
        if worker is not None and worker.is_running():
            return None
        path = self._spec(*key).path
        if worker is not None:
            del self.workers[key]
            if not path.exists():
                self._fail(key, worker.error())
                return None
        self.steps[key] = None
        if path.exists():
            try:
                device = self.model.tok_embeddings.weight.device
                self.steps[key] = CompiledStep(path, self.model, device)
            except (RuntimeError, KeyError) as error:
                path.unlink(missing_ok=True)  # it is damaged
                self._fail(key, str(error))
        return self.steps[key]

    def start(self, rows: int, length: int) -> None:
        """Start the compilation in another process, if the step is neither compiled nor failed."""
        key = (rows, length)
        if self.find(rows, length) is None and key not in self.workers and not self.failures:
            try:
                self.workers[key] = Worker(self._spec(rows, length))
            except OSError as error:
                self._fail(key, str(error))

    def wait(self) -> None:
        """Wait for all compilations."""
        for rows, length in list(self.workers):
            self.workers[rows, length].wait()
            self.find(rows, length)

    def _spec(self, rows: int, length: int) -> StepSpec:
        return dataclasses.replace(self.spec, rows=rows, length=length)

    def _fail(self, key: tuple[int, int], reason: str) -> None:
        self.steps[key] = None
        if not self.failures:
            print(f"cannot compile here ({reason}); continuing uncompiled", file=sys.stderr)
        self.failures.append(reason)


class Worker:
    """A process that compiles one step. It ends with this process."""

    def __init__(self, spec: StepSpec) -> None:
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "generation.compile", json.dumps(dataclasses.asdict(spec))],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,  # Ctrl-C is not for the compiler; kill reaches its children
        )
        atexit.register(self.kill)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> None:
        self.process.wait()

    def kill(self) -> None:
        """End the process and the compilers that it runs."""
        if self.is_running():
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def error(self) -> str:
        """The last line that the process printed."""
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1] if lines else f"the compiler ended with status {self.process.returncode}"


def compile_step(spec: StepSpec) -> None:
    """Compile a step and put the package into the cache folder."""
    import torch._inductor

    device = torch.device(spec.device)
    torch.set_num_threads(spec.threads)
    source = Transformer.uninitialized(spec.args).eval().to(device)
    model = convert_weights(source, spec.dtype, spec.packed_rows)
    cache_length = min(spec.args.max_seq_len, 2048) + 1
    cache = model.new_kv_cache(spec.rows, cache_length, getattr(torch, spec.cache_dtype))
    num_tokens = spec.rows * spec.length
    step = (
        torch.zeros(spec.rows, spec.length, dtype=torch.int64, device=device),
        torch.zeros(spec.rows, dtype=torch.int64, device=device),
        torch.zeros(num_tokens, dtype=torch.int64, device=device),
        torch.ones((), dtype=torch.int64, device=device),
        torch.empty(cache_length - 1, 0, device=device),
    )
    sampling = SamplingTensors.new(num_tokens, spec.args.vocab_size, device)
    layers = range(spec.args.n_layers)
    dynamic_cache = [{2: torch.export.Dim.DYNAMIC} for _ in layers]
    dynamic_shapes = (
        (None, None, None, None, {0: torch.export.Dim.DYNAMIC}),
        (dynamic_cache, dynamic_cache),
        (None,) * len(sampling),
    )
    with torch.no_grad():
        program = torch.export.export(
            StepModule(model),
            (step, (cache.keys, cache.values), tuple(sampling)),
            dynamic_shapes=dynamic_shapes,
        )
        spec.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=spec.path.parent) as folder:
            package = torch._inductor.aoti_compile_and_package(
                program,
                package_path=os.path.join(folder, "step.pt2"),
                inductor_configs=INDUCTOR_OPTIONS,
            )
            os.replace(package, spec.path)


def main() -> None:
    """Compile the step whose StepSpec is the first argument, in JSON."""
    os.nice(10)  # decoding goes on meanwhile
    options = json.loads(sys.argv[1])
    if options["args"]["rope_scaling"]:
        options["args"]["rope_scaling"] = RopeScaling(**options["args"]["rope_scaling"])
    compile_step(StepSpec(**options | {"args": ModelArgs(**options["args"])}))


if __name__ == "__main__":
    main()
