"""
llama.cpp with cria's GGUF files: the xllamacpp wheel, or the benchmark programs of a native build.
"""

import dataclasses
import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import requests

from benchmarks.timing import Turn

BOS_ID = 1  # of Llama 2's vocabulary
GGUF_DTYPES = {"F32": "float32", "Q8_0": "q8_0"}  # of the files, as formats/gguf.py names them
SAME_DTYPE = {"float32": "F32", "int8": "Q8_0"}  # the file to compare a dtype with


def wheel_step(
    path: str, device: str, threads: int, context: int, length: int
) -> Callable[[], int]:
    """A step() that generates length tokens after BOS at temperature 1 and returns their number.

    It runs llama.cpp's server in this process with the GGUF file at path, and asks it over HTTP as
    its users do. Raises ImportError if xllamacpp is not installed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    seeds = itertools.count()
    session = requests.Session()
    session.trust_env = False  # no proxy

    def step() -> int:
        request = {
            "prompt": [BOS_ID],
            "n_predict": length,
            "ignore_eos": True,
            "cache_prompt": False,
            "samplers": ["temperature"],
            "temperature": 1.0,
            "seed": next(seeds),
        }
        response = session.post(f"{server.listening_address}/completion", json=request)
        response.raise_for_status()
        return response.json()["timings"]["predicted_n"]

    return step


@dataclass
class NativeBuild:
    """llama-bench, or llama-batched-bench for several streams: a new process for each turn.

    Both decode random tokens and sample nothing. The rates are those that they report.

    Args:
        llama_bench: path of llama-bench; llama-batched-bench is in the same folder.
        path: of the GGUF file.
        repetitions: how often a turn generates length tokens in each stream.
    """

    name: str
    cases: tuple[str, ...]
    llama_bench: str
    path: str
    threads: int
    streams: int
    length: int
    repetitions: int = 1

    @property
    def command(self) -> list[str]:
        """The command line of a turn, which prints JSON."""
        options = ["-m", self.path, "-t", str(self.threads)]
        if self.streams == 1:
            options += ["-p", "0", "-n", str(self.length), "-r", str(self.repetitions)]
            return [self.llama_bench, *options, "-o", "json"]
        context = str(self.streams * 2 * max(256, self.length))  # in all; a multiple of 256 in each
        lengths = ",".join([str(self.length)] * self.repetitions)
        options += ["-c", context, "-npp", "1", "-ntg", lengths, "-npl", str(self.streams)]
        return [batched_bench(self.llama_bench), *options, "--output-format", "jsonl"]

    def start(self) -> "NativeBuild":
        """Itself: nothing runs between its turns."""
        return self

    def stop(self) -> None:
        """Nothing runs between its turns."""

    def measure_turn(self, seconds: float, case: str = "") -> Turn:
        """Run one turn; the next one will take about so many seconds."""
        process = subprocess.run(self.command, capture_output=True, text=True, errors="replace")
        program = os.path.basename(self.command[0])
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["it printed nothing"]
            raise ValueError(f"{program} ended with status {process.returncode}: {lines[-1]}")
        times = list(generation_seconds(process.stdout))
        if len(times) != self.repetitions:
            raise ValueError(f"{program} printed {len(times)} times instead of {self.repetitions}")
        turn = Turn(self.streams * self.length * len(times), sum(times), peak_memory=0)
        self.repetitions = max(1, round(self.repetitions * seconds / max(turn.seconds, 1e-9)))
        return turn

    def problem(self) -> str:
        """Why it cannot run this model here, after a run of one token; empty if it can."""
        try:
            dataclasses.replace(self, length=1, repetitions=1).measure_turn(0)
        except (OSError, ValueError) as error:
            return str(error)
        return ""


def generation_seconds(output: str) -> Iterator[float]:
    """The times of the repetitions in what llama-bench or llama-batched-bench printed."""
    if output.startswith("["):
        (result,) = json.loads(output)
        yield from (nanoseconds * 1e-9 for nanoseconds in result["samples_ns"])
        return
    for line in output.splitlines():
        if line.startswith("{"):
            yield json.loads(line)["t_tg"]


def batched_bench(llama_bench: str) -> str:
    """The path of llama-batched-bench beside llama-bench."""
    folder, name = os.path.split(llama_bench)
    return os.path.join(folder, name.replace("llama-bench", "llama-batched-bench"))


def native_problems(llama_bench: str, has_several_streams: bool) -> Iterator[str]:
    """Yield the reason why --llama_bench cannot be used, if there is one."""
    if not llama_bench:
        return
    programs = [llama_bench, *([batched_bench(llama_bench)] if has_several_streams else [])]
    for program in programs:
        if not (os.path.isfile(program) and os.access(program, os.X_OK)):
            yield f"--llama_bench={llama_bench}: there is no program {program}"
