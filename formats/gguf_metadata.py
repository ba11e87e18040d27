"""
What a GGUF file says of its model besides weights and vocabulary: the ids of special tokens, chat
templates, defaults of sampling, name and license.

llama.cpp ends a text at eos_token_id, eot_token_id and eom_token_id, and at tokens with well-known
names. ollama reads a list, eos_token_ids.
"""

import json
from collections.abc import Sequence
from typing import Any

from formats.gguf_file import BOOL, FLOAT32, INT32, UINT32, MetadataValue, TypedValue
from formats.model_metadata import (
    DEFAULT_TEMPLATE,
    ModelMetadata,
    chat_templates,
    token_id,
    token_ids,
)

PREFIX = "tokenizer.ggml."
STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
STOP_LIST_KEY = f"{PREFIX}eos_token_ids"
# llama.cpp ends a text at tokens with these names (llama-vocab.cpp).
STOP_NAMES = {
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<EOT>",
    "_<EOT>",
}
# tokenizer.ggml.pre of the byte-level vocabularies that begin a text with BOS by default
LLAMA3_PRE_TOKENIZERS = ("llama-bpe", "llama3", "llama-v3")
TEMPLATE_KEY = "tokenizer.chat_template"
GENERATION_KEY = "cria.generation_config"  # this project's key: generation_config.json
# Name of a sampling default in generation_config.json, name and type in GGUF
SAMPLING_KEYS = {
    "temperature": ("general.sampling.temp", FLOAT32),
    "top_k": ("general.sampling.top_k", INT32),
    "top_p": ("general.sampling.top_p", FLOAT32),
    "min_p": ("general.sampling.min_p", FLOAT32),
    "repetition_penalty": ("general.sampling.penalty_repeat", FLOAT32),
}
LICENSE_KEYS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
# Keys under general. that describe the file, not the model
FILE_KEYS = (
    "architecture",
    "alignment",
    "file_type",
    "quantization_version",
    "name",
    "type",
    "size_label",
)


# Reading


def parse_metadata(metadata: dict[str, Any], path: str) -> ModelMetadata:
    """The ModelMetadata of a file's metadata. Raises ValueError if a value has the wrong type."""
    try:
        return ModelMetadata(
            bos_id=parse_id(metadata, f"{PREFIX}bos_token_id"),
            eos_id=parse_id(metadata, f"{PREFIX}eos_token_id"),
            pad_id=parse_id(metadata, f"{PREFIX}padding_token_id"),
            stop_ids=parse_stop_ids(metadata),
            add_bos=parse_add_bos(metadata),
            add_eos=parse_flag(metadata, f"{PREFIX}add_eos_token"),
            chat_templates=parse_templates(metadata),
            generation=parse_generation(metadata),
            name=parse_text(metadata, "general.name"),
            license=parse_text(metadata, LICENSE_KEYS["license"]),
            license_name=parse_text(metadata, LICENSE_KEYS["license_name"]),
            license_link=parse_text(metadata, LICENSE_KEYS["license_link"]),
            unread=unread_keys(metadata),
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; it is damaged") from None


def parse_stop_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """The tokens where llama.cpp ends a text, or those of a list if the file has one."""
    if STOP_LIST_KEY in metadata:
        return token_ids(metadata[STOP_LIST_KEY], STOP_LIST_KEY)
    ids = [parse_id(metadata, f"{PREFIX}{key}") for key in STOP_KEYS]
    names = metadata.get(f"{PREFIX}tokens")
    if isinstance(names, list) and ids != [None] * len(ids):
        ids += [number for number, name in enumerate(names) if name in STOP_NAMES]
    return token_ids(ids, "stop ids")


def parse_id(metadata: dict[str, Any], key: str) -> int | None:
    """A token id, None if it is missing. Raises ValueError for another type."""
    return token_id(metadata.get(key), key)


def parse_flag(metadata: dict[str, Any], key: str) -> bool | None:
    """A value that is true or false, None if it is missing."""
    value = metadata.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key} is neither true nor false")
    return value


def parse_add_bos(metadata: dict[str, Any]) -> bool | None:
    """Whether a prompt begins with BOS, by default as in llama.cpp; None without a vocabulary."""
    add_bos = parse_flag(metadata, f"{PREFIX}add_bos_token")
    model = metadata.get(f"{PREFIX}model")
    if add_bos is not None or model not in ("llama", "gpt2"):
        return add_bos
    return model == "llama" or metadata.get(f"{PREFIX}pre") in LLAMA3_PRE_TOKENIZERS


def parse_text(metadata: dict[str, Any], key: str) -> str:
    """A text, empty if it is missing. Raises ValueError for another type."""
    value = metadata.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{key} is not a text")
    return value


