"""
What the files of a model say of it, with models that transformers saved: where generation stops,
chat templates, defaults of generation, BOS before a prompt, license.
"""

import dataclasses
import json
import os
import shutil

import gguf as reference
import pytest
import torch
import transformers

from formats import meta
from formats.ckpt import METADATA_KEY
from formats.gguf_file import read_container
from formats.gguf_metadata import parse_metadata
from formats.hugging_face_config import to_config
from formats.hugging_face_metadata import is_generated_card, read_model_card
from formats.lazy_model import LazyModel, from_model
from formats.model_metadata import ModelMetadata, complete, from_json, to_json
from formats.registry import load_model, open_model
from formats.writer import write_model
from generation.streaming import generate
from tests.formats.test_gguf import llama_cpp  # noqa: F401  a fixture
from tests.helpers import random_model, small_llama3_tokenizer, to_transformers
from textdata.tokenizer import Tokenizer
from training.resume import StartPoint
from training.setup import start_metadata

PROMPT = "Once upon a time"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
DEFAULTS = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}
MAX_NEW_TOKENS = 40


class SavedModel:
    """A folder that transformers saved: an untied model and its tokenizer."""

    def __init__(self, folder, tokenizer: Tokenizer, added: tuple[str, ...] = ()) -> None:
        self.path = str(folder / "saved")
        vocabulary = str(folder / "vocabulary")
        model = random_model(vocab_size=tokenizer.vocab_size, dim=16)
        write_model(from_model(model, tokenizer=tokenizer), vocabulary, "hf")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(vocabulary)
        self.tokenizer.chat_template = None
        self.tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
        size = tokenizer.vocab_size + len(added)
        self.model = to_transformers(random_model(vocab_size=size, tie_embeddings=False))
        self.model.generation_config = transformers.GenerationConfig()
        self.model.config.eos_token_id = None

    def completion(self, **options) -> list[int]:
        """The greedy completion of PROMPT in transformers."""
        inputs = self.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        options |= {"do_sample": False, "repetition_penalty": 1.0}
        with torch.no_grad():
            output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **options)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    def likely_tokens(self) -> list[int]:
        """The distinct tokens of the completion from the fourth on, latest first."""
        tokens = self.completion(eos_token_id=-1)
        first_positions = dict.fromkeys(tokens)
        return [token for token in reversed(first_positions) if tokens.index(token) > 3]

    def save(self, **files: dict | None) -> str:
        """Save the folder, then change files: config=dict(eos_token_id=2) adds to config.json."""
        self.model.save_pretrained(self.path)
        self.tokenizer.save_pretrained(self.path)
        for name, changes in files.items():
            change_json(os.path.join(self.path, f"{name}.json"), changes)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(self.path)
        return self.path


def change_json(path: str, changes: dict | None) -> None:
    """Add to a JSON file, or remove it."""
    if changes is None:
        os.remove(path)
        return
    with open(path, encoding="utf-8") as file:
        content = json.load(file) | changes
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)


def completion(path: str, tokenizer: str = "", **options) -> list[int]:
    """cria's greedy completion of PROMPT with a model."""
    model, loaded = load_model(path, tokenizer)
    options |= {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
    chunks = list(generate(model, loaded, [PROMPT], **options))
    return [chunk.token for chunk in chunks if chunk.token is not None]


def without_last(tokens: list[int]) -> list[int]:
    """The completion without the stop token, which cria leaves out."""
    assert len(tokens) < MAX_NEW_TOKENS, "the completion must end before the limit"
    return tokens[:-1]


def exported(path: str, tmp_path, target: str) -> str:
    """The path of a model, exported to a format."""
    suffix = {"ckpt": "/ckpt.pt", "gguf": ".gguf", "v0": "/model.bin"}.get(target, "")
    output = str(tmp_path / f"as-{target}{suffix}")
    write_model(open_model(path), output, target)
    return output


@pytest.fixture
def saved(tokenizer, tmp_path) -> SavedModel:
    return SavedModel(tmp_path, tokenizer)


def end_turns_with_the_last_token(saved: SavedModel) -> None:
    """Make <|im_end|>, the last token, a likely one that ends the texts of the model."""
    likely = saved.likely_tokens()[-1]
    with torch.no_grad():
        saved.model.lm_head.weight[-1] = 1.5 * saved.model.lm_head.weight[likely]
    saved.tokenizer.eos_token = "<|im_end|>"
    saved.tokenizer.chat_template = TEMPLATE
    saved.model.config.eos_token_id = saved.tokenizer.eos_token_id


@pytest.fixture
def chat_model(tokenizer, tmp_path) -> SavedModel:
    """A model with two added tokens. One ends the turns of a chat, where transformers stops."""
    saved = SavedModel(tmp_path, tokenizer, ("<|im_start|>", "<|im_end|>"))
    end_turns_with_the_last_token(saved)
    saved.model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=[saved.tokenizer.eos_token_id, 2], pad_token_id=0, **DEFAULTS
    )
    return saved


