"""
Hugging Face folders, compared with transformers in both directions.
"""

import io
import json

import pytest
import sentencepiece
import torch
import transformers

from formats import hugging_face, hugging_face_config
from formats.lazy_model import from_model
from formats.model_metadata import ModelMetadata
from formats.registry import open_model
from formats.writer import write_model
from ops.rope import RopeScaling
from tests.helpers import (
    LLAMA3,
    model_logits,
    random_model,
    random_slices,
)
from textdata.tokenizer import Llama3Tokenizer, SentencePieceTokenizer, load_tokenizer

LINEAR = dict(rope_scaling=RopeScaling("linear", 4.0))


def exported(tmp_path, model, tokenizer=None, dtype="auto") -> str:
    path = str(tmp_path / "exported")
    write_model(from_model(model, tokenizer=tokenizer), path, "hf", dtype)
    return path


@pytest.mark.parametrize("extra", [{}, LLAMA3, LINEAR], ids=["plain", "llama3", "linear"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_transformers_computes_the_same_logits(n_kv_heads, tied, extra, tokenizer, tmp_path):
    """llama2.c #321: an export did not load; #286: its logits were right for twenty tokens only."""
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tied, max_seq_len=200, **extra)
    path = exported(tmp_path, model, tokenizer)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.randint(512, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (hf_model(tokens).logits - model(tokens)[0]).abs().max() < 2e-5
    assert hf_model.dtype == torch.float32 and hf_model.config.max_position_embeddings == 200


def test_transformers_computes_the_logits_of_a_published_model(shared, tmp_path):
    source = open_model(shared("models/stories260K.bin"), shared("models/tok512.bin"))
    path, model = str(tmp_path / "exported"), source.load()
    write_model(source, path, "hf")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with open(shared("data/tinystories.txt"), encoding="utf-8") as file:
        tokens = torch.tensor([source.read_tokenizer().encode(file.read(2000), bos=True)[:200]])
    with torch.no_grad():
        # The logits reach 20, where transformers' two attention kernels differ by 2.2e-5.
        logits, hf_logits = model(tokens)[0], hf_model(tokens).logits
        torch.testing.assert_close(hf_logits, logits, rtol=1.3e-6, atol=2e-5)


@pytest.mark.parametrize("extra", [{}, LLAMA3, LINEAR], ids=["plain", "llama3", "linear"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_that_transformers_saved_has_the_same_logits(shards, tied, extra, tmp_path):
    settings = hugging_face_config.to_config(
        random_model(n_kv_heads=2, tie_embeddings=tied, **extra).args, "float32", ModelMetadata()
    )
    torch.manual_seed(0)
    hf_model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**settings, attn_implementation="eager")
    ).eval()
    hf_model.save_pretrained(tmp_path, max_shard_size="100KB" if shards > 1 else "1GB")
    assert (
        len(list(tmp_path.glob("*.safetensors"))) == 1
        if shards == 1
        else (tmp_path / INDEX).exists()
    )
    model = open_model(str(tmp_path)).load()
    tokens = torch.randint(512, (2, 160))
    with torch.no_grad():
        assert (hf_model(tokens).logits - model(tokens)[0]).abs().max() < 2e-5


INDEX = "model.safetensors.index.json"


def as_version_4_wrote_it(folder):
    """Convert an exported folder to the older layout: no rope_parameters, two pickles."""
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["dtype"], config["head_dim"]
    config["rope_scaling"] = None
    (folder / "config.json").write_text(json.dumps(config))
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        torch.save(
            {name: state[name].half() for name in part}, folder / f"pytorch_model-{number}.bin"
        )
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_of_transformers_4_with_pickles_is_read(tied, tokenizer, tmp_path):
    model = random_model(tie_embeddings=tied, rope_theta=500000.0)
    path = exported(tmp_path, model, tokenizer)
    as_version_4_wrote_it(tmp_path / "exported")
    again = open_model(path)
    assert again.dtype == torch.float16 and again.args.rope_theta == 500000.0
    assert (model_logits(again.load()) - model_logits(model)).abs().max() < 1e-2


def test_a_large_model_is_written_in_shards(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(hugging_face, "SHARD_SIZE", 100_000)
    model = random_model()
    path = exported(tmp_path, model, tokenizer)
    index = json.loads((tmp_path / "exported" / INDEX).read_text())
    files = sorted(file.name for file in (tmp_path / "exported").glob("*.safetensors"))
    assert len(files) == 3 and set(files) == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        assert (hf_model(tokens).logits - model(tokens)[0]).abs().max() < 2e-5
    assert torch.equal(model_logits(open_model(path).load()), model_logits(model))
    (tmp_path / "exported" / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"the shard {files[1]} is missing"):
        open_model(path)


@pytest.mark.parametrize(
    "model, text",
    [
        ("tok512.bin", "tinystories.txt"),
        ("tok512.bin", "tinystories_lowercase.txt"),
        ("llama2_tokenizer.model", "tinystories.txt"),
        ("llama2_tokenizer.model", "tinyshakespeare.txt"),
    ],
)
def test_transformers_encodes_and_decodes_as_sentencepiece(model, text, shared, tmp_path):
    """LLMs-from-scratch, litgpt #1359: a tokenizer did not load, or tokenized differently."""
    tokenizer = load_tokenizer(shared(f"models/{model}"))
    path = exported(tmp_path, random_model(vocab_size=tokenizer.vocab_size, dim=16), tokenizer)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with open(shared(f"data/{text}"), encoding="utf-8") as file:
        slices = random_slices(file.read())
    slices += [
        "",
        " ",
        "  two  spaces ",
        "\n\n\tTab",
        "naïve café — “quoted” 🦙🦙",
        "日本語",
        "é\u0301",
        "\u00a0",
    ]
    for piece in slices:
        ids = tokenizer.encode(piece)
        assert hf_tokenizer.encode(piece, add_special_tokens=False) == ids, repr(piece)
        assert hf_tokenizer.encode(piece) == [tokenizer.bos_id, *ids]
        assert hf_tokenizer.decode(ids) == tokenizer.decode(ids) == tokenizer.processor.decode(ids)
    again = hugging_face.read_tokenizer(path)
    assert again.hash == tokenizer.hash


@pytest.mark.parametrize("model", ["tok512.bin", "llama2_tokenizer.model"])
def test_tokenizer_json_alone_gives_an_equivalent_tokenizer(model, shared, tmp_path):
    tokenizer = load_tokenizer(shared(f"models/{model}"))
    path = exported(tmp_path, random_model(vocab_size=tokenizer.vocab_size, dim=16), tokenizer)
    (tmp_path / "exported" / "tokenizer.model").unlink()
    again = hugging_face.read_tokenizer(path)
    with open(shared("data/tinystories.txt"), encoding="utf-8") as file:
        assert all(
            again.encode(piece) == tokenizer.encode(piece) for piece in random_slices(file.read())
        )
    assert (again.bos_id, again.eos_id, again.vocab_size) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.vocab_size,
    )


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_tokenizer_json_with_a_metaspace_pretokenizer_is_read(scheme, tokenizer, tmp_path):
    """Newer versions of transformers replace spaces by ▁ in a pre-tokenizer.

    It differs from SentencePiece for a text that begins with a space: it adds no second one.
    """
    path = exported(tmp_path, random_model(), tokenizer)
    (tmp_path / "exported" / "tokenizer.model").unlink()
    file = tmp_path / "exported" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {"normalizer": None}
    content["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    again = hugging_face.read_tokenizer(path)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for text in ("Once upon a time", " a space first", "two  spaces ", "Lily's\n\nball"):
        assert again.encode(text) == hf_tokenizer.encode(text, add_special_tokens=False)


def test_transformers_knows_the_bos_and_eos_tokens(tokenizer, tmp_path):
    path = exported(tmp_path, random_model(), tokenizer)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert hf_tokenizer.bos_token_id == tokenizer.bos_id
    assert hf_tokenizer.eos_token_id == tokenizer.eos_id
    generation = transformers.GenerationConfig.from_pretrained(path)
    assert (
        generation.bos_token_id == tokenizer.bos_id
        and set(generation.eos_token_id) == tokenizer.stop_ids
    )
    ids = [tokenizer.bos_id, *tokenizer.encode("Hi"), tokenizer.eos_id]
    assert hf_tokenizer.decode(ids, skip_special_tokens=True) == "Hi"


def test_a_normalizing_vocabulary_is_refused(stories, tmp_path):
    tokenizer = train_tokenizer(stories, model_type="bpe", remove_extra_whitespaces=True)
    with pytest.raises(ValueError, match=r"normalizes text before tokenization.*train_vocab"):
        exported(tmp_path, random_model(), tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="mistral"), "a model of type 'mistral', not llama"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (dict(attention_bias=True), "attention_bias=True is not supported"),
        (dict(mlp_bias=True), "mlp_bias=True is not supported"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(head_dim=32), "head_dim=32"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope scaling of type 'yarn'"),
        (dict(rope_parameters={"rope_type": "llama3", "factor": 4.0}), "low_freq_factor"),
        (dict(hidden_size=None), "no hidden_size"),
        (dict(num_hidden_layers=3), "model.layers.2.* is missing"),
        (dict(num_hidden_layers=1), "model.layers.1.* is not a tensor of the Llama"),
        (dict(num_hidden_layers=2**30), "model.layers.2.* is missing"),
        (dict(hidden_size=2**30, head_dim=None), "do not fit the model"),
        (dict(vocab_size=511), "do not fit the model: tok_embeddings.weight"),
        (dict(max_position_embeddings=2**30), "at most 1048576 positions"),
        (dict(num_attention_heads=5, head_dim=None), "n_heads=5: must divide dim=48"),
        (dict(rms_norm_eps="tiny"), "not the configuration of a Llama"),
        (dict(tie_word_embeddings=False), "lm_head.weight is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_another_architecture_is_refused_by_name(changes, message, tokenizer, tmp_path):
    path = exported(tmp_path, random_model(), tokenizer)
    file = tmp_path / "exported" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"exported.*{message}"):
        open_model(path)


@pytest.mark.parametrize(
    "rope", [dict(rope_parameters=None), dict(rope_theta=None, rope_scaling=None)]
)
def test_rope_settings_of_either_transformers_version_are_sufficient(rope, tokenizer, tmp_path):
    path = exported(tmp_path, random_model(**LLAMA3), tokenizer)
    file = tmp_path / "exported" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | rope))
    args = open_model(path).args
    assert (args.rope_theta, args.rope_scaling) == (LLAMA3["rope_theta"], LLAMA3["rope_scaling"])


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_loading_a_pickle_runs_no_code(tokenizer, tmp_path):
    path = exported(tmp_path, random_model(), tokenizer)
    folder = tmp_path / "exported"
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile(tmp_path / "touched")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: damaged or not a checkpoint"):
        open_model(path)
    assert not (tmp_path / "touched").exists()


def test_a_shard_outside_the_folder_is_refused(tokenizer, tmp_path):
    path = exported(tmp_path, random_model(), tokenizer)
    folder = tmp_path / "exported"
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    weight_map = {"model.norm.weight": "../elsewhere.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"elsewhere\.safetensors is missing"):
        open_model(path)


def small_llama3() -> Llama3Tokenizer:
    """A tokenizer of bytes, some longer tokens and Llama 3's special tokens."""
    words = [
        "th",
        "he",
        "the",
        " t",
        " the",
        "in",
        "ing",
        "er",
        "\n\n",
        " a",
        "an",
        " an",
        "and",
        " and",
        "  ",
        "12",
    ]
    return Llama3Tokenizer(
        [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    )


def test_transformers_tokenizes_as_a_llama_3_tokenizer(stories, tmp_path):
    tokenizer = small_llama3()
    model = random_model(vocab_size=tokenizer.vocab_size, **LLAMA3)
    path = exported(tmp_path, model, tokenizer)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for text in [*stories[:50], "naïve 🦙 <|eot_id", "1234567", " \n\n \t x", ""]:
        ids = tokenizer.encode(text)
        assert hf_tokenizer.encode(text) == [tokenizer.bos_id, *ids]
        assert hf_tokenizer.decode(ids) == tokenizer.decode(ids) == text
    messages = [
        ("system", "Be brief."),
        ("user", " Hello, the llama! "),
        ("assistant", "Hi."),
        ("user", "Bye"),
    ]
    chat = [{"role": role, "content": text} for role, text in messages]
    ids = hf_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode_chat(messages)
    assert hugging_face.read_tokenizer(path).hash == tokenizer.hash
    (tmp_path / "exported" / "tokenizer.model").unlink()
    again = hugging_face.read_tokenizer(path)
    assert again.hash == tokenizer.hash and again.special == tokenizer.special


def train_tokenizer(stories, **options) -> SentencePieceTokenizer:
    content = io.BytesIO()
    defaults = dict(
        normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories),
        model_writer=content,
        vocab_size=512,
        minloglevel=2,
        **defaults | options,
    )
    return SentencePieceTokenizer(content.getvalue())


def test_a_unigram_vocabulary_is_refused(stories, tmp_path):
    tokenizer = train_tokenizer(stories, model_type="unigram")
    with pytest.raises(ValueError, match="not a byte-pair encoding"):
        exported(tmp_path, random_model(), tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer\.bin is read as byte-pair encoding"):
        tokenizer.to_bin()
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_without_dummy_prefix_is_exported(stories, tmp_path):
    tokenizer = train_tokenizer(stories, model_type="bpe", add_dummy_prefix=False)
    path = exported(tmp_path, random_model(), tokenizer)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    (tmp_path / "exported" / "tokenizer.model").unlink()
    again = hugging_face.read_tokenizer(path)
    for text in stories[:20]:
        ids = tokenizer.encode(text)
        assert hf_tokenizer.encode(text, add_special_tokens=False) == again.encode(text) == ids
        assert hf_tokenizer.decode(ids) == tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="begin a text with a space"):
        tokenizer.to_bin()


def test_custom_special_tokens_are_preserved_or_refused(tmp_path):
    base = small_llama3()
    tokenizer = Llama3Tokenizer(base.ranks, [*base.special[:-1], "<|im_end|>"])
    model = random_model(vocab_size=tokenizer.vocab_size, **LLAMA3)
    path = exported(tmp_path, model, tokenizer)
    assert (
        tokenizer.hash != base.hash
        and open_model(path).read_tokenizer().special == tokenizer.special
    )
    for target in ("ckpt", "meta"):
        with pytest.raises(ValueError, match="cannot store special tokens other than"):
            write_model(from_model(model, tokenizer=tokenizer), str(tmp_path / "m"), target)


def test_an_instruct_model_keeps_the_vocabulary_of_llama_3(tmp_path):
    """Its tokenizer_config.json names <|eot_id|> as the end, but the vocabulary is the same."""
    tokenizer = small_llama3()
    path = exported(tmp_path, random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    (tmp_path / "exported" / "tokenizer.model").unlink()
    file = tmp_path / "exported" / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {"eos_token": "<|eot_id|>"}
    file.write_text(json.dumps(content), encoding="utf-8")
    again = hugging_face.read_tokenizer(path)
    assert isinstance(again, Llama3Tokenizer) and again.hash == tokenizer.hash


@pytest.mark.parametrize("change", ["normalizer", "prefix", "digits", "merges"])
def test_tokenizer_json_with_another_algorithm_is_followed(change, tmp_path):
    tokenizer = small_llama3()
    path = exported(tmp_path, random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    (tmp_path / "exported" / "tokenizer.model").unlink()
    file = tmp_path / "exported" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    steps = content["pre_tokenizer"]["pretokenizers"]
    if change == "normalizer":
        content["normalizer"] = {"type": "Lowercase"}
    elif change == "prefix":
        steps[1]["add_prefix_space"] = True
    elif change == "digits":
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    else:
        content["model"]["merges"].reverse()
    file.write_text(json.dumps(content), encoding="utf-8")
    again = hugging_face.read_tokenizer(path)
    assert again.hash != tokenizer.hash
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for text in ("Once upon a Time", "in 1234", "the thing and another"):
        assert again.encode(text) == hf_tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
            "its decoder WordPiece",
        ),
        ({"decoder": None}, "no decoder"),
        ({"model": {"type": "Unigram", "vocab": {}, "merges": []}}, "type Unigram; only BPE"),
        ({"pre_tokenizer": {"type": "New"}}, "the tokenizers library cannot read it"),
        ({"model": None}, "not a tokenizer.json"),
    ],
)
def test_an_unsupported_tokenizer_json_is_refused_by_name(change, message, tmp_path):
    tokenizer = small_llama3()
    path = exported(tmp_path, random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    (tmp_path / "exported" / "tokenizer.model").unlink()
    file = tmp_path / "exported" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["merges"].reverse()
    content["added_tokens"] = [] if change.get("model") else content["added_tokens"]
    file.write_text(json.dumps(content | change), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        hugging_face.read_tokenizer(path)
