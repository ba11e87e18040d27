"""
What the files of a model say of it besides weights and vocabulary: the tokens that end a text, the
chat template, whether prompts begin with BOS, defaults of generation, name and license.

Each reader fills a ModelMetadata. Each writer stores it or names what it cannot store; model.bin
and Meta's folders store nothing of it.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.untrusted import clip
from textdata.tokenizer import Llama3Tokenizer, Tokenizer

MAX_TOKEN_ID = 2**31 - 1
DEFAULT_TEMPLATE = "default"  # the name of a model's only chat template
LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class ModelMetadata:
    """What the files of a model say of it. None, empty: they do not say it."""

    bos_id: int | None = None
    eos_id: int | None = None  # the token that chat templates call eos_token
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()  # tokens that end a generated text
    add_bos: bool | None = None  # whether a prompt begins with BOS
    add_eos: bool | None = None  # whether EOS is appended to a text
    chat_templates: dict[str, str] = field(default_factory=dict)  # Jinja, by name
    generation: dict[str, Any] = field(default_factory=dict)  # generation_config.json without ids
    name: str = ""
    license: str = ""  # as model cards write it: apache-2.0, llama3.1, other
    license_name: str = ""
    license_link: str = ""
    unread: tuple[str, ...] = ()  # files and keys that are not carried to other formats


# The types of the fields in JSON
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "bos_id": (int, type(None)),
    "eos_id": (int, type(None)),
    "pad_id": (int, type(None)),
    "stop_ids": (list,),
    "add_bos": (bool, type(None)),
    "add_eos": (bool, type(None)),
    "chat_templates": (dict,),
    "generation": (dict,),
    "name": (str,),
    "license": (str,),
    "license_name": (str,),
    "license_link": (str,),
}


# Checks of values that come from a file


def token_id(value: Any, name: str) -> int | None:
    """A token id, None for null and for negative numbers, which mean that there is none.

    Raises ValueError, with the name of the value, for anything else.
    """
    if value is None or (type(value) is int and value < 0):
        return None
    if type(value) is not int or value > MAX_TOKEN_ID:
        raise ValueError(f"{name} is not a token id")
    return value


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """The token ids of a number, a list of numbers or null. Raises ValueError, as token_id."""
    values = value if isinstance(value, list) else [value]
    ids = [token_id(item, name) for item in values]
    return tuple(dict.fromkeys(number for number in ids if number is not None))


def chat_templates(value: Any, name: str) -> dict[str, str]:
    """Chat templates by name, of a template, a dict, or a list of {"name": N, "template": T}.

    Raises ValueError, with the name of the value, for anything else.
    """
    if not value:
        return {}
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if isinstance(value, dict) and all(
        isinstance(item, str) for pair in value.items() for item in pair
    ):
        return value
    raise ValueError(f"{name} is neither a chat template nor a list of named ones")


# Checkpoints hold the metadata as JSON


def to_json(metadata: ModelMetadata) -> str:
    """The metadata as JSON."""
    values = dataclasses.asdict(metadata)
    del values["unread"]
    return json.dumps(values)


def from_json(text: str, path: str) -> ModelMetadata:
    """The metadata of the JSON that a file at path holds. Raises ValueError if it is damaged."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        values = {name: value for name, value in values.items() if name in FIELD_TYPES}
        for name, value in values.items():
            if type(value) not in FIELD_TYPES[name]:
                raise ValueError(f"{name} has the type {type(value).__name__}")
        for name in ("bos_id", "eos_id", "pad_id"):
            values[name] = token_id(values.get(name), name)
        values["stop_ids"] = token_ids(values.get("stop_ids", []), "stop_ids")
        values["chat_templates"] = chat_templates(values.get("chat_templates"), "chat_templates")
        return ModelMetadata(**values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its model_metadata is damaged ({str(error)[:100]})") from None


# Metadata and tokenizer


def complete(metadata: ModelMetadata | None, tokenizer: Tokenizer | None) -> ModelMetadata:
    """The metadata with the ids that only the tokenizer says.

    None means a format without metadata, such as model.bin: a Llama 3 vocabulary then has Llama 3's
    chat template.
    """
    if tokenizer is None:
        return metadata or ModelMetadata()
    eos_id = token_id(tokenizer.eos_id, "eos_id")
    if metadata is None:
        metadata = ModelMetadata(chat_templates=usual_templates(tokenizer))
    others = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    stop_ids = metadata.stop_ids or token_ids([tokenizer.eos_id, *others], "stop_ids")
    if eos_id not in stop_ids:
        eos_id = next(iter(stop_ids), None)
    return dataclasses.replace(
        metadata,
        bos_id=token_id(tokenizer.bos_id, "bos_id") if metadata.bos_id is None else metadata.bos_id,
        eos_id=eos_id if metadata.eos_id is None else metadata.eos_id,
        stop_ids=stop_ids,
    )


def usual_templates(tokenizer: Tokenizer) -> dict[str, str]:
    """Llama 3's chat template for its vocabulary, none for others."""
    if isinstance(tokenizer, Llama3Tokenizer) and "<|eot_id|>" in tokenizer.special:
        return {DEFAULT_TEMPLATE: LLAMA3_CHAT_TEMPLATE}
    return {}


def configure_tokenizer(tokenizer: Tokenizer, metadata: ModelMetadata | None) -> Tokenizer:
    """The tokenizer with the model's stop ids, and with BOS before a prompt if the model has it."""
    if metadata is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    if metadata.stop_ids:
        tokenizer.stop_ids = frozenset(metadata.stop_ids)
    tokenizer.add_bos = metadata.add_bos is not False
    return tokenizer


def fine_tuned(metadata: ModelMetadata | None, tokenizer: Tokenizer) -> ModelMetadata | None:
    """The metadata of a model that is trained further on documents that begin with BOS.

    It learns to end a document with the BOS of the next one, so its texts end there, too.
    """
    if metadata is None or not metadata.stop_ids:
        return metadata
    stop_ids = (*metadata.stop_ids, *sorted({tokenizer.bos_id} - {*metadata.stop_ids}))
    return dataclasses.replace(metadata, stop_ids=stop_ids)


# Formats that cannot store it


def check_plain_format(
    metadata: ModelMetadata, reader_stop_ids: Mapping[int, str], format_name: str
) -> list[str]:
    """The names of what a format without metadata loses.

    Args:
        metadata: of the model, from its files.
        reader_stop_ids: the tokens where readers of the format end a text, each with a remark if
            they do so in some cases only, otherwise an empty string.
        format_name: appears in the message.

    Raises ValueError if no token of the model's ends a text in these readers.
    """
    unknown = [number for number in metadata.stop_ids if number not in reader_stop_ids]
    if metadata.stop_ids and len(unknown) == len(metadata.stop_ids):
        stop_ids = ", ".join(map(str, unknown))
        raise ValueError(
            f"{format_name} cannot store that this model ends a text with token {stop_ids}, so its "
            "readers would not stop; use --format=hf, gguf or ckpt"
        )
    remarks = {number: reader_stop_ids.get(number) for number in metadata.stop_ids}
    lost = [
        f"end of text at token {number}{f' ({remark})' if remark else ''}"
        for number, remark in remarks.items()
        if remark != ""
    ]
    return [*lost, *described(metadata)]


def described(metadata: ModelMetadata) -> list[str]:
    """The names of everything in the metadata but stop ids and those that the tokenizer has."""
    names = ["chat template"] if metadata.chat_templates else []
    # transformers writes switches that are off, and use_cache, for every model.
    defaults = [key for key, value in metadata.generation.items() if value not in (None, False)]
    if defaults := sorted({*defaults} - {"use_cache"}):
        names.append(f"generation defaults ({', '.join(defaults)[:100]})")
    names += ["add_bos_token=false"] if metadata.add_bos is False else []
    names += ["add_eos_token=true"] if metadata.add_eos else []
    names += [] if metadata.pad_id is None else [f"padding token {metadata.pad_id}"]
    for label in ("name", "license", "license_name", "license_link"):
        if text := getattr(metadata, label):
            names.append(f"{label} {clip(text)}")
    return names