@pytest.fixture
def llama3_model(tmp_path) -> SavedModel:
    """A Llama 3 vocabulary with the tokens of another chat format."""
    saved = SavedModel(tmp_path, small_llama3_tokenizer(), ("<|im_start|>", "<|im_end|>"))
    end_turns_with_the_last_token(saved)
    saved.model.generation_config = transformers.GenerationConfig(
        eos_token_id=saved.tokenizer.eos_token_id
    )
    return saved


# Where generation stops


def test_config_json_alone_decides_the_stop_token(saved):
    """Generation went on past the model's own end token: only </s> of the vocabulary ended it."""
    stop = saved.likely_tokens()[0]
    path = saved.save(config=dict(eos_token_id=stop), generation_config=None)
    saved.model.generation_config.eos_token_id = stop
    assert completion(path) == without_last(saved.completion())


def test_any_of_several_stop_ids_ends_the_text(saved):
    """Of a list in generation_config.json, no token was read."""
    late, early, *_ = saved.likely_tokens()
    path = saved.save(generation_config=dict(eos_token_id=[2, late, early]))
    assert completion(path) == without_last(saved.completion())


def test_generation_config_goes_before_config_json(saved):
    late, early, *_ = saved.likely_tokens()
    path = saved.save(config=dict(eos_token_id=early), generation_config=dict(eos_token_id=late))
    assert completion(path) == without_last(saved.completion())


def test_the_eos_token_of_the_tokenizer_ends_a_text(chat_model):
    """Files of a chat model often give </s> as eos_token_id, but its turns end with <|im_end|>."""
    path = chat_model.save(config=dict(eos_token_id=2), generation_config=dict(eos_token_id=2))
    expected = chat_model.completion(eos_token_id=[2, chat_model.tokenizer.eos_token_id])
    assert completion(path) == without_last(expected)


@pytest.mark.parametrize("target", ["hf", "gguf", "ckpt"])
def test_a_chat_model_stops_where_transformers_stops(target, chat_model, tmp_path):
    """An added token ended no text: chatml2."""
    path = chat_model.save()
    expected = without_last(chat_model.completion())
    assert completion(path) == expected
    assert completion(exported(path, tmp_path, target)) == expected


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_a_llama_3_chat_model_stops_where_transformers_stops(target, llama3_model, tmp_path):
    """An added token ended no text, and the exports had <|end_of_text|>: chatml3."""
    path = llama3_model.save()
    expected = without_last(llama3_model.completion())
    assert completion(path) == expected
    assert completion(exported(path, tmp_path, target)) == expected


def test_transformers_stops_at_the_same_token_after_an_export(chat_model, tmp_path):
    path = chat_model.save()
    expected = without_last(chat_model.completion())
    output = exported(path, tmp_path, "hf")
    chat_model.model = transformers.AutoModelForCausalLM.from_pretrained(output)
    chat_model.tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert without_last(chat_model.completion()) == expected


