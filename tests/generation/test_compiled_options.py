"""
Compiled steps with all sampling options: the same tokens as uncompiled, from one compilation.
"""

import functools
import os
import shutil
import warnings
from typing import NamedTuple

import pytest
import torch

from generation import compile as compile_module
from generation import prepared_model
from generation.banned_strings import BannedStrings
from generation.compile import CompiledStep
from generation.engine import InferenceEngine
from generation.prepared_model import PreparedModel, prepare_for_inference
from generation.request import Request
from generation.sampling_params import SamplingParams
from generation.steps import uncompiled_step
from generation.streaming import generate
from model import Transformer
from tests import helpers
from tests.helpers import generate_batch, run_requests

MAX_SEQ_LEN = 64
SHAPE = helpers.GENERATION_MODEL | dict(vocab_size=helpers.VOCAB_SIZE, max_seq_len=MAX_SEQ_LEN)
random_model = functools.partial(helpers.random_model, SHAPE, 0.3)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler here"
    ),
]

BANNED = "banned strings"
OPTIONS = {
    "greedy": dict(temperature=0),
    "temperature": dict(temperature=0.7),
    "top-k": dict(top_k=20),
    "top-p": dict(top_p=0.8),
    "min-p": dict(min_p=0.05),
    "all truncations": dict(temperature=0.9, top_k=60, top_p=0.9, min_p=0.01),
    "repetition penalty": dict(repetition_penalty=1.5),
    BANNED: dict(temperature=0.8),
    "min_new_tokens": dict(stop_ids=range(0, helpers.VOCAB_SIZE, 2), min_new_tokens=20),
}
BANNED_STRINGS = ["e", " t", "an"]
LENGTHS = {"within the context": 40, "past the context": 120}
PROMPTS = [[1], [1, 9, 8], [1, *range(20, 30)], [5, 6], [1, 400, 7, 300]]


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module", autouse=True)
def cache_home(tmp_path_factory):
    """The folder of all packages of this file, which the workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "compiled"))
        yield


class CompiledModel(NamedTuple):
    """A model with what was compiled for it."""

    model: Transformer
    prepared: PreparedModel
    dtype: str
    rows: int

    def expected_tokens(self, requests: list[Request]) -> list[list[int]] | None:
        """What the requests get alone, uncompiled; None without an exact reference."""
        if self.dtype != "float32":
            return None
        alone = [Request(r.tokens[: r.prompt_length], r.params, r.index) for r in requests]
        return [run_requests(self.model, [request], 1)[0] for request in alone]


CASES = [(dtype, rows) for dtype in ("float32", "bfloat16", "int8") for rows in (1, 5)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def compiled(request, model) -> CompiledModel:
    """Compiled once for each dtype and number of rows."""
    dtype, rows = request.param
    prepared = prepare_for_inference(model, dtype, rows, compile=True)
    prepared.wait_for_compilation()
    assert prepared.is_compiled(rows, rows)
    return CompiledModel(model, prepared, dtype, rows)


class StepCounts:
    """How many steps ran compiled and uncompiled."""

    def __init__(self, monkeypatch) -> None:
        self.compiled = 0
        self.uncompiled = 0
        call = CompiledStep.__call__

        def compiled_step(step, model, cache, inputs, num_tokens):
            self.compiled += 1
            return call(step, model, cache, inputs, num_tokens)

        def counted_step(model, cache, inputs, num_tokens):
            self.uncompiled += 1
            return uncompiled_step(model, cache, inputs, num_tokens)

        monkeypatch.setattr(CompiledStep, "__call__", compiled_step)
        monkeypatch.setattr(prepared_model, "uncompiled_step", counted_step)


@pytest.fixture
def steps(monkeypatch, compiled, capfd):
    """StepCounts; no compilation, warning or output may come meanwhile."""

    def no_worker(spec):
        raise AssertionError(f"another compilation: {spec}")

    monkeypatch.setattr(compile_module, "Worker", no_worker)
    capfd.readouterr()
    with warnings.catch_warnings(action="error"):
        yield StepCounts(monkeypatch)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def make_requests(name, rows, max_new_tokens, tokenizer) -> list[Request]:
    """Requests with different options, the first with those of this name."""
    names = list(OPTIONS)
    first = names.index(name)
    requests = []
    for index in range(rows):
        options = dict(OPTIONS[names[(first + index) % len(names)]])
        if names[(first + index) % len(names)] == BANNED:
            banned = BannedStrings(BANNED_STRINGS, tokenizer.token_bytes)
            options["banned_strings"] = banned
        params = SamplingParams(max_new_tokens=max_new_tokens, seed=index, **options)
        requests.append(Request(PROMPTS[index], params, index))
    return requests


def assert_compiled(steps, rows, length) -> None:
    """One row is decoded uncompiled only where the context has no space for drafted tokens."""
    assert steps.compiled > 1
    assert steps.uncompiled == 0 or (rows == 1 and length > MAX_SEQ_LEN - 10)


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_all_options_work_in_one_compiled_step(name, length, compiled, tokenizer, steps):
    """Rows have different options. In float32 the tokens equal uncompiled ones."""
    requests = make_requests(name, compiled.rows, length, tokenizer)
    tokens = run_requests(compiled.prepared, requests, compiled.rows)
    assert_compiled(steps, compiled.rows, length)
    expected = compiled.expected_tokens(requests)
    assert expected is None or tokens == expected
    for request in requests:
        assert request.params.min_new_tokens <= request.num_generated <= length
        if request.params.banned_strings:
            text = b"".join(tokenizer.token_bytes[token] for token in request.completion)
            assert not any(banned.encode() in text for banned in BANNED_STRINGS)


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_stop_strings_with_a_compiled_step(length, compiled, tokenizer, steps):
    rows = compiled.rows
    prompts = ["Once", "Zoë saw", "", "The dog", "A"][:rows]

    def texts(model, **options) -> dict[int, str]:
        texts: dict[int, str] = dict.fromkeys(range(rows), "")
        options = dict(max_new_tokens=length, temperature=0.8, top_p=0.9) | options
        for chunk in generate(model, tokenizer, prompts, min_new_tokens=20, **options):
            texts[chunk.prompt] += chunk.text
        return texts

    unstopped = texts(compiled.prepared, batch_size=rows)
    stops = [text[9:12] for text in unstopped.values()]
    stopped = texts(compiled.prepared, batch_size=rows, stop=stops)
    assert_compiled(steps, rows, length)
    for index, text in unstopped.items():
        ends = [text.find(stop) for stop in stops if stop in text]
        assert stopped[index] == text[: min(ends)]
    if compiled.dtype == "float32":
        assert unstopped == texts(compiled.model, batch_size=1)


def test_requests_join_and_leave_a_compiled_batch(compiled, tokenizer, steps):
    """More requests than rows, of different lengths."""
    pairs = enumerate(OPTIONS)
    requests = [make_requests(name, 1, 10 + 17 * i, tokenizer)[0] for i, name in pairs]
    expected = compiled.expected_tokens(requests)
    tokens = run_requests(compiled.prepared, requests, compiled.rows)
    assert steps.compiled > 1
    assert expected is None or tokens == expected


def test_1000_compiled_tokens_equal_uncompiled_ones(compiled, steps):
    """In float32. The other dtypes have no exact reference."""
    params = SamplingParams(1000, top_p=0.9)
    requests = [Request(prompt, params, i) for i, prompt in enumerate(PROMPTS[: compiled.rows])]
    expected = compiled.expected_tokens(requests)
    tokens = run_requests(compiled.prepared, requests, compiled.rows)
    assert [request.num_generated for request in requests] == [1000] * compiled.rows
    assert expected is None or tokens == expected


def test_a_package_serves_models_with_other_weights(compiled, steps):
    """A compiled model was once taken for another."""
    other = random_model()
    with torch.no_grad():
        other.layers[0].attention.wo.weight.mul_(-1)
    rows = compiled.rows
    prepared_other = prepare_for_inference(other, compiled.dtype, rows, compile=True)
    assert prepared_other.is_compiled(rows, rows)
    generate = functools.partial(generate_batch, batch_size=rows, max_new_tokens=40)
    prompts = PROMPTS[:rows]
    first, second, again = (
        generate(prepared, prompts)
        for prepared in (
            compiled.prepared,
            prepared_other,
            compiled.prepared,
        )
    )
    assert first == again != second
    if compiled.dtype == "float32":
        assert (first, second) == (generate(compiled.model, prompts), generate(other, prompts))


def test_caches_of_different_lengths_use_the_same_package(compiled, steps):
    """Code compiled for one length of cache must not run with another, or at the same kv_len."""
    results = []
    for count in (3, 100, 20, 60):
        engine = InferenceEngine(compiled.prepared, compiled.rows)
        request = Request([1, 2, 3], SamplingParams(count, temperature=0))
        list(engine.generate([request]))
        results.append(request.completion)
    longest = max(results, key=len)
    assert all(longest[: len(tokens)] == tokens for tokens in results)


def test_compiled_int8_sequences_are_equal_in_batch_and_alone(model):
    """Their keys and values are kept in 16 bits, in a batch and alone."""
    results = []
    for batch_size in (1, 5):
        prepared = prepare_for_inference(model, "int8", batch_size, compile=True)
        prepared.wait_for_compilation()
        engine = InferenceEngine(prepared, batch_size)
        assert engine.batch.cache.keys[0].dtype == torch.bfloat16
        requests = [Request(p, SamplingParams(100), i) for i, p in enumerate(PROMPTS)]
        list(engine.generate(requests))
        results.append([request.tokens for request in requests])
    assert results[0] == results[1]
