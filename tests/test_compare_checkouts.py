import zipfile

import pytest
import torch

from tests.tools import compare_checkouts
from tests.tools.compare_checkouts import (
    Checkouts,
    Comparison,
    compare,
    content_of,
    file_digests,
    first_difference,
)

STATE = {"model": {"a": torch.tensor([1.0, float("nan")])}, "steps": [1, 2, float("nan")]}


def test_equal_states_have_no_difference():
    copy = {"model": {"a": STATE["model"]["a"].clone()}, "steps": [1, 2, float("nan")]}
    assert first_difference(STATE, copy) == ""


@pytest.mark.parametrize(
    "other, difference",
    [
        (STATE | {"model": {"a": torch.tensor([1.0, 2.0])}}, "model.a: tensors differ"),
        (STATE | {"model": {"a": torch.zeros(2).half()}}, "model.a: tensors differ"),
        (STATE | {"model": {}}, "model: keys ['a'] are in one only"),
        (STATE | {"steps": [1, 2]}, "steps: 3 and 2 elements"),
        (STATE | {"steps": [1, 3, float("nan")]}, "steps[1]: 2 and 3"),
        (STATE | {"steps": "1"}, "steps: list and str"),
    ],
)
def test_a_difference_is_found_by_name(other, difference):
    assert first_difference(STATE, other) == difference


def test_negative_zero_differs_from_zero():
    assert first_difference(torch.tensor(0.0), torch.tensor(-0.0)) == ": tensors differ"


def test_files_differ_by_content_and_archives_not_by_date(tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / name).mkdir()
        with zipfile.ZipFile(tmp_path / name / "ckpt.pt", "w") as archive:
            record = zipfile.ZipInfo("data.pkl", (2000 + number, 1, 1, 0, 0, 0))
            archive.writestr(record, b"x" if name == "c" else b"y")
    a, b, c = (file_digests(tmp_path / name) for name in ("a", "b", "c"))
    assert first_difference(a, b) == ""
    assert first_difference(a, c).startswith("ckpt.pt: ")
    (tmp_path / "plain").write_bytes(b"abc")
    assert content_of(tmp_path / "plain") == b"abc"


def test_every_comparison_gets_a_line(monkeypatch, capsys, tmp_path):
    results = [Comparison("formats v0", ""), Comparison("formats v1", "a: 1 and 2")]
    monkeypatch.setattr(compare_checkouts, "make_data", lambda checkouts: None)
    monkeypatch.setitem(compare_checkouts.COMPARISONS, "formats", lambda checkouts: results)
    assert not compare(Checkouts(tmp_path, tmp_path, tmp_path), ["formats"], 1)
    assert capsys.readouterr().out == "formats v0: equal\nformats v1: NOT EQUAL, a: 1 and 2\n"
