"""
Files that are not what their name says, and models in types or parts that need care.
"""

import shutil

import gguf as reference
import numpy as np
import pytest
import torch
import transformers
from gguf import quants

from formats import gguf, gguf_file, hugging_face
from formats.lazy_model import from_model
from formats.registry import detect_format, open_model
from formats.writer import write_model
from tests.helpers import model_logits, random_model
from textdata.tokenizer import load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 349000\n"


def exported(path, tokenizer, target="hf", **shape):
    write_model(from_model(random_model(**shape), tokenizer=tokenizer), str(path), target)
    return path


# An LM head unlike the embedding


def folder_with_head(tmp_path, tokenizer, weights_file: str, scale: float):
    """A folder whose config.json says that the weights are tied, with an LM head."""
    folder = exported(tmp_path / "m", tokenizer)
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * scale
    (folder / "model.safetensors").unlink()
    if weights_file.endswith("safetensors"):
        from safetensors.torch import save_file

        save_file(state, folder / weights_file, metadata={"format": "pt"})
    else:
        torch.save(state, folder / weights_file)
    return folder


@pytest.mark.parametrize("weights_file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("scale", [1.0, -2.0], ids=["equal", "different"])
def test_a_different_head_is_kept_although_tied(scale, weights_file, tmp_path, tokenizer):
    """c4_untied_says_tied: the head was dropped, and the logits were off by 7 of 5."""
    folder = folder_with_head(tmp_path, tokenizer, weights_file, scale)
    model = open_model(str(folder))
    assert model.args.tie_embeddings == (scale == 1.0)
    tokens = torch.arange(100)[None]
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert (model.load()(tokens)[0] - expected(tokens).logits).abs().max() < 2e-5
    again = str(tmp_path / "m.gguf")
    write_model(model, again, "gguf")
    assert torch.equal(model_logits(open_model(again).load()), model_logits(model.load()))


# Git LFS


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer.model", "config.json"]
)
def test_a_git_lfs_pointer_is_called_one(name, tmp_path, tokenizer):
    """lfs.gguf, c9_weights: it was called damaged."""
    folder = exported(tmp_path / "m", tokenizer)
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name}: only a pointer of Git LFS.*git lfs pull"):
        open_model(str(folder)).read_tokenizer()


@pytest.mark.parametrize("name", ["m.gguf", "ckpt.pt", "model.bin"])
def test_a_pointer_instead_of_a_model_is_called_one(name, tmp_path):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=r"only a pointer of Git LFS"):
        open_model(str(tmp_path / name))


def test_a_pointer_instead_of_a_checkpoint_is_called_one(tmp_path, run_script):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_text(POINTER)
    for script, option in (("sample.py", ""), ("train.py", "--init_from=resume")):
        result = run_script(script, *filter(None, [option]), cwd=tmp_path)
        assert result.returncode == 1 and "only a pointer of Git LFS" in result.stderr


# Pickles and names


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt"])
def test_an_old_pickle_is_called_one(name, tmp_path, tokenizer):
    """It was called damaged, because it is not a zip file."""
    path = exported(tmp_path / "m", tokenizer)
    (path / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, path / name, _use_new_zipfile_serialization=False)
    source = path / name if name == "ckpt.pt" else path
    with pytest.raises(ValueError, match=r"PyTorch wrote it before version 1\.6.*torch\.save"):
        open_model(str(source))


@pytest.mark.parametrize("name", ["weights.safetensors", "adapter.bin"])
def test_renamed_weights_get_their_name_in_the_message(name, tmp_path, tokenizer):
    """One message sent to the folder, the other back to the file."""
    folder = exported(tmp_path / "m", tokenizer)
    (folder / "model.safetensors").rename(folder / name)
    expected = "model.safetensors" if name.endswith("safetensors") else "pytorch_model.bin"
    with pytest.raises(ValueError, match=rf"if {name} has the weights, rename it to {expected}"):
        open_model(str(folder))
    with pytest.raises(ValueError, match=r"name the folder"):
        detect_format(str(folder / name))


def test_weights_without_their_config_are_called_that(tmp_path, tokenizer):
    folder = exported(tmp_path / "m", tokenizer)
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights without the config\.json"):
        detect_format(str(tmp_path / "model.safetensors"))


# GGUF


