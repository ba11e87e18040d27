import copy
import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch

from generation import compile as compile_module
from generation import engine as engine_module
from generation import prepared_model
from generation.compile import StepSpec, cache_folder
from generation.engine import InferenceEngine, generate_tokens
from generation.inference_model import convert_weights
from generation.prepared_model import (
    PreparedModel,
    Step,
    batch_buckets,
    prepare_for_inference,
)
from generation.request import Request
from generation.sampling_params import SamplingParams
from generation.steps import decode_loop, uncompiled_step
from tests import helpers
from tests.helpers import generate_batch, run_requests
from tests.processes import ROOT

V = helpers.GENERATION_MODEL["vocab_size"]
random_model = functools.partial(helpers.random_model, helpers.GENERATION_MODEL, 0.3)

TOLERANCES = [
    ("float32", 1e-4),
    ("bfloat16", 0.2),
    ("float16", 0.03),
    ("int8", 0.3),
    ("draft", 0.3),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cria"


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_converted_logits_are_within_the_precision_of_the_dtype(dtype, tolerance):
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    rows = 1 if dtype == "draft" else 3
    tokens = torch.randint(V, (rows, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)[0]
        logits = convert_weights(model, dtype)(tokens)[0]
    assert dtype == "float32" or not torch.equal(logits, expected)
    assert (logits - expected).abs().mean() < tolerance * expected.std()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Speculative decoding

OPTIONS = [
    dict(temperature=0),
    dict(),
    dict(top_k=10, top_p=0.8, min_new_tokens=20),
    dict(min_p=0.1, repetition_penalty=1.2),
]


def with_draft(model, draft_model=None) -> PreparedModel:
    draft_model = draft_model or convert_weights(model, "draft")
    return PreparedModel(model, draft=PreparedModel(draft_model))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "drafted_by", ["itself in 8 bits", pytest.param("another model", marks=pytest.mark.slow)]
)
def test_speculative_decoding_changes_no_token(drafted_by, options):
    """Past the context, to the end of each text, whether or not the two models agree."""
    model, other = random_model(max_seq_len=64), random_model(max_seq_len=64)
    with torch.no_grad():
        other.layers[1].feed_forward.w2.weight.mul_(-1)
    prepared = with_draft(model, other if drafted_by == "another model" else None)
    for stop_ids in ([], [V - 1, 3, 5]):
        params = SamplingParams(max_new_tokens=100, stop_ids=stop_ids, **options)
        for prompt in ([1], list(range(50)), list(range(60)) * 2):
            engine = InferenceEngine(prepared)
            for _ in range(2):  # the cache has rejected tokens the second time
                request = Request(prompt, params)
                (expected,) = run_requests(model, [Request(prompt, params)], 1)
                list(engine.generate([request]))
                assert request.tokens == expected
                prompt = [*expected, 7, 8]


def test_the_last_of_several_requests_is_drafted(monkeypatch):
    model, prompts = random_model(max_seq_len=64), [[1], [2, 3, 4], [5] * 30]
    counts = count_drafted_tokens(monkeypatch)
    options = dict(stop_ids=[V - 1], max_new_tokens=100)
    drafted = generate_batch(with_draft(model), prompts, 2, **options)
    assert drafted == generate_batch(model, prompts, 1, **options)
    assert counts


def count_drafted_tokens(monkeypatch) -> list[int]:
    """A list that will have the number of tokens of each speculative step."""
    counts = []
    speculative_step = InferenceEngine.speculative_step

    def spy(engine):
        new_tokens = speculative_step(engine)
        counts.append(len(new_tokens))
        return new_tokens

    monkeypatch.setattr(InferenceEngine, "speculative_step", spy)
    return counts


def test_draft_tokens_are_mostly_accepted(monkeypatch):
    counts, model = count_drafted_tokens(monkeypatch), random_model(max_seq_len=64)
    prepared = prepare_for_inference(model)
    drafted = generate_tokens(prepared, [1], max_new_tokens=200)
    assert drafted == generate_tokens(model, [1], max_new_tokens=200)
    assert sum(counts) / len(counts) > 4  # of 8


@pytest.mark.parametrize(
    "dtype, batch_size, has_draft",
    [("float32", 1, True), ("float32", 2, False), ("int8", 1, False)],
)
def test_a_single_sequence_in_floating_point_is_drafted(dtype, batch_size, has_draft):
    prepared = prepare_for_inference(random_model(), dtype, batch_size)
    assert (prepared.draft is not None) == has_draft


# Compiled steps, without a compilation


class FakeWorker:
    """A Worker that does nothing until end is called."""

    error = "no compiler"

    def __init__(self, spec):
        self.spec = spec
        self.has_ended = False
        FakeWorker.instances.append(self)

    def is_running(self):
        return not self.has_ended

    def wait(self):
        self.has_ended = True

    def close(self):
        pass


class FakeStep:
    """A CompiledStep that runs uncompiled; `calls` has the number of rows of each call."""

    max_tokens = 8

    def __init__(self, spec, model, on_failure):
        self.calls = []
        self.spec = spec

    def __call__(self, model, cache, inputs, num_tokens):
        self.calls.append(len(inputs.tokens))
        if inputs.tokens.shape[1] > 1:
            return uncompiled_step(model, cache, inputs)
        inputs = inputs._replace(kv_len=inputs.kv_len + num_tokens - 1)
        return decode_loop(model, cache, inputs, torch.tensor(num_tokens))


@pytest.fixture
def workers(monkeypatch):
    """The workers that were started; none of them compiles."""
    FakeWorker.instances = []
    monkeypatch.setattr(compile_module, "Worker", FakeWorker)
    monkeypatch.setattr(compile_module, "CompiledStep", FakeStep)
    return FakeWorker.instances


def make_package(spec) -> None:
    spec.path.parent.mkdir(parents=True, exist_ok=True)
    spec.path.write_bytes(b"")


@pytest.fixture
def spec() -> StepSpec:
    args = random_model().args
    return StepSpec(args, "float32", 3, "float32", rows=3, length=1, device="cpu", threads=1)


def test_compile_false_starts_nothing(workers):
    generate_tokens(prepare_for_inference(random_model()), [1], max_new_tokens=20)
    assert not workers


def test_compile_true_starts_the_steps_of_target_and_draft(workers):
    prepare_for_inference(random_model(), compile=True)
    assert [(w.spec.dtype, w.spec.rows, w.spec.length) for w in workers] == [
        ("float32", 1, 8),
        ("draft", 1, 1),
    ]


def test_tokens_are_generated_uncompiled_until_a_step_is_compiled(workers):
    model, prompts = random_model(), [[1], [2, 3], [4]]
    prepared = prepare_for_inference(model, "float32", 3, compile=True)
    (worker,) = workers
    requests = [Request(prompt, SamplingParams(40), index) for index, prompt in enumerate(prompts)]
    engine = InferenceEngine(prepared, 3)
    for count, _ in enumerate(engine.generate(requests)):
        if count == 30:
            make_package(worker.spec)
            worker.has_ended = True
    assert [r.tokens for r in requests] == generate_batch(model, prompts, 1, max_new_tokens=40)
    step = prepared.compiler.find(3, 1)
    assert set(step.calls) == {3} and 2 < len(step.calls) < 35
    assert len(workers) == 1


def test_a_core_is_left_to_the_compiler_while_it_runs(workers, monkeypatch):
    """With as many threads as cores, decoding took ten times as long meanwhile."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    prepared = prepare_for_inference(random_model(), "int8", compile=True)
    generate_tokens(prepared, [1], max_new_tokens=3)
    assert counts == [3, 4] * (len(counts) // 2) and counts
    make_package(workers[0].spec)
    workers[0].has_ended = True
    prepared.wait_for_compilation()
    counts.clear()
    generate_tokens(prepared, [1], max_new_tokens=3)
    assert not counts


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_fewer_rows_use_a_step_of_more_rows(num_rows, workers):
    prepared = prepare_for_inference(random_model(), "float32", 5, compile=None)
    assert prepared.find_step(num_rows, 5) == Step(uncompiled_step, num_rows, 1)
    bucket = 5 if num_rows > 1 else 1
    prepared = prepare_for_inference(random_model(), "float32", 5, compile=None)
    make_package(dataclasses.replace(prepared.compiler.spec, rows=bucket))
    step = prepared.find_step(num_rows, 5)
    assert isinstance(step.run, FakeStep) and step.num_rows == bucket


@pytest.mark.parametrize(
    "batch_size, buckets", [(1, [1]), (3, [1, 3]), (4, [1, 4]), (100, [1, 4, 16, 64, 100])]
)
def test_buckets_end_with_the_batch_size(batch_size, buckets):
    assert batch_buckets(batch_size) == buckets


def test_compile_none_starts_after_many_seconds_of_uncompiled_steps(workers, monkeypatch):
    """Those of all jobs count."""
    prepared = prepare_for_inference(random_model(), "int8", compile=None)
    engine = InferenceEngine(prepared)
    list(engine.generate([Request([1], SamplingParams(50))]))
    assert not workers and 0 < engine.uncompiled_seconds < engine_module.COMPILE_AFTER
    monkeypatch.setattr(engine_module, "COMPILE_AFTER", engine.uncompiled_seconds)
    list(engine.generate([Request([1], SamplingParams(50))]))
    assert [(worker.spec.dtype, worker.spec.rows) for worker in workers] == [("int8", 1)]
    workers[0].has_ended = True
    make_package(workers[0].spec)
    seconds = engine.uncompiled_seconds
    list(engine.generate([Request([1], SamplingParams(50))]))
    assert engine.uncompiled_seconds == seconds and len(workers) == 1
    assert prepared.compiler.find(1, 1).calls


def test_a_second_engine_uses_the_steps_of_the_cache_folder(workers):
    model = random_model()
    first = prepare_for_inference(model, "int8", compile=True)
    make_package(workers[0].spec)
    first.wait_for_compilation()
    second = prepare_for_inference(model, "int8", compile=True)
    generate_tokens(second, [1], max_new_tokens=10)
    assert len(workers) == 1 and len(second.compiler.find(1, 1).calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        dict(dtype="int8"),
        dict(packed_rows=4),
        dict(cache_dtype="bfloat16"),
        dict(rows=4),
        dict(length=2),
        dict(device="cuda"),
        dict(threads=2),
        dict(args=random_model(dim=64).args),
        dict(args=random_model(rope_theta=5e5).args),
    ],
    ids=str,
)
def test_packages_of_different_steps_have_different_files(change, spec, cache):
    other = dataclasses.replace(spec, **change)
    assert spec.path.parent == other.path.parent == cache == cache_folder()
    assert spec.path != other.path
    assert spec.path == dataclasses.replace(spec).path


def test_packages_of_other_sources_have_different_files(spec, tmp_path, monkeypatch):
    path = spec.path
    (tmp_path / "model.py").write_text("")
    monkeypatch.setattr(compile_module, "SOURCES", [tmp_path / "model.py"])
    assert spec.path != path


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_failed_compilation_is_one_line_and_changes_no_token(batch_size, workers, capfd):
    """Of the draft model and the target model too."""
    model, prompts = random_model(), [[1], [2, 3], [4]][:batch_size]
    prepared = prepare_for_inference(model, "float32", batch_size, compile=True)
    for worker in workers:
        worker.has_ended = True
    for _ in range(2):
        tokens = generate_batch(prepared, prompts, batch_size, max_new_tokens=30)
        assert tokens == generate_batch(model, prompts, 1, max_new_tokens=30)
    captured = capfd.readouterr()
    assert captured.err == "cannot compile here (no compiler); continuing uncompiled\n"
    assert captured.out == ""
    assert len(workers) == (2 if batch_size == 1 else 1)  # it is not tried again


def test_a_damaged_package_is_removed_and_reported_in_one_line(spec, capfd):
    model = random_model()
    prepared = prepare_for_inference(model, "int8", compile=None)
    spec = prepared.compiler.spec
    spec.path.parent.mkdir(parents=True)
    spec.path.write_bytes(b"PK damaged")
    expected = generate_tokens(prepare_for_inference(model, "int8"), [1], max_new_tokens=20)
    assert generate_tokens(prepared, [1], max_new_tokens=20) == expected
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("cannot compile here (")
    assert errors[0].endswith("; continuing uncompiled")
    assert not spec.path.exists()


def test_other_devices_continue_uncompiled_with_one_line(capsys, monkeypatch):
    model = random_model()
    monkeypatch.setattr(prepared_model, "convert_weights", lambda model, dtype, rows: model)
    prepared = prepare_for_inference(model.to("meta"), "float32", 2, compile=True)
    assert prepared.compiler is None
    assert capsys.readouterr().err == "cannot compile on meta; continuing uncompiled\n"


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["compiler", "folder"])
def test_without_a_compiler_or_folder_generation_goes_on(problem, cache, monkeypatch, capfd):
    if problem == "compiler":
        monkeypatch.setenv("CXX", "/nonexistent/g++")
    else:
        cache.write_text("a file")
    model = random_model()
    prepared = prepare_for_inference(model, "float32", 2, compile=True)
    options = dict(max_new_tokens=30)
    expected = generate_batch(model, [[1], [2]], 1, **options)
    assert generate_batch(prepared, [[1], [2]], 2, **options) == expected
    prepared.wait_for_compilation()
    assert generate_batch(prepared, [[1], [2]], 2, **options) == expected
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("cannot compile here (")
    if problem == "compiler":
        assert not list(cache.glob("*"))


START_COMPILING = """
from tests.helpers import GENERATION_MODEL, random_model
from generation.prepared_model import prepare_for_inference
prepared = prepare_for_inference(random_model(GENERATION_MODEL), "int8", compile=True)
print(prepared.compiler.workers[1, 1].process.pid)
"""


@pytest.mark.slow
def test_a_worker_ends_with_the_process_that_started_it(cache):
    result = subprocess.run(
        [sys.executable, "-c", START_COMPILING],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(result.stdout), 0)
    assert result.stderr == "" and not list(cache.rglob("*.pt2"))
