"""
Random sequences of add, cancel and step: rows, tokens and memory of an engine stay right.
"""

import functools
import gc
import random

import pytest
import torch

from generation.banned_strings import BannedStrings
from generation.engine import InferenceEngine
from generation.inference_model import convert_weights
from generation.prepared_model import PreparedModel
from generation.request import Request
from generation.sampling_params import SamplingParams
from tests import helpers
from tests.helpers import run_requests

MAX_SEQ_LEN = 48
V = helpers.GENERATION_MODEL["vocab_size"]
SHAPE = helpers.GENERATION_MODEL | dict(n_layers=1, max_seq_len=MAX_SEQ_LEN)
random_model = functools.partial(helpers.random_model, SHAPE, 0.3)
TOKEN_BYTES = [b"%c" % (40 + token) for token in range(V)]
NUM_CASES = 120


class Case:
    """A prompt with options, and the completion that it gets alone."""

    def __init__(self, model, rng, prefixes) -> None:
        prompt = [rng.randrange(V) for _ in range(rng.choice([1, 2, 5, 20, 60]))]
        self.prompt = rng.choice([[], *prefixes]) + prompt
        stop_ids = rng.sample(range(V), rng.choice([0, 0, 3, 20]))
        count = rng.choice([1, 2, 5, 12, 30])
        self.params = SamplingParams(
            max_new_tokens=count,
            min_new_tokens=rng.randrange(count + 1) if stop_ids else 0,
            temperature=rng.choice([0, 0.5, 1.0, 2.0]),
            top_k=rng.choice([0, 0, 1, 10]),
            top_p=rng.choice([1.0, 1.0, 0.3, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.2]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.5]),
            seed=rng.randrange(1000),
            stop_ids=stop_ids,
            banned_strings=rng.choice([None, None, BannedStrings(["+", "AB", "0"], TOKEN_BYTES)]),
        )
        self.index = rng.randrange(1000)
        self.model = model

    @functools.cached_property
    def expected(self) -> Request:
        """The request after a run alone."""
        request = self.new_request()
        run_requests(self.model, [request], 1)
        return request

    def new_request(self) -> Request:
        return Request(self.prompt, self.params, self.index)


def random_cases(model, rng) -> list[Case]:
    prefixes = [[rng.randrange(V) for _ in range(length)] for length in (33, 40, 100)]
    return [Case(model, rng, prefixes) for _ in range(NUM_CASES)]


class Run:
    """Random operations on one engine, with checks after each.

    Attributes:
        running: the requests that have not ended, with their cases.
        received: the tokens that step returned for each of them.
    """

    def __init__(self, engine, cases, rng) -> None:
        self.engine = engine
        self.cases = cases
        self.rng = rng
        self.running: dict[Request, Case] = {}
        self.received: dict[Request, list[int]] = {}

    def add(self) -> None:
        case = self.rng.choice(self.cases)
        request = case.new_request()
        self.running[request] = case
        self.received[request] = []
        self.engine.add(request)

    def cancel(self) -> None:
        request = self.rng.choice(list(self.running))
        case = self.running.pop(request)
        self.engine.cancel(request)
        completion, expected = request.completion, case.expected.completion
        assert completion == expected[: len(completion)] == self.received.pop(request)
        assert request.finish_reason == "cancelled"

    def step(self) -> None:
        for request, token, *_ in self.engine.step():
            if token is not None:
                self.received[request].append(token)
                continue
            expected = self.running.pop(request).expected
            assert request.tokens == expected.tokens
            assert request.finish_reason == expected.finish_reason
            assert self.received.pop(request) == request.completion

    def check(self) -> None:
        """No row is lost, and none keeps a request that has ended."""
        batch, waiting = self.engine.batch, self.engine.waiting
        in_rows = [row.request for row in batch.rows if row.request]
        assert batch.num_active == len(in_rows) <= len(batch.rows) == self.engine.batch_size
        assert [row.request for row in batch.active] == in_rows
        assert {*in_rows, *waiting} == set(self.running)
        assert len(in_rows) + len(waiting) == len(self.running)
        assert self.engine.has_requests == bool(self.running)
        for row in batch.rows:
            assert len(row.cached) <= MAX_SEQ_LEN

    def sequence(self) -> None:
        """Random operations, until all requests have ended."""
        num_operations = self.rng.randrange(1, 15)
        while num_operations or self.running:
            num_operations = max(0, num_operations - 1)
            operation = self.step
            if num_operations and self.rng.random() < 0.4:
                operation = self.add
            elif self.running and self.rng.random() < 0.15:
                operation = self.cancel
            operation()
            self.check()


def memory(engines) -> tuple[int, int, int]:
    """The number of live tensors and their bytes, and the longest cache of the engines."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return len(tensors), num_bytes, max(engine.batch.cache.length for engine in engines)


@pytest.mark.parametrize("has_draft", [False, True], ids=["plain", "draft model"])
@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_requests_get_what_they_get_alone(count, has_draft):
    """No row is lost, cancelled requests end at once, and memory does not grow."""
    rng, model = random.Random(1337), random_model()
    cases = random_cases(model, rng)
    prepared = PreparedModel(model)
    if has_draft:
        prepared = PreparedModel(model, draft=PreparedModel(convert_weights(model, "draft")))
    sizes = [1] if has_draft else [1, 2, 3, 4, 5]
    runs = [Run(InferenceEngine(prepared, size), cases, rng) for size in sizes]
    if has_draft:
        runs.append(Run(InferenceEngine(prepared, 3), cases, rng))  # the last request is drafted
    engines = [run.engine for run in runs]
    for number in range(count):
        runs[number % len(runs)].sequence()
        if number == count // 3:
            before = memory(engines)
    after = memory(engines)
    assert after[0] <= before[0] + 2 * len(engines) * 20  # views of the cache and the parameters
    assert after[1] <= before[1] * 1.05 + 1e5
    assert after[2] <= MAX_SEQ_LEN + 1
    for engine in engines:
        assert engine.batch.num_active == 0 and not engine.waiting
        assert len(engine.batch.views) <= engine.batch_size


@pytest.mark.slow
def test_the_random_cases_end_in_every_way():
    """Else the test above could not fail."""
    cases = random_cases(random_model(), random.Random(1337))
    reasons = [case.expected.finish_reason for case in cases]
    assert {"stop", "length"} <= set(reasons)
    assert len({tuple(case.expected.completion) for case in cases}) > NUM_CASES / 2
    assert max(len(case.expected.tokens) for case in cases) > 2 * MAX_SEQ_LEN
