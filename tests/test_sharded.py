"""Checkpoints in shares: written, read, joined, and refused where they are damaged."""

import os
import pickle
import re
import shutil

import pytest
import torch

import export
import sharded
from checkpoint import load_checkpoint, save_checkpoint
from keeper import newest_checkpoint
from model import ModelArgs, Transformer, draw_weights
from sharded import read_outline, with_whole_tensors, write_whole
from tests.test_checkpoint import checkpoint_of, random_model
from tests.test_train import same_state


def trained_state(step: int) -> dict:
    """What load_checkpoint gives of a model with AdamW's moments."""
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    return checkpoint_of(model, iter_num=step, optimizer=optimizer.state_dict(), late_norms=[0.5, 1.5])


@pytest.fixture
def file(tmp_path) -> str:
    save_checkpoint(str(tmp_path / "file.pt"), trained_state(7))
    return str(tmp_path / "file.pt")


@pytest.fixture
def folder(file, tmp_path) -> str:
    write_whole(load_checkpoint(file), str(tmp_path / "ckpt.dcp"))
    return str(tmp_path / "ckpt.dcp")


def test_shares_hold_what_the_file_holds(file, folder, run_here, tmp_path):
    assert run_here(sharded, folder, str(tmp_path / "again.pt"))[0] == 0
    assert same_state(file, tmp_path / "again.pt")
    assert run_here(sharded, file, str(tmp_path / "more.dcp"))[0] == 0
    again = with_whole_tensors(str(tmp_path / "more.dcp"), read_outline(str(tmp_path / "more.dcp")))
    assert again.keys() == load_checkpoint(file).keys() and again["late_norms"] == [0.5, 1.5]


def test_shares_are_exported_as_the_file_is(file, folder, run_here, tmp_path):
    for source, target in ((file, "a.bin"), (folder, "b.bin")):
        assert run_here(export, str(tmp_path / target), f"--from={source}")[0] == 0
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.pt"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_folder_is_refused_by_name(folder, name, damage, run_here, tmp_path):
    path = os.path.join(folder, name)
    with open(path, "rb") as part:
        content = bytearray(part.read())
    if damage == "gone":
        os.remove(path)
    elif damage == "changed" and name == "run.pt":
        torch.save(torch.load(path, weights_only=True) | dict(late_norms=[0.5]), path)
    else:
        content[len(content) // 2] ^= 1
        with open(path, "wb") as part:
            part.write(content[: len(content) * 2 // 3] if damage == "cut" else content)
    with pytest.raises(ValueError, match=rf"{re.escape(folder)}: damaged"):
        read_outline(folder)
    status, _, errors = run_here(sharded, folder, str(tmp_path / "joined.pt"))
    assert status == 1 and folder in errors and not os.path.exists(tmp_path / "joined.pt")


class Hostile:
    """What would write a file, were its pickle believed."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def with_table(folder: str, table):
    """The folder with another table, its hash put right."""
    with open(os.path.join(folder, ".metadata"), "wb") as file:
        pickle.dump(table, file)
    rest = torch.load(os.path.join(folder, "run.pt"), weights_only=True)
    rest["files"][".metadata"] = sharded.digest_of(os.path.join(folder, ".metadata"))
    torch.save({key: value for key, value in rest.items() if key != "sha256"}, os.path.join(folder, "run.pt"))


def test_a_table_that_would_run_code_is_refused_unrun(folder, tmp_path):
    with_table(folder, Hostile(tmp_path / "harmed"))
    with pytest.raises(ValueError, match="open is no part of a table"):
        read_outline(folder)
    assert not os.path.exists(tmp_path / "harmed")


def test_a_table_that_names_files_elsewhere_is_refused(folder):
    table = read_outline(folder)["table"]
    for place in table.storage_data.values():
        place.relative_path = "../file.pt"
    with_table(folder, table)
    with pytest.raises(ValueError, match=r"names another file, \.\./file\.pt"):
        read_outline(folder)


def test_the_newest_is_found_among_files_and_folders(file, folder, tmp_path):
    os.rename(file, tmp_path / "ckpt_000007.pt")
    assert newest_checkpoint(str(tmp_path))[0] == folder
    shutil.rmtree(folder)
    said = []
    assert newest_checkpoint(str(tmp_path), said.append)[0] == str(tmp_path / "ckpt_000007.pt") and len(said) == 1


def test_weights_drawn_one_at_a_time_are_a_new_model_s():
    for args in (ModelArgs(64, 2, 4, vocab_size=96), ModelArgs(64, 3, 4, 2, vocab_size=96, tie_embeddings=False)):
        torch.manual_seed(5)
        weights = dict(draw_weights(args))
        torch.manual_seed(5)
        model = Transformer(args)
        assert weights.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