def test_llama_cpp_stops_at_the_same_token(chat_model, llama_cpp, tmp_path):  # noqa: F811
    path = chat_model.save()
    expected = without_last(chat_model.completion())
    _, tokenizer = load_model(path)
    answer = llama_cpp(exported(path, tmp_path, "gguf"))(
        "completion",
        prompt=tokenizer.encode_prompt(PROMPT),
        n_predict=MAX_NEW_TOKENS,
        temperature=0,
        repeat_penalty=1,
        return_tokens=True,
    )
    assert [token for token in answer["tokens"] if token not in tokenizer.stop_ids] == expected


def test_a_trained_model_still_ends_at_bos_and_eos(tokenizer, tmp_path):
    """Documents follow each other in training, so a trained model ends a text with BOS."""
    model = from_model(random_model(), tokenizer=tokenizer)
    write_model(model, str(tmp_path / "hf"), "hf")
    write_model(model, str(tmp_path / "model.gguf"), "gguf")
    for path in (tmp_path / "hf", tmp_path / "model.gguf"):
        assert load_model(str(path))[1].stop_ids == {tokenizer.bos_id, tokenizer.eos_id}


@pytest.mark.parametrize("value", ["</s>", [2, "</s>"], 1.5, True, {"id": 2}, 2**40])
def test_a_stop_id_of_another_type_is_refused(value, saved):
    path = saved.save()
    change_json(os.path.join(path, "generation_config.json"), dict(eos_token_id=value))
    with pytest.raises(ValueError, match="saved: eos_token_id is not a token id"):
        load_model(path)


def test_a_gguf_file_of_another_program_stops_as_llama_cpp(chat_model, tmp_path):
    """llama.cpp's converter writes eos_token_id only; llama.cpp knows <|im_end|> by its name."""
    metadata = dataclasses.replace(
        open_model(chat_model.save()).read_metadata(), stop_ids=(2,), eos_id=2
    )
    model = dataclasses.replace(open_model(chat_model.path), read_metadata=lambda: metadata)
    path = str(tmp_path / "model.gguf")
    write_model(model, path, "gguf")
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:  # without the list of stop ids
        file.write(
            content.replace(b"tokenizer.ggml.eos_token_ids", b"tokenizer.ggml.xxx_token_ids")
        )
    assert set(open_model(path).read_metadata().stop_ids) == {2, chat_model.tokenizer.eos_token_id}


@pytest.mark.parametrize(
    "model, pre, add_bos",
    [
        ("llama", "default", True),
        ("llama", None, True),
        ("gpt2", "llama-bpe", True),
        ("gpt2", "llama-v3", True),
        ("gpt2", "gpt-2", False),
        ("gpt2", "smollm", False),
        ("gpt2", None, False),
        ("no_vocab", None, None),
    ],
)
def test_bos_without_a_key_is_as_in_llama_cpp(model, pre, add_bos):
    """Every prompt began with BOS if a file did not say otherwise."""
    metadata = {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre}
    assert parse_metadata(metadata, "model.gguf").add_bos is add_bos
    for given in (True, False):
        metadata["tokenizer.ggml.add_bos_token"] = given
        assert parse_metadata(metadata, "model.gguf").add_bos is given


def test_more_than_three_stop_ids_in_gguf_are_named(tokenizer, tmp_path):
    """llama.cpp has three keys for the end of a text; cria reads them all from a list."""
    metadata = ModelMetadata(stop_ids=(2, 300, 301, 302, 303))
    model = dataclasses.replace(
        from_model(random_model(), tokenizer=tokenizer), read_metadata=lambda: metadata
    )
    path = str(tmp_path / "model.gguf")
    assert write_model(model, path, "gguf") == [
        "end of text at token 302 (for llama.cpp)",
        "end of text at token 303 (for llama.cpp)",
    ]
    assert open_model(path).read_metadata().stop_ids == (2, 300, 301, 302, 303)


# What every format keeps


def comparable(path: str) -> dict:
    """The metadata of a model that every format must keep."""
    values = dataclasses.asdict(open_model(path).read_metadata())
    return {name: value for name, value in values.items() if name not in ("name", "unread")}


