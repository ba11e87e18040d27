"""
Checkpoints in one file: saved atomically, loaded strictly, compatible with llama2.c.
"""

import errno
import functools
import io
import math
import os
import pickle
from pathlib import Path

import pytest
import torch

from checkpoints.file import LLAMA2C_MODEL_ARGS, load_checkpoint, save_checkpoint, write_model_args
from model import ModelArgs
from runtime import atomic_files as atomic
from tests import helpers
from tests.helpers import load_model, make_checkpoint

TINY = helpers.CHECKPOINT_MODEL
random_model = functools.partial(helpers.random_model, TINY, None)
LLAMA2C_KEYS = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "max_seq_len",
    "dropout",
}


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "ckpt.pt")


@pytest.fixture
def good(path) -> bytes:
    """The content of a good checkpoint, written to path."""
    save_checkpoint(path, make_checkpoint(random_model()))
    return content_of(path)


def content_of(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def llama2c_checkpoint(prefix: str) -> dict:
    """A checkpoint as llama2.c's train.py writes it, with n_kv_heads; hidden_dim is 48."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"tok_embeddings": (19, 16), "norm": (16,)}
    for layer in range(2):
        block = f"layers.{layer}"
        shapes |= {f"{block}.attention.{name}": (16, 16) for name in ("wq", "wo")}
        shapes |= {f"{block}.attention.{name}": (8, 16) for name in ("wk", "wv")}
        shapes |= {f"{block}.feed_forward.{name}": (48, 16) for name in ("w1", "w3")}
        shapes |= {
            f"{block}.feed_forward.w2": (16, 48),
            f"{block}.attention_norm": (16,),
            f"{block}.ffn_norm": (16,),
        }
    model = {
        f"{prefix}{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    model[f"{prefix}output.weight"] = model[f"{prefix}tok_embeddings.weight"]
    return {
        "model": model,
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": dict(
            dim=16,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            vocab_size=19,
            multiple_of=8,
            max_seq_len=6,
            dropout=0.0,
        ),
        "iter_num": 1000,
        "best_val_loss": torch.tensor(1.25),
        "config": {"out_dir": "out", "vocab_source": "custom", "vocab_size": 19, "compile": True},
    }


@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_a_checkpoint_of_llama2c_loads_with_and_without_prefixes(prefix, path):
    """nanoGPT #325: checkpoints of compiled models or of DDP did not load."""
    original = llama2c_checkpoint(prefix)
    torch.save(original, path)
    model, checkpoint = load_model(path)
    assert model.args == ModelArgs(**TINY) and not model.training
    assert {prefix + name for name in model.state_dict()} == set(original["model"])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, original["model"][prefix + name]), name
    assert model.output.weight is model.tok_embeddings.weight
    assert checkpoint["iter_num"] == 1000 and checkpoint["best_val_loss"] == 1.25
    assert checkpoint["config"]["vocab_source"] == "custom"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_checkpoint_loads_bit_for_bit(tied, path):
    model = random_model(tie_embeddings=tied, hidden_dim=33, rope_theta=500000.0, norm_eps=1e-6)
    save_checkpoint(path, make_checkpoint(model))
    again, checkpoint = load_model(path)
    state = model.state_dict()
    assert (
        again.args.ffn_dim == 33
        and again.args.rope_theta == 500000.0
        and again.args.norm_eps == 1e-6
    )
    assert list(state) == list(again.state_dict()) and checkpoint["iter_num"] == 7
    assert all(torch.equal(state[name], weight) for name, weight in again.state_dict().items())
    assert (again.output.weight is again.tok_embeddings.weight) == tied


def test_a_saved_checkpoint_is_readable_with_torch_load(good, path):
    plain = torch.load(path, weights_only=True)
    assert set(plain["model"]) == set(random_model().state_dict())
    assert plain["model_args"] == TINY | dict(dropout=0.0)


@pytest.mark.parametrize(
    "shape", [{}, TINY, TINY | dict(n_kv_heads=None), TINY | dict(dropout=0.1)]
)
def test_default_model_args_have_exactly_the_keys_of_llama2c(shape):
    assert set(LLAMA2C_MODEL_ARGS) == LLAMA2C_KEYS
    args = ModelArgs(**shape)
    saved = write_model_args(args)
    assert set(saved) == LLAMA2C_KEYS
    assert saved["n_kv_heads"] == args.kv_heads


