"""
GGUF files, compared with llama.cpp and with the gguf package.
"""

import math
import struct

import gguf as reference
import numpy as np
import pytest
import requests
import torch

from formats import gguf, gguf_file
from formats.gguf_file import FLOAT32, INT32, UINT32, TypedValue
from formats.lazy_model import expand_layers, from_model
from formats.registry import open_model
from formats.writer import write_model
from generation.engine import generate_tokens
from tests.formats.test_formats import LLAMA3, random_model
from tests.formats.test_hugging_face import random_slices, small_llama3
from textdata.tokenizer import load_tokenizer


@pytest.fixture
def llama_cpp():
    """llama_cpp(path) loads a file in llama.cpp, with a KV cache in float32.

    Returns post(endpoint, **request), which returns the response.
    """
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed")
    servers = []

    def load(path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 512, 1, -1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        server = xllamacpp.Server(params)
        servers.append(server)

        def post(endpoint, **request):
            response = requests.post(
                f"{server.listening_address}/{endpoint}", json=request, timeout=60
            )
            response.raise_for_status()
            return response.json()

        return post

    yield load
    servers.clear()


def published(shared):
    return open_model(shared("models/stories260K.bin"), shared("models/tok512.bin"))


def exported(tmp_path, source, dtype) -> str:
    path = str(tmp_path / f"{dtype}.gguf")
    write_model(source, path, "gguf", dtype)
    return path


def greedy(model, tokenizer, number):
    return generate_tokens(model, [tokenizer.bos_id], max_new_tokens=number, temperature=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_generates_the_same_tokens(dtype, shared, llama_cpp, tmp_path):
    source = published(shared)
    path = exported(tmp_path, source, dtype)
    completion = llama_cpp(path)(
        "completion", prompt=[1], n_predict=200, temperature=0, ignore_eos=True, return_tokens=True
    )
    tokens = greedy(source.load(), source.read_tokenizer(), 200)
    assert greedy(open_model(path).load(), source.read_tokenizer(), 200) == tokens
    assert completion["tokens"] == tokens


def llama_cpp_logprobs(post, tokens: list[int]) -> list[dict[int, float]]:
    """llama.cpp's log-probabilities of the next token after each prefix of tokens."""
    tables = []
    for length in range(1, len(tokens)):
        answer = post(
            "completion",
            prompt=tokens[:length],
            n_predict=1,
            temperature=1,
            n_probs=512,
            samplers=[],
        )
        (choice,) = answer["completion_probabilities"]
        tables.append({entry["id"]: entry["logprob"] for entry in choice["top_logprobs"]})
    return tables


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float16", 0.05), ("q8_0", 0.5)])
def test_llama_cpp_computes_the_same_logprobs(dtype, tolerance, shared, llama_cpp, tmp_path):
    """For 512 tokens at 20 positions. In Q8_0, llama.cpp quantizes the activations too."""
    source = published(shared)
    path = exported(tmp_path, source, dtype)
    tokens = [1, *greedy(source.load(), source.read_tokenizer(), 20)]
    with torch.no_grad():
        expected = open_model(path).load()(torch.tensor([tokens]))[0][0].log_softmax(-1)
    worst = 0.0
    for position, table in enumerate(llama_cpp_logprobs(llama_cpp(path), tokens)):
        assert len(table) > 400
        for token, value in table.items():
            if value > -12:  # llama.cpp leaves out the least likely tokens
                worst = max(worst, abs(expected[position, token].item() - value))
    assert 0 < worst < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tinystories.txt", "tinystories_lowercase.txt"])
def test_llama_cpp_tokenizes_as_sentencepiece(text, shared, llama_cpp, tmp_path):
    source = published(shared)
    post = llama_cpp(exported(tmp_path, source, "q8_0"))
    tokenizer = source.read_tokenizer()
    with open(shared(f"data/{text}"), encoding="utf-8") as file:
        for piece in random_slices(file.read()):
            assert post("tokenize", content=piece, add_special=False, parse_special=False)[
                "tokens"
            ] == (tokenizer.encode(piece))


def test_llama_cpp_tokenizes_with_a_trained_vocabulary_as_cria(
    tokenizer, stories, llama_cpp, tmp_path
):
    post = llama_cpp(
        exported(tmp_path, from_model(random_model(dim=64), tokenizer=tokenizer), "float16")
    )
    for piece in random_slices("\n\n".join(stories), 300):
        assert post("tokenize", content=piece, add_special=False)["tokens"] == tokenizer.encode(
            piece
        )
    assert post("tokenize", content="Once", add_special=True)["tokens"] == tokenizer.encode(
        "Once", bos=True
    )


@pytest.mark.parametrize("extra", [{}, LLAMA3], ids=["plain", "llama3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_llama_cpp_computes_the_same_logprobs_for_every_shape(
    n_kv_heads, tied, extra, llama_cpp, tmp_path
):
    """Errors of the rotary layout and its scaling show at late positions."""
    tokenizer = small_llama3()
    args = dict(
        dim=64,
        hidden_dim=100,
        vocab_size=tokenizer.vocab_size,
        n_kv_heads=n_kv_heads,
        tie_embeddings=tied,
    )
    model = random_model(**args, **extra)
    post = llama_cpp(exported(tmp_path, from_model(model, tokenizer=tokenizer), "float32"))
    tokens = [(7 * i) % 250 for i in range(150)]
    # The server returns no probabilities if the sampled token ends the text.
    request = dict(prompt=tokens, n_predict=1, temperature=1, n_probs=200, samplers=[])
    answers = (post("completion", seed=seed, **request) for seed in range(100))
    answer = next(answer for answer in answers if "completion_probabilities" in answer)
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0][0, -1].log_softmax(-1)
    entries = answer["completion_probabilities"][0]["top_logprobs"]
    assert len(entries) == 200
    assert max(abs(expected[entry["id"]].item() - entry["logprob"]) for entry in entries) < 1e-3


def test_llama_cpp_tokenizes_as_a_llama_3_tokenizer(stories, llama_cpp, tmp_path):
    tokenizer = small_llama3()
    model = random_model(dim=32, vocab_size=tokenizer.vocab_size)
    post = llama_cpp(exported(tmp_path, from_model(model, tokenizer=tokenizer), "float32"))
    for piece in [*random_slices("\n\n".join(stories), 300), "naïve 🦙", "1234567", " \n\n \t x"]:
        assert post("tokenize", content=piece, add_special=False)["tokens"] == tokenizer.encode(
            piece
        )
    chat = (
        "<|start_header_id|>user<|end_header_id|>\n\nthe<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    tokens = post("tokenize", content=chat, add_special=True, parse_special=True)["tokens"]
    assert tokens == tokenizer.encode_chat([("user", "the")])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_the_gguf_package_reads_the_same_tensors(dtype, tokenizer, tmp_path):
    model = random_model(dim=64, hidden_dim=100, n_kv_heads=2, tie_embeddings=False)
    path = exported(tmp_path, from_model(model, tokenizer=tokenizer), dtype)
    tensors = {tensor.name: tensor for tensor in reference.GGUFReader(path).tensors}
    again = open_model(path)
    for name, gguf_name in expand_layers(gguf.TENSOR_NAMES, model.args):
        tensor = tensors.pop(gguf_name)
        values = reference.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, again.read(name).float().numpy())
    assert not tensors


def test_a_file_that_the_gguf_package_wrote_is_read(tokenizer, tmp_path):
    """llama.cpp's converter uses this package, with its own quantization."""
    model, path = random_model(dim=64, hidden_dim=96, n_kv_heads=2), str(tmp_path / "model.gguf")
    writer = reference.GGUFWriter(path, "llama")
    writer.add_context_length(160)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in tokenizer.pieces])
    writer.add_token_scores([score for _, score, _ in tokenizer.pieces])
    writer.add_token_types([piece_type for _, _, piece_type in tokenizer.pieces])
    for name, gguf_name in expand_layers(gguf.TENSOR_NAMES, model.args):
        weight = model.get_parameter(name).detach().numpy()
        if weight.ndim == 2:
            quantized = reference.quants.quantize(weight, reference.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name, quantized, raw_dtype=reference.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = open_model(path)
    assert again.read_tokenizer().hash == tokenizer.hash and again.args.norm_eps == 1e-5
    for name, weight in model.named_parameters():
        assert (again.read(name) - weight).abs().max() <= weight.abs().max() / 127


def test_q8_0_blocks_have_the_bytes_of_the_definition(tokenizer, tmp_path):
    """A float16 scale, then 32 int8; computed here in float64."""
    model = random_model(dim=32, hidden_dim=64)
    path = exported(tmp_path, from_model(model, tokenizer=tokenizer), "q8_0")
    tensor = next(t for t in reference.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    expected = b""
    for block in model.layers[0].feed_forward.w3.weight.detach().double().reshape(-1, 32).tolist():
        scale = float(np.float16(np.float32(max(map(abs, block))) / np.float32(127)))
        expected += struct.pack(
            "<e32b", scale, *(max(-127, min(127, round(value / scale))) for value in block)
        )
    assert tensor.data.tobytes() == expected


def test_weights_too_large_for_a_float16_scale_are_refused(tokenizer, tmp_path):
    model = random_model(dim=64)
    with torch.no_grad():
        model.layers[0].feed_forward.w1.weight[0, 0] = 1e8
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate\.weight has values too large for q8_0"):
        exported(tmp_path, from_model(model, tokenizer=tokenizer), "q8_0")


def header_changed(path, **changes):
    """Replace values in the metadata of a file by values of the same size."""
    content = open(path, "rb").read()
    for key, value in changes.items():
        encoded = gguf_file.pack_string(key.replace("__", "."))
        at = content.index(encoded) + len(encoded)
        old = struct.unpack_from("<I", content, at)[0]
        size = 8 + struct.unpack_from("<Q", content, at + 4)[0]
        if old in gguf_file.SCALAR_LAYOUTS:
            size = struct.calcsize(gguf_file.SCALAR_LAYOUTS[old])
        new = gguf_file.pack_value(value)
        assert len(new) == 4 + size, "a value of another size would change the alignment"
        content = content[:at] + new + content[at + 4 + size :]
    with open(path, "wb") as file:
        file.write(content)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(general__architecture="gptj0"), "architecture 'gptj0', not llama"),
        (dict(llama__block_count=TypedValue(UINT32, 2**30)), r"blk\.2\..* is missing"),
        (dict(llama__block_count=TypedValue(UINT32, 1)), r"blk\.1.* is not a tensor of a Llama"),
        (dict(llama__embedding_length=TypedValue(UINT32, 2**31)), "do not fit|must|dim"),
        (dict(llama__attention__head_count=TypedValue(UINT32, 5)), "n_heads=5: must divide"),
        (dict(llama__rope__dimension_count=TypedValue(UINT32, 8)), "dimension_count is 8"),
        (dict(llama__attention__layer_norm_rms_epsilon=TypedValue(FLOAT32, math.nan)), "norm_eps"),
        (dict(llama__feed_forward_length=TypedValue(UINT32, 7)), "do not fit the model"),
        (dict(general__alignment=TypedValue(UINT32, 33)), "general.alignment=33"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_header_of_another_architecture_is_refused_by_name(changes, message, tokenizer, tmp_path):
    path = exported(tmp_path, from_model(random_model(), tokenizer=tokenizer), "float32")
    header_changed(path, **changes)
    with pytest.raises(ValueError, match=rf"float32\.gguf: .*({message})"):
        open_model(path)


def split_header(path: str, **values) -> str:
    """A GGUF file with these values and no tensors."""
    metadata = {f"split.{key}": value for key, value in values.items()}
    with open(path, "wb") as file:
        file.write(gguf_file.pack_header(metadata, {}))
        gguf_file.pad(file)
    return path


@pytest.mark.parametrize(
    "count",
    ["2", ["x"] * 5, TypedValue(FLOAT32, 2.0), TypedValue(INT32, -2), TypedValue(UINT32, 100_000)],
)
def test_a_damaged_number_of_files_is_refused(count, tmp_path):
    """A text as split.count ended in a traceback."""
    path = split_header(str(tmp_path / "model-00001-of-00002.gguf"), count=count)
    with pytest.raises(ValueError, match=r"split\.count is .*; it is damaged"):
        open_model(path)


def test_the_number_of_tensors_in_a_message_is_clipped(tmp_path):
    """split.tensors.count was printed as it was in the file."""
    name = str(tmp_path / "model-{:05d}-of-00002.gguf")
    for i in range(2):
        values = dict(count=TypedValue(UINT32, 2), no=TypedValue(UINT32, i))
        split_header(name.format(i + 1), **values, **{"tensors.count": "\x1b[31m" * 1000})
    with pytest.raises(ValueError, match="the files have 0 tensors, not '") as error:
        gguf_file.read_split_container(name.format(1))
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_the_vocabulary_of_a_file_is_parsed_once(tokenizer, tmp_path):
    path = exported(tmp_path, from_model(random_model(), tokenizer=tokenizer), "float32")
    model = open_model(path)
    assert model.read_tokenizer() is model.read_tokenizer()


def test_an_unsupported_vocabulary_is_refused_but_the_weights_are_read(tokenizer, tmp_path):
    path = exported(tmp_path, from_model(random_model(), tokenizer=tokenizer), "float32")
    header_changed(path, tokenizer__ggml__model="bert!")
    again = open_model(path)
    with pytest.raises(ValueError, match="a vocabulary of type 'bert!'"):
        again.read_tokenizer()
    assert torch.equal(again.read("norm.weight"), random_model().norm.weight)


def test_a_llama_3_vocabulary_round_trips(tmp_path):
    tokenizer = small_llama3()
    model = random_model(vocab_size=tokenizer.vocab_size, **LLAMA3)
    again = open_model(
        exported(tmp_path, from_model(model, tokenizer=tokenizer), "float16")
    ).read_tokenizer()
    assert again.hash == tokenizer.hash and again.special == tokenizer.special


def test_a_model_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reads no GGUF file without a vocabulary"):
        exported(tmp_path, from_model(random_model()), "float32")
    assert list(tmp_path.iterdir()) == []


def test_the_published_tokenizer_keeps_its_hash(shared, tmp_path):
    source = published(shared)
    again = open_model(exported(tmp_path, source, "q8_0"))
    assert again.read_tokenizer().hash == load_tokenizer(shared("models/tok512.bin")).hash