@pytest.mark.parametrize("targets", [("hf",), ("gguf",), ("ckpt",), ("gguf", "ckpt", "hf", "gguf")])
def test_metadata_survives_every_format(targets, chat_model, tmp_path):
    """A template was dropped, generation defaults and the license, too: c8."""
    path = chat_model.save()
    with open(os.path.join(path, "README.md"), "w", encoding="utf-8") as file:
        file.write("---\nlanguage: en\nlicense: apache-2.0\ntags:\n- x\n---\n# A model\n")
    expected = comparable(path)
    assert expected["chat_templates"] == {"default": TEMPLATE}
    assert (expected["license"], expected["generation"]["top_p"]) == ("apache-2.0", 0.8)
    assert expected["stop_ids"] == (513, 2) and expected["pad_id"] == 0
    for number, target in enumerate(targets):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = exported(path, folder, target)
    assert comparable(path) == expected


def with_metadata(tokenizer: Tokenizer, **values) -> LazyModel:
    """A small model whose files say this."""
    metadata = ModelMetadata(**values)
    model = from_model(random_model(), tokenizer=tokenizer)
    return dataclasses.replace(model, read_metadata=lambda: metadata)


@pytest.mark.parametrize(
    "name", ["Tiny model", "A: b", 'say "a"', "#1", "a\nlicense: mit", "true", "Straße 😀"]
)
def test_the_name_survives_a_hugging_face_folder(name, tokenizer, tmp_path):
    """GGUF to Hugging Face to GGUF lost general.name; a line break began another key."""
    texts = {"name": name, "license": "other", "license_name": name, "license_link": "https://a.b"}
    path = str(tmp_path / "first.gguf")
    assert write_model(with_metadata(tokenizer, **texts), path, "gguf") == []
    for target in ("hf", "gguf"):
        again = open_model(exported(path, tmp_path, target)).read_metadata()
        assert {key: getattr(again, key) for key in texts} == texts
    card = (tmp_path / "as-hf" / "README.md").read_text()
    assert len(card.splitlines()) == 6 and is_generated_card(str(tmp_path / "as-hf" / "README.md"))