@pytest.mark.parametrize(
    "extra",
    [
        dict(hidden_dim=33),
        dict(ffn_dim_multiplier=1.3),
        dict(rope_theta=500000.0),
        dict(norm_eps=1e-6),
        dict(tie_embeddings=False),
        dict(hidden_dim=33, rope_theta=500000.0, tie_embeddings=False),
    ],
    ids=str,
)
def test_model_args_have_further_keys_only_where_needed(extra):
    args = ModelArgs(**TINY, **extra)
    saved = write_model_args(args)
    assert saved == TINY | dict(dropout=0.0) | extra
    assert ModelArgs(**saved) == args


def changed(state: dict, **changes) -> dict:
    """The state dict with some tensors replaced, or removed where the value is None."""
    state = state | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(norm__weight=None), r"no norm\.weight"),
        (dict(layers__1__attention__wk__weight=None), r"no layers\.1\.attention\.wk\.weight"),
        (dict(layers__1__ffn_norm__weight=None), r"no layers\.1\.ffn_norm\.weight"),
        (dict(lm_head__weight=torch.zeros(19, 16)), r"unexpected lm_head\.weight"),
        (
            dict(layers__2__ffn_norm__weight=torch.ones(16)),
            r"unexpected layers\.2\.ffn_norm\.weight",
        ),
        (dict(norm__weight=torch.ones(17)), r"norm\.weight is \(17,\), not \(16,\)"),
        (
            dict(layers__0__attention__wk__weight=torch.ones(16, 8)),
            r"wk\.weight is \(16, 8\), not \(8, 16\)",
        ),
        (
            dict(output__weight=torch.zeros(19, 16)),
            r"output\.weight differs from tok_embeddings\.weight",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_mismatched_weights_are_refused_by_name(changes, message, path):
    model = random_model()
    save_checkpoint(path, make_checkpoint(model, model=changed(model.state_dict(), **changes)))
    with pytest.raises(ValueError, match=r"ckpt\.pt: .*" + message):
        load_model(path)


@pytest.mark.parametrize(
    "saved",
    [
        dict(
            n_layer=12,
            n_head=12,
            n_embd=768,
            block_size=1024,
            bias=False,
            vocab_size=50304,
            dropout=0.0,
        ),  # nanoGPT
        TINY | dict(n_experts=8),
        TINY | dict(n_kv_heads=3),
        TINY | dict(dim="16"),
        TINY | dict(dim=None),
        {},
        [16, 2, 4],
        None,
    ],
    ids=str,
)
def test_invalid_model_args_are_refused(saved, path):
    save_checkpoint(path, make_checkpoint(random_model(), model_args=saved))
    with pytest.raises(ValueError, match=r"ckpt\.pt: model_args are not those of a Llama"):
        load_model(path)


@pytest.mark.parametrize(
    "oversized", [dict(vocab_size=2**40), dict(dim=2**40), dict(hidden_dim=2**40)], ids=str
)
def test_oversized_model_args_are_refused_before_allocation(oversized, path):
    save_checkpoint(path, make_checkpoint(random_model(), model_args=TINY | oversized))
    with pytest.raises(ValueError, match=r"ckpt\.pt: "):
        load_model(path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2, 3],
        torch.zeros(3),
        {},
        random_model().state_dict(),
        dict(model=random_model().state_dict(), iter_num=0),
        dict(model=[1, 2], model_args=TINY, iter_num=0),
        dict(model={"norm.weight": 3}, model_args=TINY, iter_num=0),
        dict(model={name: 3 for name in random_model().state_dict()}, model_args=TINY, iter_num=0),
        dict(model={0: torch.zeros(3)}, model_args=TINY, iter_num=0),
    ],
    ids=[
        "list",
        "tensor",
        "empty",
        "state dict",
        "no model_args",
        "model is a list",
        "a weight is missing, one is not a tensor",
        "weights are not tensors",
        "names are not strings",
    ],
)
def test_other_torch_files_are_refused(content, path):
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"ckpt\.pt: "):
        load_model(path)


def test_a_missing_checkpoint_is_named_with_advice():
    with pytest.raises(ValueError, match=r"nowhere/ckpt\.pt: .*train\.py"):
        load_checkpoint("nowhere/ckpt.pt")


