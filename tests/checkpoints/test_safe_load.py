"""Hostile files of torch.save: refused at once, with one sentence and little memory."""

import io
import os
import signal
import tracemalloc
import zipfile

import pytest
import torch

from checkpoints.file import load_checkpoint, save_checkpoint
from checkpoints.latest import read_step
from checkpoints.safe_load import check_pickle, read_records
from formats.registry import open_model
from tests.helpers import CHECKPOINT_MODEL, make_checkpoint, random_model
from tests.tools.damage import ONE, STRUCTURES, pack_torch_file, text_of

ENTRIES = ("model", "model_args", "iter_num", "best_val_loss", "config", "sha256")


@pytest.fixture(autouse=True)
def five_seconds():
    """Fail a test that takes longer."""

    def fail(*_: object) -> None:
        pytest.fail("not done in 5 seconds")  # an exception that no reader catches

    signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "ckpt.pt")


def write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def short_text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def checkpoint_pickle(entry: str, structure: bytes) -> bytes:
    """A checkpoint without weights, with the structure as one of its entries."""
    values = {name: b"}" for name in ENTRIES} | {"iter_num": ONE, "sha256": short_text("0" * 64)}
    items = [
        short_text(name) + value + b"s" for name, value in (values | {entry: structure}).items()
    ]
    return b"\x80\x02}" + b"".join(items) + b"."


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_hostile_structure_is_refused_at_once(path, structure):
    """2,005 bytes with nested shared lists hung every script, at 100 MB a second."""
    for entry in ENTRIES:
        write(path, pack_torch_file(checkpoint_pickle(entry, STRUCTURES[structure])))
        for read in (load_checkpoint, open_model):
            with pytest.raises(ValueError) as error:
                read(path)
            message = str(error.value)
            assert message.startswith(path) and len(message) < 400 and "\n" not in message
        read_step(path)


@pytest.mark.parametrize("structure", ["lists", "tuples", "lists filled later", "a key"])
def test_the_size_counts_every_reference(structure):
    with pytest.raises(ValueError, match="far more objects"):
        check_pickle(b"\x80\x02" + STRUCTURES[structure] + b".", 1 << 20)
    check_pickle(b"\x80\x02](" + text_of(100) * 50 + b"e.", 6000)
    with pytest.raises(ValueError, match="far more objects"):
        check_pickle(b"\x80\x02](" + text_of(100) * 50 + b"e.", 5000)


@pytest.mark.parametrize(
    "structure",
    [
        b"]" + (ONE + b"a") * 80_000,
        b"}" + (ONE + ONE + b"s") * 80_000,
        b"(" + (b"]" + ONE + b"a") * 80_000 + b"t",
        b"(](" + ONE * 80_000 + b"e" + b"r\0\0\x10\0" + b"j\0\0\x10\0" * 10 + b"t",
    ],
)
def test_the_time_of_the_check_is_linear(structure):
    """40 KB with an item added by each opcode took 29 s."""
    check_pickle(b"\x80\x02" + structure + b".", 1 << 20)


@pytest.mark.parametrize("opcode", [b"]", ONE, b"(", b"cbuiltins\nset\n"])
def test_the_number_of_opcodes_is_limited(opcode):
    """A million empty lists took 14 s."""
    with pytest.raises(ValueError, match="far more objects"):
        check_pickle(b"\x80\x02(" + opcode * 1_000_000 + b"t.", 1 << 20)