@pytest.mark.parametrize("value, expected", [("mit", "mit"), ("'a b'", "a b"), ('"a b"', "a b")])
def test_a_model_card_may_quote_its_values(value, expected, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nmodel_name: {value}\n---\n")
    assert read_model_card(str(tmp_path)) == {"name": expected}


@pytest.mark.parametrize("target", ["v0", "meta"])
def test_plain_formats_name_padding_name_and_license(target, tokenizer, tmp_path):
    """Name, padding token and two parts of the license were lost without a word."""
    texts = {"name": "N", "license": "other", "license_name": "L", "license_link": "K"}
    model = with_metadata(tokenizer, pad_id=0, stop_ids=(1, 2), **texts)
    lost = write_model(model, str(tmp_path / "out" / "m"), target)
    assert lost[1:] == [
        "padding token 0",
        "name N",
        "license other",
        "license_name L",
        "license_link K",
    ]


def test_transformers_reads_everything_from_an_export(chat_model, tmp_path):
    path = exported(chat_model.save(), tmp_path, "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    generation = transformers.GenerationConfig.from_pretrained(path)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<unk>")
    assert (generation.eos_token_id, generation.pad_token_id) == ([513, 2], 0)
    assert DEFAULTS.items() <= generation.to_dict().items()


@pytest.mark.parametrize("target", ["hf", "gguf", "ckpt"])
@pytest.mark.parametrize("post_processor", [True, False])
def test_prompts_begin_with_bos_as_in_transformers(post_processor, target, saved, tmp_path):
    """A model without BOS got one before each prompt, and exports said so."""
    path = saved.save()
    if not post_processor:
        change_json(os.path.join(path, "tokenizer.json"), dict(post_processor=None))
    expected = transformers.AutoTokenizer.from_pretrained(path).encode(PROMPT)
    assert (expected[0] == 1) is post_processor
    output = exported(path, tmp_path, target)
    for folder in (path, output):
        assert load_model(folder)[1].encode_prompt(PROMPT) == expected
    if target == "hf":
        assert transformers.AutoTokenizer.from_pretrained(output).encode(PROMPT) == expected


def test_add_bos_token_decides_without_a_post_processor(saved):
    """LlamaTokenizer of transformers 4 writes this flag."""
    path = saved.save(tokenizer=dict(post_processor=None))
    for add_bos in (True, False):
        change_json(os.path.join(path, "tokenizer_config.json"), dict(add_bos_token=add_bos))
        assert open_model(path).read_metadata().add_bos is add_bos


def test_a_prompt_without_text_begins_with_bos(saved):
    path = saved.save(tokenizer=dict(post_processor=None))
    _, tokenizer = load_model(path)
    assert tokenizer.encode_prompt("") == [tokenizer.bos_id]


@pytest.mark.parametrize("form", ["chat_template.jinja", "tokenizer_config.json", "list"])
def test_a_template_is_read_from_either_file(form, chat_model, tmp_path):
    chat_model.tokenizer.chat_template = "{{ 'first' }}"
    path = chat_model.save()
    expected = {"default": "{{ 'first' }}"}
    if form != "chat_template.jinja":
        os.remove(os.path.join(path, "chat_template.jinja"))
        expected = {"default": "{{ 'a' }}"}
        value: object = "{{ 'a' }}"
        if form == "list":
            value = [{"name": n, "template": f"{{{{ '{n}' }}}}"} for n in ("default", "tool_use")]
            expected = {"default": "{{ 'default' }}", "tool_use": "{{ 'tool_use' }}"}
        change_json(os.path.join(path, "tokenizer_config.json"), dict(chat_template=value))
    assert open_model(path).read_metadata().chat_templates == expected
    for target in ("gguf", "hf"):
        output = exported(path, tmp_path, target)
        assert open_model(output).read_metadata().chat_templates == expected
    theirs = transformers.AutoTokenizer.from_pretrained(output).chat_template
    assert (theirs if form == "list" else {"default": theirs}) == expected


def test_a_model_without_a_template_gets_none(llama3_model, tmp_path):
    """A Llama 3 vocabulary got Llama 3's template, whatever the model's was."""
    llama3_model.tokenizer.chat_template = None
    path = llama3_model.save()
    for target in ("hf", "gguf"):
        output = exported(path, tmp_path, target)
        assert open_model(output).read_metadata().chat_templates == {}


def test_the_gguf_package_reads_the_metadata(chat_model, tmp_path):
    path = exported(chat_model.save(), tmp_path, "gguf")
    fields = reference.GGUFReader(path).fields
    value = lambda key: fields[key].contents()
    assert value("tokenizer.chat_template") == TEMPLATE
    assert value("tokenizer.ggml.eos_token_id") == 513
    assert value("tokenizer.ggml.eot_token_id") == 2
    assert value("tokenizer.ggml.padding_token_id") == 0
    assert value("general.sampling.temp") == pytest.approx(0.7)


def test_what_gguf_says_of_its_author_is_named(chat_model, tmp_path):
    path = exported(chat_model.save(), tmp_path, "gguf")
    with open(path, "rb") as file:
        content = file.read()
    key = b"general.quantization_version"
    with open(path, "wb") as file:
        file.write(content.replace(key, b"general.quantization_verified"[: len(key)]))
    assert write_model(open_model(path), str(tmp_path / "out"), "hf") == [
        "general.quantization_verifie"
    ]


# Formats that cannot store it


@pytest.fixture
def plain_model(saved, tokenizer_path) -> SavedModel:
    """A model with a chat template whose vocabulary every format can store."""
    saved.tokenizer.chat_template = TEMPLATE
    path = saved.save(generation_config=DEFAULTS, tokenizer=dict(post_processor=None))
    shutil.copy(tokenizer_path, path)
    return saved


def change_stop_ids(saved: SavedModel, stop_ids: list[int]) -> None:
    """The model's files name these stop ids only; its tokenizer_config.json names none."""
    config = os.path.join(saved.path, "generation_config.json")
    change_json(config, dict(eos_token_id=stop_ids))
    change_json(os.path.join(saved.path, "tokenizer_config.json"), dict(eos_token=None))


@pytest.mark.parametrize("target", ["v0", "meta"])
def test_what_a_plain_format_loses_is_named(target, plain_model, tmp_path, run_script):
    """One line names the template: readers of model.bin would not use it anyway."""
    change_stop_ids(plain_model, [2, 350])
    options = [f"--from={plain_model.path}", f"--format={target}"]
    result = run_script("export.py", tmp_path / "out" / "m", *options)
    assert result.returncode == 0, result.stderr
    (note,) = [line for line in result.stdout.splitlines() if line.startswith("note:")]
    chat_only = "end of text at token 2 (run.c ends there in chat mode only); "
    assert note == (
        f"note: {target} does not store: {chat_only if target == 'v0' else ''}end of text at token "
        "350; chat template; generation defaults (do_sample, repetition_penalty, temperature, "
        "top_p); add_bos_token=false"
    )


@pytest.mark.parametrize(
    "target, stop_ids, expected",
    [
        ("v0", [1, 2], ["end of text at token 2 (run.c ends there in chat mode only)"]),
        ("v0", [2], ["end of text at token 2 (run.c ends there in chat mode only)"]),
        ("v2", [1], []),
        ("meta", [1, 2], ["end of text at token 1 (Meta's code does not end there)"]),
        ("meta", [1], ["end of text at token 1 (Meta's code does not end there)"]),
        ("meta", [2], []),
    ],
)
def test_stop_ids_that_readers_ignore_are_named(target, stop_ids, expected, plain_model, tmp_path):
    """run.c's samples end at token 1 only, Meta's code at EOS only; the notes said otherwise."""
    change_stop_ids(plain_model, stop_ids)
    lost = write_model(open_model(plain_model.path), str(tmp_path / "out" / "m"), target)
    assert [text for text in lost if text.startswith("end of text")] == expected


def test_llama3_models_stop_at_their_turns_in_metas_code(tmp_path):
    """BOS ends a text of a fine-tuned model, but not in Meta's code."""
    tokenizer = small_llama3_tokenizer()
    ids = (tokenizer.eos_id, tokenizer.special_id("<|eot_id|>"), tokenizer.bos_id)
    metadata = ModelMetadata(stop_ids=ids)
    (lost,) = meta.check_metadata(metadata, tokenizer)
    assert lost == f"end of text at token {ids[2]} (Meta's code does not end there)"


@pytest.mark.parametrize("target", ["v0", "v2", "meta"])
def test_a_plain_format_that_would_never_stop_is_refused(target, plain_model, tmp_path):
    change_stop_ids(plain_model, [350])
    with pytest.raises(ValueError, match="ends a text with token 350, so its readers would not"):
        exported(plain_model.path, tmp_path, target)
    assert not list(tmp_path.glob("as-*/*"))


@pytest.mark.parametrize(
    "ids, expected",
    [
        ({"bos_id": 0, "eos_id": 0, "stop_ids": (0, 2)}, [0, 2]),
        ({"bos_id": 0, "eos_id": 0, "stop_ids": (0,)}, 0),
        ({"bos_id": 1, "eos_id": 2, "stop_ids": (2, 1)}, 2),
        ({"bos_id": 1, "eos_id": 2, "stop_ids": (1,)}, 1),
    ],
)
def test_config_json_keeps_an_eos_that_is_also_bos(ids, expected):
    """SmolLM: <|endoftext|> is BOS and EOS. config.json left it out beside another stop id."""
    config = to_config(random_model().args, "float32", ModelMetadata(**ids))
    assert config["eos_token_id"] == expected


def test_an_edited_model_card_is_not_overwritten(chat_model, tmp_path):
    """An export replaces an older one, but no text that a person wrote."""
    path = chat_model.save()
    with open(os.path.join(path, "README.md"), "w", encoding="utf-8") as file:
        file.write("---\nlicense: mit\n---\nText")
    output = exported(path, tmp_path, "hf")
    assert exported(path, tmp_path, "hf") == output
    with open(os.path.join(output, "README.md"), "a", encoding="utf-8") as file:
        file.write("# My model\n")
    with pytest.raises(ValueError, match=r"holds other things \(README\.md\)"):
        exported(path, tmp_path, "hf")


# Checkpoints and fine-tuning


def test_llama2c_reads_a_checkpoint_with_metadata(chat_model, tmp_path):
    """llama2.c passes model_args to a dataclass that knows its own keys only."""
    path = exported(chat_model.save(), tmp_path, "ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert METADATA_KEY in checkpoint and METADATA_KEY not in checkpoint["model_args"]


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "{",
        "[" * 100_000,
        '{"stop_ids": 2}',
        '{"stop_ids": ["2"]}',
        '{"bos_id": true}',
        '{"chat_templates": {"default": 1}}',
        '{"generation": []}',
        '{"license": null}',
    ],
    ids=lambda content: content[:20],
)
def test_damaged_metadata_in_a_checkpoint_is_refused(content):
    with pytest.raises(ValueError, match=r"ckpt\.pt: its model_metadata is damaged"):
        from_json(content, "ckpt.pt")


