"""
llama2.c's .bin files: bytes by definition, round trips, and refusals of damaged files.
"""

import functools
import math
import struct

import numpy as np
import pytest
import torch

from checkpoints.file import save_checkpoint, write_model_args
from formats import lazy_model, llama2c
from formats.lazy_model import LazyModel
from formats.registry import open_model
from generation.engine import generate_tokens
from model import Transformer
from ops.rope import precompute_rope_cache
from tests import helpers
from textdata.tokenizer import load_tokenizer

TINY = dict(dim=16, n_layers=2, n_heads=4, vocab_size=19, hidden_dim=24, max_seq_len=6)
random_model = functools.partial(helpers.random_model, TINY, 0.3)
FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


def write_v0(model: Transformer, path):
    llama2c.write(lazy_model.from_model(model), str(path))


def read_v0(path) -> Transformer:
    return llama2c.read(str(path)).load()


@pytest.fixture
def model_bin(tmp_path) -> str:
    """The path of a good file."""
    path = str(tmp_path / "model.bin")
    write_v0(random_model(n_kv_heads=2), path)
    return path


def content_of(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_bytes_are_those_of_llama2c(tied, tmp_path):
    model = random_model(
        dim=4, n_heads=1, vocab_size=3, hidden_dim=5, max_seq_len=3, tie_embeddings=tied
    )
    names = ["tok_embeddings.weight"]
    for part in ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo"):
        names += [f"layers.0.{part}.weight", f"layers.1.{part}.weight"]
    for part in ("ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        names += [f"layers.0.{part}.weight", f"layers.1.{part}.weight"]
    names += ["norm.weight"]
    state = model.state_dict()
    header = struct.pack("<7i", 4, 5, 2, 1, 1, 3 if tied else -3, 3)
    weights = [value for name in names for value in state[name].flatten().tolist()]
    angles = [position * frequency for position in range(3) for frequency in (1.0, 10000**-0.5)]
    lm_head = [] if tied else state["output.weight"].flatten().tolist()
    write_v0(model, str(tmp_path / "model.bin"))
    written = content_of(tmp_path / "model.bin")
    before = header + struct.pack(f"<{len(weights)}f", *weights)
    after = struct.pack(f"<{len(lm_head)}f", *lm_head)
    assert written[: len(before)] == before
    assert written[len(written) - len(after) :] == after
    tables = struct.unpack("<12f", written[len(before) : len(written) - len(after)])
    assert tables == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-6)


@pytest.mark.parametrize("hidden_dim", [24, 33])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_a_model_round_trips_bit_for_bit(n_kv_heads, tied, hidden_dim, tmp_path):
    """llama2.c #403, #431: an export lost grouped-query attention."""
    path = str(tmp_path / "model.bin")
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tied, hidden_dim=hidden_dim)
    write_v0(model, path)
    again = read_v0(path)
    state, state_again = model.state_dict(), again.state_dict()
    assert list(state) == list(state_again)
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert (again.output.weight is again.tok_embeddings.weight) == tied
    tokens = torch.randint(19, (2, 6))
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], again(tokens)[0])


def test_the_hidden_dim_from_multiple_of_is_written(tmp_path):
    path = str(tmp_path / "model.bin")
    write_v0(random_model(hidden_dim=None, multiple_of=4), path)
    assert struct.unpack_from("<7i", content_of(path))[1] == read_v0(path).args.ffn_dim == 44


def test_exporting_is_deterministic_and_does_not_change_the_model(tmp_path):
    model = random_model(tie_embeddings=False)
    args, state = model.args, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("first.bin", "second.bin"):
        write_v0(model, str(tmp_path / name))
    assert content_of(tmp_path / "first.bin") == content_of(tmp_path / "second.bin")
    assert model.args == args and all(
        torch.equal(state[name], tensor) for name, tensor in model.state_dict().items()
    )


def test_a_published_model_round_trips_and_generates_its_text(shared, tmp_path):
    path, copy = shared("models/stories260K.bin"), str(tmp_path / "model.bin")
    model, tokenizer = read_v0(path), load_tokenizer(shared("models/tok512.bin"))
    write_v0(model, copy)
    assert content_of(copy) == content_of(path)
    tokens = generate_tokens(model, [tokenizer.bos_id], max_new_tokens=200, temperature=0)
    assert len(tokens) == 200
    assert tokenizer.decode(tokens).startswith(
        "Once upon a time, there was a little girl named Lily."
    )


