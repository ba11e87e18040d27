"""Sharded checkpoints: written, read, converted, and refused if they are damaged."""

import errno
import functools
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from checkpoints import manager as manager_module
from checkpoints import sharded
from checkpoints.file import load_checkpoint, save_checkpoint
from checkpoints.latest import load_latest, open_checkpoint
from checkpoints.sharded import gather_full_state, open_sharded, write_single_rank
from model import ModelArgs, Transformer, iter_initial_weights
from runtime.device import autocast
from runtime.distributed import DistContext, full_tensor
from tests import helpers
from tests.helpers import make_checkpoint, same_training_state
from training import setup as training_setup
from training.best_model import update_best
from training.out_dir import remove_partial_files
from training.parallel import load_weights, shard

random_model = functools.partial(helpers.random_model, helpers.CHECKPOINT_MODEL, None)
ARGS = dict(dim=32, n_layers=2, n_heads=4, vocab_size=512, max_seq_len=32)


def trained_state(step: int) -> dict:
    """A checkpoint of a model with AdamW's moments."""
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    return make_checkpoint(
        model, iter_num=step, optimizer=optimizer.state_dict(), late_norms=[0.5, 1.5]
    )


@pytest.fixture
def file(tmp_path) -> str:
    save_checkpoint(str(tmp_path / "file.pt"), trained_state(7))
    return str(tmp_path / "file.pt")


@pytest.fixture
def folder(file, tmp_path) -> str:
    write_single_rank(load_checkpoint(file), str(tmp_path / "ckpt.dcp"))
    return str(tmp_path / "ckpt.dcp")


def test_a_sharded_checkpoint_has_the_content_of_the_file(file, folder, run_script, tmp_path):
    assert (
        run_script(
            "export.py", str(tmp_path / "again.pt"), f"--from={folder}", "--training_state=True"
        ).returncode
        == 0
    )
    assert same_training_state(file, tmp_path / "again.pt")
    assert (
        run_script(
            "export.py", str(tmp_path / "more.dcp"), f"--from={file}", "--training_state=True"
        ).returncode
        == 0
    )
    again = gather_full_state(open_sharded(str(tmp_path / "more.dcp")))
    assert again.keys() == load_checkpoint(file).keys() and again["late_norms"] == [0.5, 1.5]


def test_a_sharded_checkpoint_exports_the_same_model(file, folder, run_script, tmp_path):
    for source, target in ((file, "a.bin"), (folder, "b.bin")):
        assert run_script("export.py", str(tmp_path / target), f"--from={source}").returncode == 0
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.pt"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_folder_is_refused_by_name(folder, name, damage, run_script, tmp_path):
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
        open_sharded(folder)
    joined = tmp_path / "joined.pt"
    result = run_script("export.py", str(joined), f"--from={folder}", "--training_state=True")
    assert result.returncode == 1 and folder in result.stderr and not joined.exists()


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def replace_metadata(folder: str, metadata):
    """Replace DCP's metadata in the folder, with a valid hash."""
    with open(os.path.join(folder, ".metadata"), "wb") as file:
        pickle.dump(metadata, file)
    rest = torch.load(os.path.join(folder, "run.pt"), weights_only=True)
    rest["files"][".metadata"] = sharded.file_sha256(os.path.join(folder, ".metadata"))
    torch.save(
        {key: value for key, value in rest.items() if key != "sha256"},
        os.path.join(folder, "run.pt"),
    )


def test_metadata_that_would_run_code_is_refused(folder, tmp_path):
    replace_metadata(folder, Hostile(tmp_path / "harmed"))
    with pytest.raises(ValueError, match=r"io\.open is not allowed in \.metadata"):
        open_sharded(folder)
    assert not os.path.exists(tmp_path / "harmed")


def test_metadata_with_a_damaged_pickle_is_refused(folder):
    replace_metadata(folder, None)
    with open(os.path.join(folder, ".metadata"), "wb") as file:
        file.write(b"\x80\x04\x8d" + b"\xff" * 8 + b".")  # a string of 2**64 bytes
    rest = torch.load(os.path.join(folder, "run.pt"), weights_only=True)
    rest["files"][".metadata"] = sharded.file_sha256(os.path.join(folder, ".metadata"))
    torch.save(rest, os.path.join(folder, "run.pt"))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        open_sharded(folder)


@pytest.mark.parametrize("name", ["\x1b[31m" * 1000, "x\ny", "../" + "y" * 200])
@pytest.mark.parametrize("exists", [True, False])
def test_the_name_of_a_file_is_clipped(folder, name, exists, monkeypatch):
    """Control characters of a name in the checkpoint reached the terminal."""
    if exists:
        monkeypatch.setattr(sharded.ShardedTensors, "fingerprint", lambda *_: ())
    rest = torch.load(os.path.join(folder, "run.pt"), weights_only=True)
    del rest["sha256"]
    rest["files"][name] = "0" * 64
    torch.save(rest, os.path.join(folder, "run.pt"))
    with pytest.raises(ValueError) as error:
        open_sharded(folder)
    message = str(error.value).removeprefix(folder)
    assert message.isprintable() and len(message) < 200