def test_metadata_as_json_is_read_back(tokenizer):
    metadata = complete(ModelMetadata(license="mit", generation={"top_k": 5}), tokenizer)
    assert from_json(to_json(metadata), "") == metadata


def test_a_fine_tuned_model_keeps_its_metadata(
    saved, data_dir, tokenizer_path, tmp_path, run_script
):
    """Fine-tuning forgot the template and the end token. Training adds BOS as an end of text."""
    stop = saved.likely_tokens()[0]
    saved.tokenizer.chat_template = TEMPLATE
    path = saved.save(generation_config=dict(eos_token_id=stop))
    shutil.copy(tokenizer_path, path)
    expected = comparable(path)
    expected["stop_ids"] = (stop, 2, 1)
    out_dir = tmp_path / "out"
    options = [f"--out_dir={out_dir}", f"--data_dir={data_dir}", "--vocab_size=512"]
    options += ["--max_seq_len=32", "--batch_size=2", "--gradient_accumulation_steps=1"]
    options += ["--eval_iters=1", "--compile=False", "--device=cpu"]
    first = run_script("train.py", f"--init_from={path}", "--max_iters=1", *options)
    assert first.returncode == 0, first.stderr
    assert comparable(str(out_dir / "ckpt.pt")) == expected
    again = run_script("train.py", "--init_from=resume", "--max_iters=2", *options[:2])
    assert again.returncode == 0, again.stderr
    assert comparable(str(out_dir / "ckpt.pt")) == expected
    assert load_model(str(out_dir / "ckpt.pt"))[1].stop_ids == {stop, 2, 1}