def split_file(path, tmp_path, count: int = 3):
    """The same model in several files, as llama.cpp's gguf-split writes it."""
    metadata, tensors = gguf_file.read_container(str(path))
    names = list(tensors)
    size = -(-len(names) // count)
    for number in range(count):
        writer = reference.GGUFWriter(tmp_path / f"s-{number + 1:05d}-of-{count:05d}.gguf", "llama")
        if number == 0:
            add_metadata(writer, metadata)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(names))
        for name in names[number * size : (number + 1) * size]:
            writer.add_tensor(name, tensors[name].read().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_metadata(writer, metadata: dict) -> None:
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


@pytest.mark.parametrize("number", [1, 3])
def test_a_split_file_is_read_from_any_part(number, tmp_path, tokenizer):
    """A split GGUF was called damaged."""
    path = exported(tmp_path / "m.gguf", tokenizer, "gguf")
    split_file(path, tmp_path)
    model = open_model(str(tmp_path / f"s-{number:05d}-of-00003.gguf"))
    assert torch.equal(model_logits(model.load()), model_logits(open_model(str(path)).load()))
    assert model.read_tokenizer().hash == tokenizer.hash


def test_an_incomplete_split_file_is_refused_by_name(tmp_path, tokenizer):
    split_file(exported(tmp_path / "m.gguf", tokenizer, "gguf"), tmp_path)
    first, second, third = sorted(tmp_path.glob("s-*"))
    second.rename(tmp_path / "other")
    with pytest.raises(ValueError, match=r"s-00002-of-00003\.gguf of the same split model is not"):
        open_model(str(first))
    shutil.copy(third, second)
    with pytest.raises(ValueError, match=r"not file 2 of 3"):
        open_model(str(first))
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match=r"NAME-00001-of-00003\.gguf"):
        open_model(str(tmp_path / "renamed.gguf"))


QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_types_are_dequantized_as_gguf_does(name, tmp_path):
    """A Q4_0 file was called damaged."""
    tensor_type = reference.GGMLQuantizationType[name]
    num_values, num_bytes = reference.GGML_QUANT_SIZES[tensor_type]
    shape = (3, 2 * num_values)
    raw = np.random.default_rng(0).integers(0, 60, (3, 2 * num_bytes), dtype=np.uint8)
    path = tmp_path / "values"
    path.write_bytes(b"header" + raw.tobytes())
    info = gguf_file.TensorInfo(shape, int(tensor_type), 0)
    tensor = gguf_file.open_tensor(gguf_file.FileSource(str(path)), 6, info)
    expected = quants.dequantize(raw, tensor_type)
    assert tensor.shape == shape and info.size == raw.size
    np.testing.assert_array_equal(tensor.read().numpy(), expected)


def test_a_q4_0_model_is_read(shared, tmp_path):
    model = open_model(shared("cases/models/q_Q4_0.gguf"))
    assert model.dtype == torch.float32 and model_logits(model.load()).isfinite().all()
    write_model(model, str(tmp_path / "m"), "hf")


@pytest.mark.parametrize("number, name", [(15, "Q8_K"), (9, "Q8_1"), (99, "99")])
def test_an_unsupported_type_is_refused_by_name(number, name, tmp_path, tokenizer):
    path = exported(tmp_path / "m.gguf", tokenizer, "gguf")
    content = path.read_bytes()
    position = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    changed = content[:position] + number.to_bytes(4, "little") + content[position + 4 :]
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"attn_q\.weight is quantized in type {name}\b"):
        open_model(str(path))


def test_a_vocabulary_without_an_unknown_token_is_written(tmp_path, tokenizer):
    """An id of -1 was written as if the token existed: struct.error."""
    from textdata.tokenizer import (
        CONTROL,
        NORMAL,
        UNKNOWN,
        SentencePieceTokenizer,
        proto_from_pieces,
    )

    pieces = [
        (text, score, CONTROL if piece_type == UNKNOWN else piece_type)
        for text, score, piece_type in tokenizer.pieces
    ]
    assert NORMAL in {piece[2] for piece in pieces}
    without = SentencePieceTokenizer(proto_from_pieces(pieces))
    path = exported(tmp_path / "m.gguf", without, "gguf")
    metadata, _ = gguf_file.read_container(str(path))
    assert "tokenizer.ggml.unknown_token_id" not in metadata
    assert gguf.parse_tokenizer(metadata, str(path)).encode("Once") == tokenizer.encode("Once")


@pytest.mark.parametrize(
    "name",
    ["c4_untied_says_tied", "c8", "chatml2", "chatml3", "e7_eos.gguf", "hfbpe", "l2_added_plain",
     "l2_json_only", "l2_pad_bigger_tok_json", "l2_padded64", "llama3_added", "q_Q4_0.gguf",
     "smollm", "split-00002-of-00003.gguf", "tags"],
)  # fmt: skip
def test_reported_models_are_read_with_their_tokenizers(name, shared):
    from formats.registry import load_model

    _, tokenizer = load_model(shared(f"cases/models/{name}"))
    text = "Tom saw é, 日本 and [DOMAIN]."
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["c8", "hfbpe", "l2_added_plain", "llama3_added", "smollm"])
def test_reported_tokenizers_give_the_ids_of_transformers(name, shared):
    path = shared(f"cases/models/{name}")
    reference_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer = hugging_face.read_tokenizer(path)
    for text in (" a", "zebra fish and [DOMAIN]x", "é 日本", "\n\nTom's 12"):
        expected = reference_tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == expected


def test_a_tokenizer_json_is_named_as_tokenizer(shared):
    path = shared("cases/models/chatml2/tokenizer.json")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 401)
