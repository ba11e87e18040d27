"""
What a Hugging Face folder says of its model besides weights and vocabulary.

The ids of special tokens are in generation_config.json, config.json and, as names, in
tokenizer_config.json. A chat template is in chat_template.jinja or tokenizer_config.json, the
license and the name in the front matter of README.md (the model card).
"""

import contextlib
import json
import os
import re
from collections.abc import Callable
from typing import Any

from formats import tokenizer_json
from formats.lazy_model import one_line, read_json
from formats.model_metadata import (
    DEFAULT_TEMPLATE,
    ModelMetadata,
    chat_templates,
    token_id,
    token_ids,
)
from textdata.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
MODEL_CARD = "README.md"
# Keys of the model card, and their fields in ModelMetadata
CARD_KEYS = {
    "license": "license",
    "license_name": "license_name",
    "license_link": "license_link",
    "model_name": "name",
}
# Keys of generation_config.json that are not defaults of generation
OTHER_KEYS = (
    "_from_model_config",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
LEGAL_FILES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.(txt|md))?", re.IGNORECASE)


# Reading


def read_metadata(
    path: str, config: dict[str, Any], read_tokenizer: Callable[[], Tokenizer | None]
) -> ModelMetadata:
    """The metadata of a folder. Raises ValueError if one of its files is damaged.

    Generation stops where transformers stops, at eos_token_id of generation_config.json or, without
    that, of config.json, and at the tokenizer's eos_token, which ends the turns of a chat.

    Args:
        path: the folder.
        config: the content of its config.json.
        read_tokenizer: returns its tokenizer, for the ids of names in a folder without
            tokenizer.json.
    """
    generation = read_optional_json(path, "generation_config.json")
    tokenizer_config = read_optional_json(path, "tokenizer_config.json")
    content = read_optional_json(path, "tokenizer.json")
    try:
        names = TokenNames(tokenizer_config, content, read_tokenizer)
        stop_ids = token_ids(generation.get("eos_token_id"), "eos_token_id")
        stop_ids = stop_ids or token_ids(config.get("eos_token_id"), "eos_token_id")
        ids = {
            name: names.id_of(f"{name}_token", generation, config) for name in ("bos", "eos", "pad")
        }
        own_eos = names.id_of("eos_token")
        added = find_added_tokens(content, tokenizer_config)
        return ModelMetadata(
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            pad_id=ids["pad"],
            stop_ids=tuple(dict.fromkeys([*stop_ids, *([] if own_eos is None else [own_eos])])),
            add_bos=added[0],
            add_eos=added[1],
            chat_templates=read_chat_templates(path, tokenizer_config),
            generation={key: value for key, value in generation.items() if key not in OTHER_KEYS},
            unread=tuple(sorted(filter(LEGAL_FILES.fullmatch, os.listdir(path)))),
            **read_model_card(path),
        )
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(one_line(f"{path}: {error}")) from None


def read_optional_json(path: str, name: str) -> dict[str, Any]:
    """The content of a JSON file of the folder, empty if there is no such file."""
    file = os.path.join(path, name)
    return read_json(file) if os.path.isfile(file) else {}


class TokenNames:
    """The ids of the tokens that tokenizer_config.json names."""

    def __init__(
        self,
        tokenizer_config: dict[str, Any],
        content: dict[str, Any],
        read_tokenizer: Callable[[], Tokenizer | None],
    ) -> None:
        self.tokenizer_config = tokenizer_config
        self.read_tokenizer = read_tokenizer
        self.ids: dict[str, Any] = {}
        vocabulary = content.get("model", {}).get("vocab")
        if isinstance(vocabulary, dict):
            self.ids |= vocabulary
        decoder = tokenizer_config.get("added_tokens_decoder") or {}
        self.ids |= {entry["content"]: int(number) for number, entry in decoder.items()}
        self.ids |= {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}

    def id_of(self, key: str, *configs: dict[str, Any]) -> int | None:
        """The id of eos_token, or of another token that tokenizer_config.json names.

        Without that, the first id that one of the other files gives as eos_token_id.
        """
        named = self.tokenizer_config.get(key)
        name = named.get("content") if isinstance(named, dict) else named
        if isinstance(name, str):
            if not self.ids:
                self.ids = self._ids_of_tokenizer()
            if name in self.ids:
                return token_id(self.ids[name], f"the id of {key}")
        for config in configs:
            if ids := token_ids(config.get(f"{key}_id"), f"{key}_id"):
                return ids[0]
        return None

    def _ids_of_tokenizer(self) -> dict[str, Any]:
        """The ids of all tokens, empty if there is no tokenizer or it cannot be read."""
        try:
            tokenizer = self.read_tokenizer()
        except ValueError:  # whoever needs the tokenizer reports it
            return {}
        names = tokenizer_json.token_names(tokenizer) if tokenizer else []
        return {name: number for number, name in enumerate(names)}