def test_an_archive_has_one_pickle(path):
    """The limit held for each pickle, and an archive could have any number of them."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("archive/data.pkl", "archive/other.PKL"):
            archive.writestr(name, b"\x80\x02}.")
    with pytest.raises(ValueError, match="more than one pickle"):
        read_records(path)


@pytest.mark.parametrize("pickle", [b"}K\x010.", b"(K\x011K\x01.", b"]]K\x01.", b"]](K\x01t."])
def test_every_object_of_a_pickle_is_used(pickle):
    """The size of an object that nothing contains did not count."""
    with pytest.raises(ValueError, match="damaged"):
        check_pickle(b"\x80\x02" + pickle, 1 << 20)


@pytest.mark.parametrize("pickle", [b"h\x05.", b"e.", b"a.", b"K\x01K\x02a."])
def test_a_damaged_pickle_is_refused(pickle):
    with pytest.raises((ValueError, LookupError)):
        check_pickle(b"\x80\x02" + pickle, 1 << 20)


def bomb(path: str) -> None:
    """64 MiB of zeros, compressed to 64 KiB, in the record of a tensor."""
    buffer = io.BytesIO()
    torch.save(make_checkpoint(random_model(CHECKPOINT_MODEL)), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(64 << 20) if name.endswith("/data/0") else old.read(name))


@pytest.mark.parametrize("read", [load_checkpoint, open_model])
def test_a_zip_bomb_is_refused_without_unpacking_it(path, read):
    """One of 14 MB took 6.4 GB before a resumed run refused it."""
    bomb(path)
    size = os.path.getsize(path)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"ckpt.pt: .*is incomplete or compressed"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * size + (4 << 20)


def test_a_compressed_pickle_is_refused(path):
    """The record of the pickle is read before those of the tensors."""
    pickle = b"\x80\x02]" + b"N" * (16 << 20)
    write(path, pack_torch_file(pickle, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="compressed"):
        load_checkpoint(path)


def test_records_may_not_overlap(path):
    """A thousand names of one record are a thousand times its size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data/0", bytes(100_000))
        archive.filelist += [archive.filelist[0]] * 1000
    write(path, buffer.getvalue())
    with pytest.raises(ValueError, match="overlap"):
        read_records(path)


@pytest.mark.parametrize("change", ["expanded", "longer", "sparse"])
def test_a_tensor_larger_than_its_record_is_refused(path, change):
    """A stride of 0 makes a tensor of any size; a false size reads foreign memory."""
    checkpoint = make_checkpoint(random_model(CHECKPOINT_MODEL))
    weight = checkpoint["model"]["norm.weight"]
    if change == "expanded":
        checkpoint["extra"] = torch.zeros(1).expand(1 << 40)
    elif change == "sparse":
        checkpoint["extra"] = torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,))
    else:
        checkpoint["extra"] = weight.clone()
    torch.save(checkpoint, path)
    if change == "longer":
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                last = name.endswith(f"/data/{len(records) - 6}")
                archive.writestr(name, content[:4] if last else content)
    with pytest.raises(ValueError, match=r"ckpt\.pt: damaged"):
        load_checkpoint(path)


def test_the_same_tensor_ten_times_is_refused(path):
    """A few bytes of pickle refer to a tensor again; its hash is as much work every time."""
    weight = torch.zeros(50_000)
    checkpoint = make_checkpoint(random_model(CHECKPOINT_MODEL), extra=[weight] * 10)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="its tensors are larger than the file"):
        load_checkpoint(path)


def test_a_checkpoint_has_less_than_200_objects_per_tensor(path):
    """A model of thousands of tensors stays below the limit."""
    model = random_model(CHECKPOINT_MODEL)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_checkpoint(path, make_checkpoint(model, optimizer=optimizer.state_dict()))
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickle = archive.read(name)
    num_tensors = 4 * len([*model.parameters()])
    check_pickle(pickle, 200 * num_tensors)
    assert load_checkpoint(path)["optimizer"]["state"]


@pytest.mark.parametrize("name", ["ckpt.pt", "run.pt"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    """Opening a pipe without a writer hung."""
    os.mkfifo(tmp_path / name)
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pipe|not a file"):
        load_checkpoint(str(tmp_path / name))
    assert read_step(str(tmp_path / name)) == -1


def test_a_storage_with_another_key_is_refused(path):
    """torch.load raised AssertionError, which ended a resumed run with a traceback."""
    save_checkpoint(path, make_checkpoint(random_model()))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (pickle_name,) = (name for name in records if name.endswith("data.pkl"))
    key = b"X\x01\0\0\x000"  # the text "0"
    assert key in records[pickle_name]
    records[pickle_name] = records[pickle_name].replace(key, key[:-1] + b"/")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"ckpt\.pt: damaged or not a checkpoint"):
        load_checkpoint(path)
