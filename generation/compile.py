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
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from generation.inference_model import convert_weights
from generation.sampling import SamplingTensors
from generation.steps import MAX_LOOP_TOKENS, StepInputs, StepOutput, decode_loop, decode_step
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
    def max_tokens(self) -> int:
        """The tokens that a call may generate. PyTorch cannot compile the loop with packed weights
        or several rows, where a call takes a small part of the time anyway."""
        can_loop = self.rows == self.length == 1 and self.dtype in ("int8", "draft")
        return MAX_LOOP_TOKENS if can_loop else 1

    @property
    def path(self) -> Path:
        """The file of the compiled package."""
        digest = hashlib.sha256(repr((self, torch.__version__, cpu_features())).encode())
        for path in SOURCES:
            digest.update(path.read_bytes())
        return cache_folder() / f"{digest.hexdigest()[:32]}.pt2"


def cache_folder() -> Path:
    """The folder of the compiled packages."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: ignore it
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):  # there is no home directory
        base = tempfile.gettempdir()
    return Path(base) / "cria"


def cpu_features() -> str:
    """The instruction sets of the processor, where Linux names them."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line for line in file if line.startswith(("flags", "Features"))), "")
    return torch.backends.cpu.get_cpu_capability()


class StepModule(nn.Module):
    """decode_step with tensors as its only arguments, as torch.export requires."""

    def __init__(self, model: Transformer, max_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.max_tokens = max_tokens

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
        if self.max_tokens == 1:
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
    """A compiled step with the weights of a model. Raises RuntimeError if it cannot be loaded.

    If a call fails, on_failure is called with the reason, and the step runs uncompiled."""

    def __init__(
        self, spec: StepSpec, model: Transformer, on_failure: Callable[[str], None]
    ) -> None:
        self.on_failure = on_failure
        device = model.tok_embeddings.weight.device
        self.max_tokens = spec.max_tokens
        # What torch._inductor.aoti_load_package uses; importing that takes two seconds.
        index = -1 if device.index is None else device.index
        self.loader = torch._C._aoti.AOTIModelPackageLoader(str(spec.path), "model", True, 1, index)
        constants = StepModule(model, spec.max_tokens).constants()
        self.constants = {name: constants[name] for name in self.loader.get_constant_fqns()}
        self.loader.load_constants(self.constants, False, True, True)  # they stay the model's

    def __call__(
        self, model: Transformer, cache: KVCache, inputs: StepInputs, num_tokens: int = 1
    ) -> StepOutput:
        """As decode_step or decode_loop. The shapes must be those of the StepSpec."""
        device = inputs.tokens.device
        step = [
            *inputs[:3],  # tokens, start_pos, positions
            torch.tensor(num_tokens, device=device),
            torch.empty(inputs.kv_len + num_tokens - 1, 0, device=device),
        ]
        try:
            outputs = self.loader.run([*step, *cache.keys, *cache.values, *inputs.sampling])
        except RuntimeError as error:  # the same cache positions are written again
            self.on_failure(str(error))
            return decode_step(model, cache, inputs)
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
        spec = self._spec(*key)
        self.steps[key] = None
        is_compiled = os.path.exists(spec.path)
        if worker is not None:
            del self.workers[key]
            worker.close()
            if not is_compiled:
                self._fail(worker.error)
        if is_compiled:
            try:
                self.steps[key] = CompiledStep(spec, self.model, self._fail)
            except (RuntimeError, KeyError) as error:
                with contextlib.suppress(OSError):
                    spec.path.unlink()  # it is damaged
                self._fail(str(error))
        return self.steps[key]

    def start(self, rows: int, length: int) -> None:
        """Start the compilation in another process, if the step is neither compiled nor failed."""
        key = (rows, length)
        if self.find(rows, length) is None and key not in self.workers and not self.failures:
            try:
                self.workers[key] = Worker(self._spec(rows, length))
            except OSError as error:
                self._fail(str(error))

    def wait(self) -> None:
        """Wait for all compilations."""
        for rows, length in list(self.workers):
            self.workers[rows, length].wait()
            self.find(rows, length)

    def _spec(self, rows: int, length: int) -> StepSpec:
        return dataclasses.replace(self.spec, rows=rows, length=length)

    def _fail(self, reason: str) -> None:
        """Continue uncompiled; the first failure is printed."""
        self.steps = dict.fromkeys(self.steps)
        if not self.failures:
            print(f"cannot compile here ({reason}); continuing uncompiled", file=sys.stderr)
        self.failures.append(reason)


class Worker:
    """A process that compiles one step. It ends with this process.

    Raises OSError if the cache folder cannot be written."""

    def __init__(self, spec: StepSpec) -> None:
        spec.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = tempfile.TemporaryDirectory(dir=spec.path.parent)
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        arguments = [json.dumps(dataclasses.asdict(spec)), self.folder.name, str(spec.path)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "generation.compile", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,  # it ends when this process ends, see end_with_parent
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,  # Ctrl-C is not for the compiler; close reaches its children
        )
        atexit.register(self.close)
        self.error = ""  # the exception that ended the process

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> None:
        self.process.wait()

    def close(self) -> None:
        """End the process and the compilers that it runs, and remove its files."""
        atexit.unregister(self.close)
        if self.is_running():
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        self.log.seek(0)
        lines = self.log.read().splitlines()
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        status = f"the compiler ended with status {self.process.returncode}"
        self.error = errors[-1][:200] if errors else status
        self.log.close()
        self.folder.cleanup()


def compile_step(spec: StepSpec, folder: str) -> str:
    """Compile a step; returns the path of the package, which is in the folder."""
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
            StepModule(model, spec.max_tokens),
            (step, (cache.keys, cache.values), tuple(sampling)),
            dynamic_shapes=dynamic_shapes,
        )
        return torch._inductor.aoti_compile_and_package(
            program,
            package_path=os.path.join(folder, "step.pt2"),
            inductor_configs=INDUCTOR_OPTIONS,
        )


def end_with_parent() -> None:
    """End this process and its compilers when standard input is closed."""
    sys.stdin.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> None:
    """Compile a step. Arguments: its StepSpec in JSON, a folder for temporary files, and the path
    of the package."""
    options, folder, path = sys.argv[1:]
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.nice(10)  # decoding goes on meanwhile
    fields = json.loads(options)
    if fields["args"]["rope_scaling"]:
        fields["args"]["rope_scaling"] = RopeScaling(**fields["args"]["rope_scaling"])
    spec = StepSpec(**fields | {"args": ModelArgs(**fields["args"])})
    os.replace(compile_step(spec, folder), path)


if __name__ == "__main__":
    main()
