"""
A short run of tests/tools/fuzz.py, and tests of its own ability to detect faults.
"""

import os
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.tools.fuzz import Damage, FuzzTarget, Settings, explain, fuzz
from tests.tools.fuzz_readers import READERS, Contents, Reader

GOOD = b"good, " * 50

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system sets no alarms"),
    pytest.mark.filterwarnings(
        "ignore:Duplicate name"
    ),  # some damaged archives have a record twice
]


@pytest.mark.parametrize("count", [20, pytest.param(150, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_in_one_line_or_read_correctly(count):
    verdicts = list(fuzz(READERS, range(count)))
    failures = [verdict for verdict in verdicts if verdict.outcome == "failed"]
    assert not failures, explain(failures)
    assert Counter(verdict.reader for verdict in verdicts) == {
        reader.name: count for reader in READERS
    }
    assert {verdict.reader for verdict in verdicts if verdict.outcome == "refused"} == {
        r.name for r in READERS
    }


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_number_makes_the_same_file_again(reader, tmp_path):
    first, second = (FuzzTarget(reader, str(tmp_path / name)) for name in ("first", "second"))
    damaged = [first.damage(0, number) for number in range(20)]
    assert [(one.file, one.max_changes) for one in damaged] == [
        (one.file, one.max_changes) for one in (second.damage(0, number) for number in range(20))
    ]
    assert first.damage(0, 7) == damaged[7] != first.damage(1, 7)
    assert len({(one.file, one.content) for one in damaged}) > 10


def write_good(folder: str):
    Path(folder, "tokenizer").write_bytes(GOOD)


def bad_read(path: str, fault) -> Contents:
    """Reads the good file; does what it should not on any other."""
    return Contents(None, {}, None) if Path(path).read_bytes() == GOOD else fault(path)


def crash(path):
    os.kill(os.getpid(), signal.SIGSEGV)


def loop(path):
    try:
        while True:
            pass
    except Exception as error:
        raise ValueError(f"{path}: damaged") from error


def fill_the_memory(path):
    try:
        torch.zeros(1 << 29)
    except RuntimeError as error:
        raise ValueError(f"{path}: damaged") from error


def miss_a_key(path):
    return {}[path]


def say_nothing(path):
    raise ValueError


def say_two_lines(path):
    raise ValueError(f"{path}: damaged\nbeyond repair")


def say_it_in_bold(path):
    raise ValueError(f"{path}: \x1b[1mdamaged")


def say_too_much(path):
    raise ValueError(f"{path}: {'damaged ' * 100}")


def name_no_file(path):
    raise ValueError("damaged")


BAD_READERS = {
    crash: f"the process died (-{int(signal.SIGSEGV)})",
    loop: "TookTooLong",
    fill_the_memory: "refused only where the memory ended",
    miss_a_key: "KeyError",
    say_nothing: "ValueError without a word",
    say_two_lines: "ValueError that does not print as one line",
    say_it_in_bold: "ValueError that does not print as one line",
    say_too_much: "ValueError too long to read",
    name_no_file: "ValueError that does not name the file",
}


@pytest.mark.slow
def test_bad_readers_are_detected():
    readers = [
        Reader(
            fault.__name__,
            write_good,
            ("tokenizer",),
            "tokenizer",
            read=partial(bad_read, fault=fault),
        )
        for fault in BAD_READERS
    ]
    verdicts = list(fuzz(readers, range(2), Settings(time_limit=2)))
    assert [(v.reader, v.number) for v in verdicts] == [
        (fault.__name__, n) for fault in BAD_READERS for n in (0, 1)
    ]
    for verdict, cause in zip(verdicts[::2], BAD_READERS.values(), strict=True):
        assert verdict.outcome == "failed" and verdict.cause.startswith(cause)


def test_weights_that_the_damage_does_not_explain_are_found_out(tmp_path):
    bench = FuzzTarget(next(reader for reader in READERS if reader.name == "v1"), str(tmp_path))
    damaged, good = Damage("v1.bin", bench.originals["v1.bin"], max_changes=1), bench.expected
    name, weight = "norm.weight", good.tensors["norm.weight"]

    def wrong(tensor):
        return bench.compare(good._replace(tensors=good.tensors | {name: tensor}), damaged)[1]

    one, two, nan = weight.clone(), weight.clone(), weight.clone()
    one[0], two[:2], nan[0] = 1.5, 1.5, torch.nan
    assert wrong(weight) == wrong(one) == ""
    assert "more values" in wrong(two) and "another shape" in wrong(nan)
    assert "another shape" in wrong(weight.view(torch.int32)) and "another shape" in wrong(
        weight[1:]
    )
    assert "tokenizer" in bench.compare(good._replace(tokenizer_hash="another"), damaged)[1]