def find_added_tokens(
    content: dict[str, Any], tokenizer_config: dict[str, Any]
) -> tuple[bool | None, bool | None]:
    """Whether the tokenizer puts BOS before a text, and EOS after it; None: its files do not say.

    As in transformers 5, the post-processor of tokenizer.json decides if there is one.
    """
    processor = content.get("post_processor")
    if processor is not None:
        return special_tokens_around(processor)
    named = [tokenizer_config.get(key) for key in ("add_bos_token", "add_eos_token")]
    default = False if content else None
    add_bos, add_eos = (value if isinstance(value, bool) else default for value in named)
    return add_bos, add_eos


def special_tokens_around(processor: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a post-processor puts a special token before a text, and one after it."""
    if processor.get("type") == "Sequence":
        found = [special_tokens_around(step) for step in processor.get("processors") or []]
        return any(before for before, _ in found), any(after for _, after in found)
    is_special = ["SpecialToken" in item for item in processor.get("single") or []]
    if False not in is_special:
        return False, False
    position = is_special.index(False)
    return position > 0, any(is_special[position:])


def read_chat_templates(path: str, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name. Files with them replace those of tokenizer_config.json."""
    templates = {}
    folder = os.path.join(path, TEMPLATE_FOLDER)
    files = {DEFAULT_TEMPLATE: os.path.join(path, TEMPLATE_FILE)}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if name.endswith(".jinja"):
            files[name.removesuffix(".jinja")] = os.path.join(folder, name)
    for name, file in files.items():
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as text:
                templates[name] = text.read()
    return templates or chat_templates(tokenizer_config.get("chat_template"), "chat_template")


def read_model_card(path: str) -> dict[str, str]:
    """License and name in the front matter of README.md: the fields of CARD_KEYS that it has."""
    file = os.path.join(path, MODEL_CARD)
    if not os.path.isfile(file):
        return {}
    with open(file, encoding="utf-8", errors="replace") as text:
        lines = text.read(1 << 16).splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found = {}
    for line in lines[1:]:
        key, colon, value = line.partition(":")
        if line.strip() == "---":
            break
        if colon and key in CARD_KEYS and value.strip():
            found[CARD_KEYS[key]] = parse_card_value(value.strip())
    return found


def parse_card_value(value: str) -> str:
    """A value of the model card without its quotes, which may be those of a JSON string."""
    if value.startswith('"'):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value.strip("'\"")


# Writing


def to_model_card(metadata: ModelMetadata) -> str:
    """The content of README.md, empty if the model has neither license nor name.

    The values are JSON strings, which are YAML, so that no value begins another line.
    """
    values = {key: getattr(metadata, field) for key, field in CARD_KEYS.items()}
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in values.items() if value]
    return "".join(["---\n", *lines, "---\n"]) if lines else ""


def is_generated_card(path: str) -> bool:
    """Whether a file has no more than to_model_card writes, so that an export may replace it."""
    if not os.path.isfile(path) or os.path.getsize(path) > 1 << 12:
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines()
    return all(line == "---" or line.partition(":")[0] in CARD_KEYS for line in lines)


def to_tokenizer_config(
    metadata: ModelMetadata, tokenizer: Tokenizer, max_seq_len: int
) -> dict[str, Any]:
    """The content of tokenizer_config.json.

    The class is PreTrainedTokenizerFast: with LlamaTokenizer, transformers 5 replaces the
    normalizer of tokenizer.json by its own.
    """
    names = tokenizer_json.token_names(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        config["unk_token"] = tokenizer_json.unknown_token(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        config["unk_token"] = tokenizer.description["model"].get("unk_token")
    ids = {"bos": metadata.bos_id, "eos": metadata.eos_id, "pad": metadata.pad_id}
    for key, number in ids.items():
        if number is not None and number < len(names):
            config[f"{key}_token"] = names[number]
    flags = {"add_bos_token": metadata.add_bos, "add_eos_token": metadata.add_eos}
    config |= {key: value for key, value in flags.items() if value is not None}
    templates = metadata.chat_templates
    if set(templates) == {DEFAULT_TEMPLATE}:
        config["chat_template"] = templates[DEFAULT_TEMPLATE]
    elif templates:
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    return config


def to_post_processor(metadata: ModelMetadata, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The post-processor of tokenizer.json, which puts BOS and EOS around a text."""
    names = tokenizer_json.token_names(tokenizer)
    bos = metadata.bos_id if metadata.add_bos is not False else None
    eos = metadata.eos_id if metadata.add_eos else None
    around = [number if number is None or number < len(names) else None for number in (bos, eos)]
    if around == [None, None]:
        return None
    pieces: list[list[dict[str, Any]]] = []
    for type_id, text in enumerate("AB"):
        before, after = (
            [] if number is None else [{"SpecialToken": {"id": names[number], "type_id": type_id}}]
            for number in around
        )
        pieces.append([*before, {"Sequence": {"id": text, "type_id": type_id}}, *after])
    return {
        "type": "TemplateProcessing",
        "single": pieces[0],
        "pair": pieces[0] + pieces[1],
        "special_tokens": {
            names[number]: {"id": names[number], "ids": [number], "tokens": [names[number]]}
            for number in around
            if number is not None
        },
    }
