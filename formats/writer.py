"""
Write a model in any format, without overwriting other files.
"""

import os

from formats import ckpt, gguf, llama2c, meta
from formats.lazy_model import LazyModel
from formats.model_metadata import ModelMetadata, complete
from formats.registry import FORMATS, Format
from model import ModelArgs
from runtime.atomic_files import write_atomically
from textdata.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer

SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
SINGLE_FILE_FORMATS: tuple[Format, ...] = (ckpt, gguf, llama2c)
# Formats that need one embedding for each token, and the names of their files
UNPADDED: dict[Format, str] = {llama2c: "model.bin", meta: "params.json"}


def write_model(model: LazyModel, path: str, target: str, dtype: str = "auto") -> list[str]:
    """Write a model atomically, and its tokenizer beside it if the format does not contain it.

    Returns the names of what the files of the model say and the format does not store.

    Args:
        model: the model to write.
        path: the file or folder to write.
        target: the format, as --format names it.
        dtype: as --dtype names it.

    Raises ValueError, before anything is written, if the format cannot store the model or if other
    content is at the path.
    """
    module = next(module for module in FORMATS if target in module.DTYPES)
    if problem := export_problem(module, model.args, model.read_metadata(), model.read_tokenizer()):
        raise ValueError(f"{path}: {problem}")
    dtype = export_dtype(SHORT_DTYPES.get(dtype, dtype), target, module.DTYPES[target], model)
    check_overwrite(path, module)
    lost = list_lost_metadata(model, module)
    files = tokenizer_files(model, path, module)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    module.write(model, path, target, dtype)
    for file, content in files.items():
        write_atomically(file, content)
    return lost


def export_problem(
    module: Format, args: ModelArgs, metadata: ModelMetadata | None, tokenizer: Tokenizer | None
) -> str | None:
    """Why a format cannot store a model with its tokenizer, or None if it can.

    Args:
        module: the format.
        args: of the model.
        metadata: of the model, from its files.
        tokenizer: of the model.
    """
    if reason := module.unsupported_reason(args):
        return reason
    if module in UNPADDED and tokenizer and tokenizer.vocab_size != args.vocab_size:
        return (
            f"readers of {UNPADDED[module]} need one embedding for each token, but this model has "
            f"{args.vocab_size} embeddings and {tokenizer.vocab_size} tokens; "
            "use --format=hf, gguf or ckpt"
        )
    try:
        if metadata:
            module.check_metadata(complete(metadata, tokenizer), tokenizer)
        if module is llama2c and tokenizer:
            tokenizer.to_bin()
    except ValueError as error:
        return str(error)
    return None


def list_lost_metadata(model: LazyModel, module: Format) -> list[str]:
    """The names of what the files of a model say and a format does not store."""
    metadata = model.read_metadata()
    if metadata is None:
        return []
    tokenizer = model.read_tokenizer()
    return [*module.check_metadata(complete(metadata, tokenizer), tokenizer), *metadata.unread]


def export_dtype(requested: str, target: str, supported: tuple[str, ...], model: LazyModel) -> str:
    """The dtype to write.

    auto is the model's dtype, or the first of the format if that is not supported. Raises
    ValueError for a dtype that the format does not support.
    """
    if requested == "auto":
        model_dtype = str(model.dtype).removeprefix("torch.")
        return model_dtype if model_dtype in supported else supported[0]
    if requested not in supported:
        raise ValueError(f"--dtype={requested}: {target} is written in {' or '.join(supported)}")
    return requested


def check_overwrite(path: str, module: Format) -> None:
    """Raise ValueError if a path is taken.

    Only an older model of the same format is overwritten. A checkpoint never is, because it may
    contain the state of a training run.
    """
    if module in SINGLE_FILE_FORMATS and (os.path.isdir(path) or path.endswith(os.sep)):
        raise ValueError(f"{path}: is a folder; name a file to write")
    if os.path.islink(path.rstrip(os.sep)):
        raise ValueError(f"{path}: is a link; name the file or folder itself")
    if is_empty(path) or (module is not ckpt and is_model(path, module)):
        return
    if os.path.isdir(path):
        raise ValueError(
            f"{path}: contains other files than a model of this format; "
            "name a new or an empty folder"
        )
    raise ValueError(
        f"{path}: exists already and would be lost; write elsewhere, or remove it first"
    )


def is_empty(path: str) -> bool:
    """Whether a path does not exist, or is an empty file or folder."""
    if not os.path.exists(path):
        return True
    if os.path.isdir(path):
        return not os.listdir(path)
    return os.path.isfile(path) and os.path.getsize(path) == 0


def is_model(path: str, module: Format) -> bool:
    """Whether a path is a model of a format that can be read."""
    try:
        if not module.matches(path):
            return False
        module.read(path)
        return True
    except (ValueError, OSError):
        return False


def tokenizer_files(model: LazyModel, path: str, module: Format) -> dict[str, bytes]:
    """Paths and contents of the tokenizer's files to write beside a model.

    Empty if the format contains the tokenizer, if the model has none or if it is already there.
    Raises ValueError if another tokenizer is there, because readers would use it for this model.
    """
    if module not in (ckpt, llama2c):
        return {}
    tokenizer = model.read_tokenizer()
    folder = os.path.dirname(path)
    for name in TOKENIZER_FILES:
        existing = os.path.join(folder, name)
        if not os.path.lexists(existing):
            continue
        if tokenizer is None:
            raise ValueError(
                f"{existing}: may be another model's; "
                "name this one's with --tokenizer, or write elsewhere"
            )
        if load_tokenizer(existing).hash != tokenizer.hash:
            raise ValueError(f"{existing}: is another model's; write elsewhere")
    if tokenizer is None:
        return {}
    files = tokenizer.files if module is ckpt else {"tokenizer.bin": tokenizer.to_bin()}
    paths = {os.path.join(folder, name): content for name, content in files.items()}
    return {file: content for file, content in paths.items() if not os.path.exists(file)}