def test_the_format_is_detected_by_content_not_name(model_bin, tmp_path):
    model, tokens = read_v0(model_bin), torch.tensor([[1, 2, 3]])
    checkpoint = dict(model=model.state_dict(), model_args=write_model_args(model.args), iter_num=0)
    save_checkpoint(str(tmp_path / "checkpoint.bin"), checkpoint | dict(tokenizer_hash="abc"))
    (tmp_path / "weights.pt").write_bytes(content_of(model_bin))
    from_checkpoint, from_weights = (
        open_model(str(tmp_path / name)) for name in ("checkpoint.bin", "weights.pt")
    )
    assert from_checkpoint.tokenizer_hash == "abc" and from_weights.tokenizer_hash is None
    from_checkpoint, from_weights = from_checkpoint.load(), from_weights.load()
    with torch.no_grad():
        assert torch.equal(from_checkpoint(tokens)[0], model(tokens)[0])
        assert torch.equal(from_weights(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "name, overrides",
    [("rope_theta=500000", dict(rope_theta=500000.0)), ("norm_eps=1e-06", dict(norm_eps=1e-6))],
)
def test_unsupported_settings_are_refused_by_name(name, overrides, tmp_path):
    with pytest.raises(ValueError, match=name):
        write_v0(random_model(**overrides), str(tmp_path / "model.bin"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["tok_embeddings.weight", "layers.1.feed_forward.w3.weight", "norm.weight"]
)
def test_nan_weights_are_refused_and_the_old_file_remains(name, value, model_bin, tmp_path):
    before, model = content_of(model_bin), random_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(ValueError, match=name):
        write_v0(model, model_bin)
    assert content_of(model_bin) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


@pytest.fixture
def reads_no_tensor(monkeypatch):
    """A file must be refused before memory is allocated for its model."""

    def forbidden(self, name):
        raise AssertionError(f"read {name}")

    monkeypatch.setattr(LazyModel, "read", forbidden)


@pytest.mark.parametrize("change", [+1, -1, "x2", 0, -7, 2**20, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("field", range(7), ids=FIELDS)
def test_a_wrong_header_is_refused_before_allocation(field, change, model_bin, reads_no_tensor):
    content = bytearray(content_of(model_bin))
    header = list(struct.unpack_from("<7i", content))
    header[field] = {+1: header[field] + 1, -1: header[field] - 1, "x2": 2 * header[field]}.get(
        change, change
    )
    content[:28] = struct.pack("<7i", *header)
    with open(model_bin, "wb") as file:
        file.write(content)
    with pytest.raises(ValueError, match=r"model\.bin: "):
        read_v0(model_bin)


def test_a_header_of_huge_consistent_sizes_is_refused(model_bin, reads_no_tensor):
    with open(model_bin, "r+b") as file:
        file.write(struct.pack("<7i", 2**30, 2**30, 2**31 - 1, 2**10, 2**10, -(2**31), 2**31 - 1))
    with pytest.raises(ValueError, match=r"model\.bin: "):
        read_v0(model_bin)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:27],
        lambda content: content[:28],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:-4],
        lambda content: content + b"\0",
        lambda content: content + content,
        lambda content: b"Once upon a time, there was a little girl. " * 100,
    ],
    ids=[
        "empty",
        "part of a header",
        "header alone",
        "half",
        "a byte less",
        "a value less",
        "a byte more",
        "twice",
        "text",
    ],
)
def test_a_file_of_another_length_is_refused_before_allocation(damage, model_bin, reads_no_tensor):
    content = content_of(model_bin)
    with open(model_bin, "wb") as file:
        file.write(damage(content))
    with pytest.raises(ValueError, match=r"model\.bin: "):
        read_v0(model_bin)


def test_a_file_with_another_rope_theta_is_refused(model_bin):
    """The header has no rope_theta, but the rotary tables in the file depend on it."""
    tables = b"".join(table.numpy().tobytes() for table in precompute_rope_cache(4, 6, 500000.0))
    with open(model_bin, "r+b") as file:
        file.seek(-len(tables), 2)
        file.write(tables)
    with pytest.raises(ValueError, match=r"model\.bin: .*rotary"):
        read_v0(model_bin)


def test_a_file_with_nan_values_is_refused(model_bin):
    with open(model_bin, "r+b") as file:
        file.seek(28 + 4 * 100)
        file.write(struct.pack("<f", math.nan))
    with pytest.raises(ValueError, match=r"model\.bin: .*NaN or Inf"):
        read_v0(model_bin)