def test_metadata_that_names_other_files_is_refused(folder):
    metadata = open_sharded(folder)["sharded_tensors"].metadata
    for info in metadata.storage_data.values():
        info.relative_path = "../file.pt"
    replace_metadata(folder, metadata)
    with pytest.raises(ValueError, match=r"names a file of no shard, '\.\./file\.pt'"):
        open_sharded(folder)


def test_the_latest_checkpoint_is_a_file_or_a_folder(file, folder, tmp_path):
    os.rename(file, tmp_path / "ckpt_000007.pt")
    assert load_latest(str(tmp_path))[0] == folder
    shutil.rmtree(folder)
    messages = []
    path = load_latest(str(tmp_path), messages.append).path
    assert path == str(tmp_path / "ckpt_000007.pt") and len(messages) == 1


def test_initial_weights_one_at_a_time_match_a_new_model():
    for args in (
        ModelArgs(64, 2, 4, vocab_size=96),
        ModelArgs(64, 3, 4, 2, vocab_size=96, tie_embeddings=False),
    ):
        torch.manual_seed(5)
        weights = dict(iter_initial_weights(args))
        torch.manual_seed(5)
        model = Transformer(args)
        assert weights.keys() == dict(model.named_parameters()).keys()
        assert all(
            torch.equal(weights[name], parameter) for name, parameter in model.named_parameters()
        )