def parse_templates(metadata: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name."""
    templates = {
        key.removeprefix(f"{TEMPLATE_KEY}."): value
        for key, value in metadata.items()
        if key.startswith(f"{TEMPLATE_KEY}.")
    }
    if metadata.get(TEMPLATE_KEY):
        templates = {DEFAULT_TEMPLATE: metadata[TEMPLATE_KEY]} | templates
    return chat_templates(templates, TEMPLATE_KEY)


def parse_generation(metadata: dict[str, Any]) -> dict[str, Any]:
    """The defaults of generation, with the names of generation_config.json."""
    if text := parse_text(metadata, GENERATION_KEY):
        generation = json.loads(text)
        if not isinstance(generation, dict):
            raise ValueError(f"{GENERATION_KEY} is not a JSON object")
        return generation
    found = {name: metadata[key] for name, (key, _) in SAMPLING_KEYS.items() if key in metadata}
    if not all(type(value) in (int, float) for value in found.values()):
        raise ValueError("a value of general.sampling is not a number")
    return {"do_sample": True, **found} if found else {}


def unread_keys(metadata: dict[str, Any]) -> tuple[str, ...]:
    """The keys about the model, such as its author, that no other format receives."""
    known = {f"general.{name}" for name in FILE_KEYS} | {*LICENSE_KEYS.values()}
    known |= {key for key, _ in SAMPLING_KEYS.values()}
    return tuple(sorted(key for key in metadata if key.startswith("general.") and key not in known))


# Writing


def to_metadata(metadata: ModelMetadata) -> dict[str, MetadataValue]:
    """The metadata of a file."""
    ids = {"bos": metadata.bos_id, "padding": metadata.pad_id}
    written: dict[str, MetadataValue] = {
        f"{PREFIX}{name}_token_id": TypedValue(UINT32, number)
        for name, number in ids.items()
        if number is not None
    }
    written[f"{PREFIX}add_bos_token"] = TypedValue(BOOL, metadata.add_bos is not False)
    written[f"{PREFIX}add_eos_token"] = TypedValue(BOOL, bool(metadata.add_eos))
    for name, key in LICENSE_KEYS.items():
        if text := getattr(metadata, name):
            written[key] = text
    return (
        written
        | to_stop_metadata(metadata)
        | to_template_metadata(metadata.chat_templates)
        | to_generation_metadata(metadata.generation)
    )


def stop_slots(metadata: ModelMetadata) -> tuple[dict[str, int], list[int]]:
    """The stop ids by key, for llama.cpp, and those that find no key."""
    eos_id = metadata.eos_id if metadata.eos_id in metadata.stop_ids else None
    order = [eos_id] if eos_id is not None else []
    others = [number for number in metadata.stop_ids if number != eos_id]
    # BOS comes last: only models that are trained on texts in a row end with it.
    order += sorted(others, key=lambda number: number == metadata.bos_id)
    slots = dict(zip(STOP_KEYS, order, strict=False))
    return slots, order[len(STOP_KEYS) :]


def to_stop_metadata(metadata: ModelMetadata) -> dict[str, MetadataValue]:
    """The stop ids: a key for each of the first three, and the list of all."""
    slots, _ = stop_slots(metadata)
    written: dict[str, MetadataValue] = {
        f"{PREFIX}{key}": TypedValue(UINT32, number) for key, number in slots.items()
    }
    if slots:
        written[STOP_LIST_KEY] = TypedValue(INT32, list(metadata.stop_ids))
    return written


def to_template_metadata(templates: dict[str, str]) -> dict[str, MetadataValue]:
    """The chat templates."""
    written: dict[str, MetadataValue] = {}
    others = {name: text for name, text in templates.items() if name != DEFAULT_TEMPLATE}
    if DEFAULT_TEMPLATE in templates:
        written[TEMPLATE_KEY] = templates[DEFAULT_TEMPLATE]
    if others:
        written[f"{TEMPLATE_KEY}s"] = list(others)
        written |= {f"{TEMPLATE_KEY}.{name}": text for name, text in others.items()}
    return written


def to_generation_metadata(generation: dict[str, Any]) -> dict[str, MetadataValue]:
    """The defaults of generation: all as JSON, and those that llama.cpp reads if they apply."""
    if not generation:
        return {}
    written: dict[str, MetadataValue] = {GENERATION_KEY: json.dumps(generation)}
    for name, (key, value_type) in SAMPLING_KEYS.items():
        value: Any = generation.get(name)
        types = (int,) if value_type == INT32 else (int, float)
        if generation.get("do_sample") and type(value) in types and abs(value) < 2**31:
            written[key] = TypedValue(value_type, value)
    return written


def lost_stop_ids(metadata: ModelMetadata, names: Sequence[str]) -> list[str]:
    """The stop ids that llama.cpp does not learn from a file, in words.

    names are those of the tokens: llama.cpp knows some.
    """
    _, others = stop_slots(metadata)
    return [
        f"end of text at token {number} (for llama.cpp)"
        for number in others
        if number >= len(names) or names[number] not in STOP_NAMES
    ]