def torch_error(number: int) -> RuntimeError:
    """An error of the system as PyTorch raises it where it maps a file."""
    reason = f"{os.strerror(number)} ({number})"
    return RuntimeError(f"unable to mmap 80 bytes from file </a/best.pt>: {reason}")


def test_pytorch_writes_the_number_of_a_system_error():
    with pytest.raises(RuntimeError, match=rf": {os.strerror(2)} \(2\)$"):
        torch.UntypedStorage.from_file("nowhere/best.pt", False, 80)


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "ckpt.pt"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "other.pt"), "other.pt"),
        (torch_error(errno.ENOMEM), "ckpt.pt"),
        (torch_error(errno.EACCES), "ckpt.pt"),
    ],
    ids=["memory", "input", "open files", "mapping", "permission"],
)
def test_transient_errors_are_not_reported_as_damage(error, expected, good, path, monkeypatch):
    """The run would resume from an older checkpoint and rename a good one."""

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises((OSError, RuntimeError), match=expected):
        load_checkpoint(path)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("file_format", ["zip", "legacy", "pickle"])
def test_loading_a_checkpoint_runs_no_code(file_format, path, tmp_path):
    touched = tmp_path / "touched"
    checkpoint = make_checkpoint(random_model(), config={"seed": Hostile(touched)})
    if file_format == "pickle":
        with open(path, "wb") as file:
            pickle.dump(checkpoint["config"], file, protocol=2)
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=file_format == "zip")
    reason = "a file as PyTorch wrote it before" if file_format == "legacy" else "damaged or not"
    with pytest.raises(ValueError, match=rf"ckpt\.pt: {reason}"):
        load_checkpoint(path)
    assert not touched.exists()
    # Control: the file contains the harmful pickle, and pickle.loads executes it.
    assert str(touched).encode() in Path(path).read_bytes()
    pickle.loads(pickle.dumps(Hostile(touched)))
    assert touched.exists()


@pytest.mark.parametrize("twentieth", range(20))
def test_a_truncated_checkpoint_is_refused(twentieth, good, path):
    with open(path, "wb") as file:
        file.write(good[: len(good) * twentieth // 20])
    with pytest.raises(ValueError, match=r"ckpt\.pt: damaged or not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"\0" * 5000, b"PK\3\4" + b"x" * 5000, b"Once upon a time " * 300]
)
def test_arbitrary_bytes_are_refused(content, path):
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(ValueError, match=r"ckpt\.pt: damaged or not a checkpoint"):
        load_checkpoint(path)


def only_the_old_file_remains(path, content: bytes) -> bool:
    return os.listdir(os.path.dirname(path)) == ["ckpt.pt"] and content_of(path) == content


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_weights_never_replace_a_good_checkpoint(value, good, path):
    """nanoGPT #167: a run in float16 diverged to NaN and overwrote its checkpoint."""
    model = random_model()
    with torch.no_grad():
        model.layers[1].feed_forward.w3.weight[-1, -1] = value
    with pytest.raises(
        ValueError, match=r"ckpt\.pt not written: .*layers\.1\.feed_forward\.w3\.weight"
    ):
        save_checkpoint(path, make_checkpoint(model))
    assert only_the_old_file_remains(path, good)


@pytest.mark.parametrize("room", [0, 1, 1000, 10_000, 20_000])
def test_a_full_disk_leaves_only_the_old_checkpoint(room, good, path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    assert len(good) > room
    monkeypatch.setattr(
        atomic,
        "open",
        lambda path, mode: io.BufferedWriter(FullDisk(path, mode), 64),
        raising=False,
    )
    with pytest.raises(OSError, match=r"ckpt\.pt|No space left"):
        save_checkpoint(path, make_checkpoint(random_model(), iter_num=8))
    assert only_the_old_file_remains(path, good)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_fsync_or_rename_leaves_only_the_old_checkpoint(call, good, path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        save_checkpoint(path, make_checkpoint(random_model(), iter_num=8))
    assert only_the_old_file_remains(path, good)


def test_a_new_checkpoint_replaces_the_old_one(good, path):
    save_checkpoint(path, make_checkpoint(random_model(), iter_num=8))
    assert load_checkpoint(path)["iter_num"] == 8
    assert os.listdir(os.path.dirname(path)) == ["ckpt.pt"]