def test_a_transient_disk_error_is_not_reported_as_damage(folder, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(sharded, "file_sha256", fails)
    with pytest.raises(OSError, match="Input/output error"):
        open_sharded(folder)


def test_a_folder_changed_while_reading_is_refused(file, folder, tmp_path):
    checkpoint = open_sharded(folder)
    os.rename(folder, tmp_path / "ckpt_000007.dcp")
    with pytest.raises(ValueError, match="changed while it was read"):
        gather_full_state(checkpoint)
    write_single_rank(load_checkpoint(file), folder)  # as training replaces it
    with pytest.raises(ValueError, match="changed while it was read"):
        gather_full_state(checkpoint)


@pytest.mark.parametrize("fault", ["no shards", "larger than the files", "out of range"])
def test_metadata_that_does_not_match_the_files_is_refused(folder, fault):
    metadata = open_sharded(folder)["sharded_tensors"].metadata
    entry = metadata.state_dict_metadata["model/norm.weight"]
    if fault == "no shards":
        entry.chunks.clear()
    else:
        entry.size = torch.Size([2**44])
        entry.chunks[0].sizes = torch.Size([2**44 if fault == "larger than the files" else 2**45])
    replace_metadata(folder, metadata)
    expected = {
        "no shards": "some values of .* are missing",
        "larger than the files": "larger than its",
        "out of range": "exceeds its shape",
    }
    with pytest.raises(ValueError, match=expected[fault]):
        open_sharded(folder)


@pytest.fixture
def alone():
    """A group of processes of which this one is all."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded_run(alone, tmp_path, tokenizer, monkeypatch):
    """A run with sharded checkpoints on one process; each call takes a step and saves."""
    monkeypatch.setattr(training_setup, "uses_fsdp", lambda config, dist_ctx: True)
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    config = train.TrainConfig(**ARGS, out_dir=str(out_dir), dtype="float32", keep_checkpoints=1)
    data = training_setup.Data(tokenizer, (), ())  # no windows
    run = training_setup.build_components(config, DistContext(), "cpu", data, config.model_args())
    load_weights(run.model, iter_initial_weights(config.model_args()))
    run.metrics.open(0)
    run.checkpoints.write_run_files()

    def save(step: int, best: bool = False) -> Path:
        run.state.iter_num = step
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        _, loss = run.model(tokens, tokens + 1)
        loss.backward()
        run.optimizer.step()
        training_setup.save_state(run, best or update_best(run))
        run.checkpoints.writer.wait_or_raise()
        return out_dir

    save.run = run
    return save


def checkpoint_steps(out_dir: Path) -> dict[str, int]:
    """The step of every checkpoint in a folder, by its name."""
    suffixes = (".dcp", ".pt", ".partial", ".old")
    names = sorted(name for name in os.listdir(out_dir) if name.endswith(suffixes))
    return {name: open_checkpoint(str(out_dir / name))["iter_num"] for name in names}


def test_sharded_checkpoints_rotate_as_files_do(sharded_run):
    out_dir = sharded_run(5, best=True)
    for worse in ("best.pt", "model.bin"):
        (out_dir / worse).write_bytes(b"")
    sharded_run(10, best=True)
    assert not (out_dir / "best.pt").exists() and not (out_dir / "model.bin").exists()
    sharded_run(15)
    sharded_run(15, best=True)  # of the same step again, as before an evaluation and after it
    assert checkpoint_steps(out_dir) == {
        "best.dcp": 15,
        "ckpt.dcp": 15,
        "ckpt_000010.dcp": 10,
        "ckpt_000015.dcp": 15,
    }
    weights = gather_full_state(open_sharded(str(out_dir / "ckpt.dcp")))["model"]
    for name, parameter in sharded_run.run.model.named_parameters():
        assert torch.equal(weights[name], parameter.full_tensor())
    os.truncate(out_dir / "ckpt.dcp" / "__0_0.distcp", 1000)  # and so ckpt_000015.dcp
    messages = []
    found = load_latest(str(out_dir), messages.append)
    assert found.path == str(out_dir / "ckpt_000010.dcp") and len(messages) == 1


def test_without_older_sharded_checkpoints_only_the_latest_stays(sharded_run):
    sharded_run.run.checkpoints.keep_checkpoints = 0
    sharded_run(5)
    assert checkpoint_steps(sharded_run(10)) == {"ckpt.dcp": 10, "ckpt_000010.dcp": 10}


@pytest.mark.parametrize("failing", ["best link", "write"])
def test_best_that_could_not_be_written_is_written_later(sharded_run, monkeypatch, failing):
    out_dir = sharded_run(5)
    link = manager_module.link_checkpoint

    def full_disk(*paths):
        raise OSError(errno.ENOSPC, "No space left on device", str(paths[0]))

    def link_all_but_best(source, target):
        return full_disk(target) if target.endswith("best.dcp") else link(source, target)

    with monkeypatch.context() as context:
        if failing == "write":
            context.setattr(sharded, "write_hashed", full_disk)
        else:
            context.setattr(manager_module, "link_checkpoint", link_all_but_best)
        sharded_run(10, best=True)
        assert "No space left" in sharded_run.run.checkpoints.poll()[0]
        latest = 10 if failing == "best link" else 5  # it does not fail with the best
        steps = checkpoint_steps(out_dir)
        assert steps.get("ckpt.dcp") == latest and "best.dcp" not in steps
    sharded_run(15)
    assert checkpoint_steps(out_dir) == {
        "best.dcp": 15,
        "ckpt.dcp": 15,
        "ckpt_000015.dcp": 15,
        f"ckpt_{latest:06d}.dcp": latest,
    }


def test_foreign_file_in_best_checkpoint_does_not_stop_the_latest(sharded_run):
    out_dir = sharded_run(5, best=True)
    (out_dir / "best.dcp" / "mine").mkdir()
    sharded_run(10, best=True)
    assert "holds other things (mine)" in sharded_run.run.checkpoints.poll()[0]
    assert checkpoint_steps(out_dir)["ckpt.dcp"] == 10
    (out_dir / "best.dcp" / "mine").rmdir()
    sharded_run.run.checkpoints.flush()
    assert checkpoint_steps(out_dir)["best.dcp"] == 10


def test_deleted_folder_of_sharded_checkpoints_is_made_again(sharded_run):
    out_dir = sharded_run(5, best=True)
    shutil.rmtree(out_dir)
    sharded_run(10)
    assert checkpoint_steps(out_dir) == {"best.dcp": 10, "ckpt.dcp": 10, "ckpt_000010.dcp": 10}
    assert (out_dir / "tokenizer.model").exists()


def test_best_checkpoint_of_an_interrupted_replacement_comes_back(sharded_run):
    """Killed between the two renames, there was no best.dcp, and the next start removed the old."""
    out_dir = sharded_run(5, best=True)
    os.rename(out_dir / "best.dcp", out_dir / "best.dcp.123.partial.old")
    (out_dir / "ckpt.dcp.10.partial").mkdir()
    remove_partial_files(str(out_dir))
    assert checkpoint_steps(out_dir) == {"best.dcp": 5, "ckpt.dcp": 5, "ckpt_000005.dcp": 5}


def test_shard_missing_on_the_first_rank_is_an_error(sharded_run, monkeypatch):
    """Machines without a common disk would each keep a part, and rotate what is whole away."""
    out_dir = sharded_run(5)
    monkeypatch.setattr(sharded, "file_sha256", lambda path: "")
    monkeypatch.setattr(sharded.glob, "glob", lambda pattern: ["elsewhere/__1_0.distcp"])
    with pytest.raises(ValueError, match="--out_dir must be one folder that all machines see"):
        sharded_run(10)
    monkeypatch.undo()
    assert checkpoint_steps(out_dir) == {"ckpt.dcp": 5, "ckpt_000005.dcp": 5}


def test_gathering_in_16_bits_changes_nothing_but_the_gains_rounding(alone):
    losses, gradients = [], []
    tokens = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1))
    for is_shared in (False, True):
        torch.manual_seed(0)
        model = Transformer(ModelArgs(64, 2, 4, vocab_size=96, max_seq_len=16))
        if is_shared:
            shard(model, "cpu", 1, "bfloat16")
        with autocast("cpu", "bfloat16"):
            loss = model(tokens, tokens)[1]
        loss.backward()
        losses.append(loss.item())
        gradients.append([full_tensor(p.grad) for p in model.parameters()])
        assert all(grad.dtype == torch.float32 for grad in gradients[-1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for plain, shared in zip(*gradients, strict=True):
        assert (plain - shared).norm() < 0.02 * plain.norm()