def v1_names() -> list[str]:
    """The names of a model's tensors in the order of versions 1 and 2, for 2 layers."""
    norms = [
        f"layers.{layer}.{norm}.weight"
        for norm in ("attention_norm", "ffn_norm")
        for layer in range(2)
    ]
    matrices = [f"attention.{w}" for w in ("wq", "wk", "wv", "wo")] + [
        f"feed_forward.{w}" for w in ("w1", "w2", "w3")
    ]
    of_layers = [f"layers.{layer}.{matrix}.weight" for matrix in matrices for layer in range(2)]
    return [*norms, "norm.weight", "tok_embeddings.weight", *of_layers]


def header_of(model: Transformer, version: int, rest: bytes = b"") -> bytes:
    args = model.args
    shape = (
        args.dim,
        args.hidden_dim,
        args.n_layers,
        args.n_heads,
        args.kv_heads,
        args.vocab_size,
        args.max_seq_len,
    )
    return (b"24ka" + struct.pack("<i7iB", version, *shape, args.tie_embeddings) + rest).ljust(
        256, b"\0"
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_version_1_has_the_bytes_of_its_definition(tied, tmp_path):
    model, path = random_model(n_kv_heads=2, tie_embeddings=tied), str(tmp_path / "model.bin")
    llama2c.write(lazy_model.from_model(model), path, "v1")
    names = v1_names() + ["output.weight"] * (not tied)
    state = model.state_dict()
    values = [value for name in names for value in state[name].flatten().tolist()]
    assert content_of(path) == header_of(model, 1) + struct.pack(f"<{len(values)}f", *values)


def q8_0(values: list[float], group_size: int) -> bytes:
    """The definition, in float32, one number at a time: q = round(x / s), s = max |x| / 127."""
    quantized, scales = [], []
    for start in range(0, len(values), group_size):
        group = np.float32(values[start : start + group_size])
        scale = np.float32(max(abs(value) for value in group) / np.float32(127))
        scales.append(scale)
        quantized += [round(float(np.float32(value / scale))) if scale else 0 for value in group]
    return struct.pack(f"<{len(quantized)}b", *quantized) + struct.pack(f"<{len(scales)}f", *scales)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "dim, hidden_dim, group_size",
    [(64, 128, 64), (128, 192, 64), (32, 64, 32), (48, 96, 16), (40, 88, 8), (12, 33, 1)],
)
def test_version_2_has_the_bytes_of_its_definition(dim, hidden_dim, group_size, tied, tmp_path):
    """The groups divide the rows of all matrices: runq.c ignores the rest of a row."""
    model = random_model(
        dim=dim, n_heads=2, hidden_dim=hidden_dim, vocab_size=67, tie_embeddings=tied
    )
    with torch.no_grad():
        model.layers[0].attention.wo.weight[:2] = 0.0  # groups without a scale
    path = str(tmp_path / "model.bin")
    llama2c.write(lazy_model.from_model(model), path, "v2")
    expected = header_of(model, 2, struct.pack("<i", group_size))
    for name in v1_names() + ["output.weight"] * (not tied):
        values = model.state_dict()[name].flatten().tolist()
        is_norm = "norm" in name
        expected += (
            struct.pack(f"<{len(values)}f", *values) if is_norm else q8_0(values, group_size)
        )
    assert content_of(path) == expected


def test_quantization_rounds_halves_to_even():
    groups = torch.tensor([[127.0, 0.5, 1.5, -0.5, -1.5, 2.5, 126.5, -127.0]])
    quantized, scales = llama2c.quantize(groups)
    assert quantized.tolist() == [[127, 0, 2, 0, -2, 2, 126, -127]] and scales.tolist() == [1.0]


@pytest.mark.parametrize("value", [1e-45, 190e-45, 1e-40, 3e38])
def test_quantized_extreme_values_stay_in_range(value):
    quantized, scales = llama2c.quantize(torch.tensor([[value, -value, 0.0, value / 2]]))
    assert quantized.abs().max() <= 127 and scales.isfinite().all()
    assert quantized[0, 1] == -quantized[0, 0] and quantized[0, 2] == 0


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("position", [4, *range(8, 40, 4)])
@pytest.mark.parametrize("value", [0, -1, 2**31 - 1])
def test_a_wrong_header_of_version_1_or_2_is_refused(version, position, value, tmp_path):
    path = str(tmp_path / "model.bin")
    llama2c.write(lazy_model.from_model(random_model(n_kv_heads=2)), path, version)
    content = bytearray(content_of(path))
    struct.pack_into("<i", content, position, value)
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(ValueError, match=r"model\.bin: "):
        read_v0(path)
