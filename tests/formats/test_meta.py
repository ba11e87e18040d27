"""
Meta's folders of Llama 2 and Llama 3, in one shard or several.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from formats import meta
from formats.lazy_model import from_model
from formats.registry import open_model
from formats.writer import write_model
from generation.engine import generate_tokens
from ops.rope import RopeScaling
from tests.helpers import LLAMA3, model_logits, random_model, random_slices, small_llama3_tokenizer
from textdata.tokenizer import load_tokenizer

# The params.json of Llama 3 8B
LLAMA3_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
SCALED_DOWN = LLAMA3_8B | {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 2,
    "multiple_of": 16,
}


def exported(tmp_path, model, tokenizer=None) -> Path:
    write_model(from_model(model, tokenizer=tokenizer), str(tmp_path / "exported"), "meta")
    return tmp_path / "exported"


def split_into_shards(folder: Path, number: int, embedding_axis: int):
    """Split consolidated.00.pth as Meta's tensor parallelism does."""
    whole = torch.load(folder / "consolidated.00.pth", weights_only=True)
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embedding_axis}
    for shard in range(number):
        part = {"rope.freqs": torch.ones(6, dtype=torch.bfloat16)}
        for name, weight in whole.items():
            axis = axes.get(name.split(".")[-2], 0)
            is_vector = weight.dim() == 1
            part[name] = weight if is_vector else weight.chunk(number, axis)[shard].clone()
        torch.save(part, folder / f"consolidated.{shard:02d}.pth")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("axis", [0, 1], ids=["Llama 3", "Llama 2"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_shards_are_concatenated(number, axis, tied, tokenizer, tmp_path):
    model = random_model(n_kv_heads=4, tie_embeddings=tied)
    folder = exported(tmp_path, model, tokenizer)
    split_into_shards(folder, number, axis)
    again = open_model(str(folder), max_seq_len=160)
    # If output.weight and the embedding are split along different axes, they are not known as tied.
    assert again.args.tie_embeddings == (tied and (axis == 0 or number == 1))
    assert torch.equal(model_logits(again.load()), model_logits(model))


def test_torch_load_reads_the_file(tmp_path):
    model = random_model(tie_embeddings=True)
    state = torch.load(
        exported(tmp_path, model) / "consolidated.00.pth", weights_only=True, mmap=True
    )
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()


@pytest.mark.parametrize(
    "hidden_dim, multiple_of, multiplier",
    [
        (None, 32, None),
        (None, 16, 1.3),
        (100, 32, None),
        (33, 7, None),
        (1, 1, None),
        (4001, 1, 2.5),
    ],
)
def test_any_feed_forward_width_round_trips(hidden_dim, multiple_of, multiplier, tmp_path):
    """params.json has no hidden_dim, only a formula."""
    model = random_model(
        hidden_dim=hidden_dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier
    )
    assert open_model(str(exported(tmp_path, model))).args.ffn_dim == model.args.ffn_dim


def test_params_json_has_only_keys_that_llama_2_knows(tokenizer, tmp_path):
    known = {
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "multiple_of",
        "ffn_dim_multiplier",
        "norm_eps",
    }
    folder = exported(tmp_path, random_model(hidden_dim=100), tokenizer)
    assert json.loads((folder / "params.json").read_text()).keys() == known


def test_params_json_for_llama_3_has_rope_theta(tmp_path):
    """Llama 3's code assumes 500000 if the key is missing."""
    tokenizer = small_llama3_tokenizer()
    folder = exported(tmp_path, random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    assert json.loads((folder / "params.json").read_text())["rope_theta"] == 10000.0
    assert open_model(str(folder)).read_tokenizer().hash == tokenizer.hash


def test_llama_2_with_vocab_size_minus_1_and_outer_tokenizer(tokenizer, tmp_path):
    folder = exported(tmp_path, random_model(), tokenizer)
    params = json.loads((folder / "params.json").read_text()) | {"vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    again = open_model(str(folder))
    assert again.args.vocab_size == 512 and again.read_tokenizer().hash == tokenizer.hash
    assert again.args.max_seq_len == 4096


def test_a_scaled_rope_with_its_own_factor_is_read(tmp_path):
    """Llama 3.2's factor, with the key of Meta's later code."""
    folder = exported(tmp_path, random_model(**LLAMA3))
    params = json.loads((folder / "params.json").read_text())
    assert params["use_scaled_rope"] is True
    assert open_model(str(folder)).args.rope_scaling == meta.SCALED_ROPE
    (folder / "params.json").write_text(json.dumps(params | {"rope_scaling_factor": 32.0}))
    assert open_model(str(folder)).args.rope_scaling == RopeScaling("llama3", 32.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim=None), "it has no dim"),
        (dict(norm_eps=None), "it has no norm_eps"),
        (dict(n_layers=3), r"no layers\.2"),
        (dict(n_layers=1), r"unexpected layers\.1"),
        (dict(n_layers=2**30), r"no layers\.2"),
        (dict(n_heads=5), "n_heads=5: must divide dim=48"),
        (dict(dim="48"), "dim='48' is not a number"),
        (dict(dim=96), "it has 1 of the 2 files"),
        (dict(dim=2**40 * 48), "it has 1 of the"),
        (dict(vocab_size=100), "do not fit the model: tok_embeddings"),
        (dict(multiple_of=0), "multiple_of=0"),
        (dict(ffn_dim_multiplier=float("inf")), "ffn_dim_multiplier=inf"),
        (dict(vision_chunk_size=448), "vision_chunk_size is not supported"),
        (dict(moe_args={}), "moe_args is not supported"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_invalid_params_are_refused_by_name(changes, message, tmp_path):
    folder = exported(tmp_path, random_model())
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(
        json.dumps({key: value for key, value in params.items() if value is not None})
    )
    with pytest.raises(ValueError, match=rf"exported.*{message}"):
        open_model(str(folder))


@pytest.mark.parametrize(
    "missing, message", [(0, "00.pth is missing"), (1, "01.pth is missing"), (3, "has 3 of the 4")]
)
def test_a_missing_shard_is_named(missing, message, tmp_path):
    folder = exported(tmp_path, random_model())
    split_into_shards(folder, 4, 0)
    (folder / f"consolidated.{missing:02d}.pth").unlink()
    with pytest.raises(ValueError, match=message):
        open_model(str(folder))


def test_shards_of_different_models_are_refused(tmp_path):
    folder = exported(tmp_path, random_model())
    split_into_shards(folder, 2, 0)
    torch.save({"norm.weight": torch.ones(48)}, folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="do not belong together"):
        open_model(str(folder))


def test_a_flipped_bit_of_a_weight_is_detected(tmp_path):
    folder = exported(tmp_path, random_model())
    content = bytearray((folder / "consolidated.00.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "consolidated.00.pth").write_bytes(content)
    again = open_model(str(folder))
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: its record .* it is damaged"):
        again.load()


@pytest.fixture(scope="session")
def llama3_tokenizer(tmp_path_factory) -> str:
    """The path of Llama 3's tokenizer.model, from a package that contains it."""
    folder = tmp_path_factory.mktemp("llama-models")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        [*command, "llama-models==0.3.0", "--dest", str(folder)], capture_output=True, timeout=120
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(
            "the package llama-models, which contains Llama 3's tokenizer, is not available"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("llama3/tokenizer.model"))
        (folder / "tokenizer.model").write_bytes(wheel.read(name))
    return str(folder / "tokenizer.model")


@pytest.fixture
def llama3_folder(llama3_tokenizer, tmp_path) -> Path:
    """A folder like Meta's of Llama 3 8B, but smaller, in bfloat16."""
    (tmp_path / "llama3").mkdir()
    args = meta.parse_args(SCALED_DOWN, "params.json", tied=False)
    torch.manual_seed(0)
    state = (
        random_model(**{name: getattr(args, name) for name in vars(args)}).bfloat16().state_dict()
    )
    torch.save(state, tmp_path / "llama3" / "consolidated.00.pth")
    (tmp_path / "llama3" / "params.json").write_text(json.dumps(SCALED_DOWN))
    os.symlink(llama3_tokenizer, tmp_path / "llama3" / "tokenizer.model")
    return tmp_path / "llama3"


@pytest.mark.slow
def test_a_llama_3_folder_generates_and_round_trips(llama3_folder, tmp_path):
    source = open_model(str(llama3_folder), max_seq_len=256)
    model, tokenizer = source.load(), source.read_tokenizer()
    assert (model.args.ffn_dim, model.args.vocab_size, model.args.rope_theta) == (
        224,
        128256,
        500000.0,
    )
    prompt = tokenizer.encode("Once upon a time", bos=True)
    assert prompt == [128000, 12805, 5304, 264, 892]
    tokens = generate_tokens(model, prompt, max_new_tokens=20, temperature=0)
    assert len(tokens) == 20 and tokenizer.decode(tokens)
    path = str(llama3_folder)
    for target in ("hf", "gguf", "ckpt", "meta"):
        write_model(open_model(path, max_seq_len=256), str(tmp_path / target), target)
        path = str(tmp_path / target)
    end = open_model(path, max_seq_len=256)
    assert end.dtype == torch.bfloat16 and torch.equal(
        model_logits(end.load()), model_logits(model)
    )
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == (
        llama3_folder / "tokenizer.model"
    ).read_bytes()


@pytest.mark.slow
def test_the_llama_3_tokenizer_is_the_same_in_all_programs(
    llama3_folder, llama3_tokenizer, shared, tmp_path
):
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed")
    import requests

    source, tokenizer = open_model(str(llama3_folder)), load_tokenizer(llama3_tokenizer)
    for target in ("hf", "gguf"):
        write_model(source, str(tmp_path / target), target)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity, params.warmup = (
        str(tmp_path / "gguf"),
        64,
        -1,
        False,
    )
    server = xllamacpp.Server(params)
    with open(shared("data/tinystories.txt"), encoding="utf-8") as file:
        slices = random_slices(file.read())
    slices += [
        "naïve café — “quoted” 🦙🦙",
        "日本語 русский",
        "x = 12345.678\n\n\tif  y:\n",
        "I'LL we've",
    ]
    for text in slices:
        ids = tokenizer.encode(text)
        assert hf_tokenizer.encode(text, add_special_tokens=False) == ids
        assert hf_tokenizer.decode(ids) == tokenizer.decode(ids) == text
        answer = requests.post(
            f"{server.listening_address}/tokenize", json={"content": text, "add_special": False}
        )
        assert answer.json()["tokens"] == ids
    (tmp_path / "hf" / "tokenizer.model").unlink()
    assert open_model(str(tmp_path / "hf")).read_tokenizer().hash == tokenizer.hash


def test_llama_3_2_is_not_taken_for_3_1(tmp_path):
    """The params.json of Llama 3.2 omits its scaling factor, 32."""
    params = LLAMA3_8B | {
        "dim": 2048,
        "n_layers": 16,
        "ffn_dim_multiplier": 1.5,
        "use_scaled_rope": True,
    }
    with pytest.raises(ValueError, match=r'add "rope_scaling_factor": 32\.0'):
        meta.parse_args(params, "params.json", tied=True)
    args = meta.parse_args(params | {"rope_scaling_factor": 32.0}, "params.json", tied=True)
    assert args.rope_scaling.factor == 32.0