def test_a_resumed_export_also_stops_at_bos(tokenizer, tmp_path):
    """An exported checkpoint that training continues did not get BOS as a stop id."""
    metadata = to_json(ModelMetadata(stop_ids=(2,)))
    start = StartPoint("ckpt.pt", {METADATA_KEY: metadata})
    assert start_metadata(start, tokenizer).stop_ids == (2, 1)
    start.checkpoint[METADATA_KEY] = to_json(start_metadata(start, tokenizer))
    assert start_metadata(start, tokenizer).stop_ids == (2, 1)
    assert start_metadata(StartPoint("ckpt.pt", {}), tokenizer) is None


# Models of neighbouring projects


@pytest.mark.parametrize("name, stop", [("chatml2", 401), ("chatml3", 706), ("c8", 350)])
def test_published_cases_keep_ids_and_template(name, stop, shared, tmp_path):
    path = shared(f"cases/models/{name}")
    expected = open_model(path).read_metadata()
    assert stop in expected.stop_ids and expected.chat_templates["default"]
    for target in ("hf", "gguf"):
        again = open_model(exported(path, tmp_path, target)).read_metadata()
        assert again.stop_ids == expected.stop_ids
        assert again.chat_templates == expected.chat_templates


def test_a_gguf_file_stops_at_its_end_token(shared):
    path = shared("cases/models/e7_eos.gguf")
    metadata, _ = read_container(path)
    assert metadata["tokenizer.ggml.eos_token_id"] in load_model(path)[1].stop_ids
