"""
Vocabularies of Hugging Face folders: the ids of transformers, in every format that stores them.
"""

import dataclasses
import json
import random
import shutil

import pytest
import torch
import transformers

from export import main as export
from formats.lazy_model import from_model
from formats.model_metadata import ModelMetadata
from formats.registry import checked_tokenizer, load_model, open_model
from formats.writer import write_model
from generation.streaming import generate
from tests.helpers import random_model, random_slices
from tests.hf_folders import TOKENIZERS, save_folder
from textdata.tokenizer import HuggingFaceTokenizer, load_tokenizer
from training.resume import architecture_options
from training.setup import best_exporter, pretrained_tokenizer_hash

PARTS = ["é", " ", "  ", "[DOMAIN]", " Lily", "the cat", "日本", "😀", "a", "\n", "1", "12", " the"]


@pytest.fixture(scope="module")
def hf_folder(stories, tmp_path_factory):
    """hf_folder(name) is a folder with that tokenizer of tests/hf_folders.py, made once."""
    made = {}

    def find(name: str, **options) -> str:
        key = (name, *sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("hf") / name
            made[key] = save_folder(name, stories, path, **options)
        return str(made[key])

    return find


@pytest.fixture(scope="module")
def slices(stories):
    """500 pieces of text, and combinations of characters, spaces and added tokens."""
    rng = random.Random(0)
    mixed = ["".join(rng.choices(PARTS, k=12)) for _ in range(100)]
    edges = ["", " ", " a", "  two", "a\u2581b", "\n\nx"]
    return [*random_slices("".join(stories), 500), *mixed, *edges]


def differing(tokenizer, reference, slices):
    """The pieces of text with other ids or another text than in transformers."""
    options = {"add_special_tokens": False, "split_special_tokens": True}
    expected = [reference.encode(piece, **options) for piece in slices]
    found = [tokenizer.encode(piece) for piece in slices]
    pairs = zip(slices, found, expected, strict=True)
    return [
        (piece, ids, other)
        for piece, ids, other in pairs
        if ids != other or tokenizer.decode(ids) != reference.decode(ids)
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_transformers(name, hf_folder, slices, tmp_path):
    """Added tokens were cut, byte tokens vanished, and a text with a leading space got two."""
    path = hf_folder(name)
    reference = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer = checked_tokenizer(open_model(path))
    assert differing(tokenizer, reference, slices) == []
    assert (tokenizer.bos_id, tokenizer.eos_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
    )
    assert tokenizer.encode_batch(slices, 2) == [tokenizer.encode(piece) for piece in slices]


@pytest.mark.parametrize("target", ["gguf", "hf", "ckpt"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_format_keeps_the_ids(name, target, hf_folder, slices, tmp_path):
    """l2_json_only: a vocabulary without an unknown token ended in struct.error."""
    model = open_model(hf_folder(name))
    tokenizer = model.read_tokenizer()
    path = str(tmp_path / f"model.{target}")
    if (name, target) == ("special_bytes", "gguf"):
        with pytest.raises(ValueError, match=r"lists only some of these merges.*--format=hf"):
            write_model(model, path, target)
        return
    write_model(model, path, target)
    again = checked_tokenizer(open_model(path))
    assert again.hash == tokenizer.hash and again.bos_id == tokenizer.bos_id
    assert [again.encode(piece) for piece in slices] == [tokenizer.encode(s) for s in slices]


@pytest.mark.parametrize("name", ["gpt2", "smollm", "llama3"])
def test_gguf_without_tokenizer_json_gives_the_same_ids(name, hf_folder, slices, tmp_path):
    """llama.cpp's converter writes no tokenizer.json into the file."""
    from formats import gguf, gguf_tokenizer

    model = open_model(hf_folder(name))
    path = str(tmp_path / "model.gguf")
    write_model(model, path, "gguf")
    metadata, _ = gguf.read_split_container(path)
    del metadata[gguf_tokenizer.JSON_KEY]
    again = gguf.parse_tokenizer(metadata, path)
    tokenizer = model.read_tokenizer()
    assert [again.encode(piece) for piece in slices] == [tokenizer.encode(s) for s in slices]
    assert again.token_bytes == tokenizer.token_bytes


@pytest.mark.parametrize("name", ["gpt2", "smollm", "llama3", "metaspace", "added"])
def test_llama_cpp_gives_the_same_ids(name, hf_folder, stories, tmp_path):
    """A pre-tokenizer under a wrong name would cut words elsewhere."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed")
    requests = pytest.importorskip("requests")
    model = open_model(hf_folder(name))
    path = str(tmp_path / "model.gguf")
    write_model(model, path, "gguf")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    tokenizer = model.read_tokenizer()
    for piece in [*random_slices("".join(stories), 50), "x 12345 it's [DOMAIN]"]:
        piece = piece.strip()
        request = {"content": piece, "add_special": False, "parse_special": False}
        response = requests.post(f"{server.listening_address}/tokenize", json=request, timeout=60)
        assert response.json()["tokens"] == tokenizer.encode(piece), piece


def test_special_tokens_are_found_by_name(hf_folder):
    tokenizer = open_model(hf_folder("smollm")).read_tokenizer()
    assert tokenizer.special_id("<|im_end|>") == tokenizer.eos_id
    ids = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "a<|im_end|>b"
    assert tokenizer.token_bytes[tokenizer.eos_id] == b""
    with pytest.raises(ValueError, match="no special token <pad>"):
        tokenizer.special_id("<pad>")


def test_streamed_text_equals_the_whole_text(hf_folder, slices):
    for name in ("gpt2", "added", "special_bytes"):
        tokenizer = open_model(hf_folder(name)).read_tokenizer()
        for piece in slices[-110:]:
            ids = tokenizer.encode(piece, bos=True)
            assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


# Vocabulary and embedding of different sizes


@pytest.mark.parametrize("target", ["gguf", "hf", "ckpt"])
def test_a_padded_model_is_exported_with_its_tokenizer(target, hf_folder, tmp_path):
    """l2_padded64: no option satisfied the advice of the message."""
    folder = hf_folder("metaspace", padding=40)
    path = str(tmp_path / f"model.{target}")
    export([path, f"--from={folder}", f"--format={target}"])
    model, tokenizer = load_model(path)
    assert model.args.vocab_size == tokenizer.vocab_size + 40
    assert tokenizer.hash == open_model(folder).read_tokenizer().hash


@pytest.mark.parametrize("target", ["v0", "meta"])
def test_formats_without_padding_refuse_a_padded_model(target, hf_folder, tmp_path):
    model = open_model(hf_folder("metaspace", padding=40, rms_norm_eps=1e-5))
    with pytest.raises(ValueError, match=r"one embedding for each token.*--format=hf"):
        write_model(model, str(tmp_path / "m"), target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"temperature": 0.0}, {"bad_words": ["e"]}])
def test_sampling_gives_no_id_without_a_token(options, hf_folder):
    """The padding's logits of a random model are as large as those of tokens."""
    model, tokenizer = load_model(hf_folder("metaspace", padding=400))
    with torch.no_grad():  # greedy decoding would choose the padding
        model.output.weight[tokenizer.vocab_size :] *= 10
    chunks = generate(model, tokenizer, ["Once"] * 4, max_new_tokens=40, **options)
    tokens = [chunk.token for chunk in chunks if chunk.token is not None]
    assert len(tokens) > 50 and max(tokens) < tokenizer.vocab_size


def test_beam_search_gives_no_id_without_a_token(hf_folder, run_script):
    folder = hf_folder("metaspace", padding=400)
    tokenizer = open_model(folder).read_tokenizer()
    options = ["--num_beams=4", "--num_samples=4", "--max_new_tokens=20", "--format=jsonl"]
    result = run_script("sample.py", f"--init_from={folder}", "--start=Once", *options)
    assert result.returncode == 0, result.stderr
    tokens = [token for line in result.stdout.splitlines() for token in json.loads(line)["tokens"]]
    assert tokens and max(tokens) < tokenizer.vocab_size


def test_special_tokens_without_an_embedding_are_no_obstacle(hf_folder, tmp_path):
    """l2_pad_bigger_tok_json: a <pad> that no text contains has no embedding."""
    folder = hf_folder("metaspace")
    file = tmp_path / "hf" / "tokenizer.json"
    shutil.copytree(folder, tmp_path / "hf")
    content = json.loads(file.read_text())
    pad = {**content["added_tokens"][0], "id": open_model(folder).args.vocab_size}
    content["added_tokens"].append(pad | {"content": "<pad>"})
    file.write_text(json.dumps(content))
    model, tokenizer = load_model(str(tmp_path / "hf"))
    assert tokenizer.vocab_size == model.args.vocab_size + 1
    export([str(tmp_path / "m.gguf"), f"--from={tmp_path / 'hf'}"])
    assert load_model(str(tmp_path / "m.gguf"))[1].hash == tokenizer.hash
    content["added_tokens"][-1]["special"] = False
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"ids up to \d+, but the model .* has \d+ embeddings"):
        load_model(str(tmp_path / "hf"))


def test_a_padded_model_is_fine_tuned(hf_folder, stories, run_script, tmp_path):
    """The advice led in a circle: --vocab_size of the data, then --vocab_size of the model."""
    folder = hf_folder("metaspace", padding=40, rms_norm_eps=1e-5)
    vocab_size = open_model(folder).read_tokenizer().vocab_size
    (tmp_path / "text.txt").write_text("\n".join(stories[:40]), encoding="utf-8")
    tokenizer = f"--tokenizer={folder}/tokenizer.json"
    result = run_script(
        "tinystories.py", "pretokenize", "--input=text.txt", f"--vocab_size={vocab_size}",
        tokenizer, "--num_workers=1", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    options = ["--batch_size=2", "--gradient_accumulation_steps=1", "--eval_iters=1"]
    options += ["--compile=False", "--device=cpu", "--dtype=float32", "--warmup_iters=1"]
    options += ["--max_iters=2", "--data_dir=data/text"]
    result = run_script("train.py", f"--init_from={folder}", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no model.bin is written: readers of model.bin need one embedding" in result.stdout
    assert not (tmp_path / "out" / "model.bin").exists()
    saved = load_tokenizer(str(tmp_path / "out" / "tokenizer.json"))
    assert isinstance(saved, HuggingFaceTokenizer) and saved.vocab_size == vocab_size
    result = run_script("train.py", "--init_from=resume", "--max_iters=3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run_script("sample.py", "--max_new_tokens=5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for more in ([], [f"--vocab_size={vocab_size}"]):  # the checkpoint of a padded model
        command = ["train.py", "--init_from=out/ckpt.pt", "--out_dir=again", *options, *more]
        result = run_script(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("target", ["hf", "gguf", "ckpt"])
def test_the_data_of_a_padded_model_has_its_tokens(target, hf_folder, tmp_path):
    """A checkpoint of 552 embeddings and 512 tokens was trained with data in tok552."""
    model = open_model(hf_folder("metaspace", padding=40))
    tokenizer = model.read_tokenizer()
    path = str(tmp_path / f"model.{target}")
    write_model(model, path, target)
    again = open_model(path)
    assert architecture_options(again).vocab_size == tokenizer.vocab_size
    assert pretrained_tokenizer_hash(again) == tokenizer.hash


def test_a_smaller_tokenizer_beside_a_model_is_not_its_own(hf_folder, tokenizer_path, tmp_path):
    """Fine-tuning was refused: the model "was trained with another tokenizer"."""
    path = str(tmp_path / "model.bin")
    write_model(from_model(random_model(vocab_size=600)), path, "v0")
    write_model(from_model(random_model(vocab_size=512)), str(tmp_path / "same.bin"), "v0")
    shutil.copy(tokenizer_path, tmp_path / "tokenizer.model")
    model = open_model(path)
    assert pretrained_tokenizer_hash(model) is None
    assert architecture_options(model).vocab_size == 600
    model = dataclasses.replace(model, tokenizer_hash="another")
    assert pretrained_tokenizer_hash(model) == "another"
    same = open_model(str(tmp_path / "same.bin"))
    assert pretrained_tokenizer_hash(same) == same.read_tokenizer().hash


def test_a_run_writes_only_a_model_bin_with_readers(hf_folder, tokenizer):
    """A run wrote model.bin for a padded model, and where there can be no tokenizer.bin."""
    args = random_model().args
    assert best_exporter("out", args, None, tokenizer)
    padded = dataclasses.replace(args, vocab_size=576)
    assert best_exporter("out", padded, None, tokenizer) is None
    foreign = open_model(hf_folder("metaspace")).read_tokenizer()
    fitting = dataclasses.replace(args, vocab_size=foreign.vocab_size)
    assert best_exporter("out", fitting, None, foreign) is None
    assert best_exporter("out", args, ModelMetadata(stop_ids=(350,)), tokenizer) is None
    assert best_exporter("out", args, ModelMetadata(stop_ids=(2,)), tokenizer)
