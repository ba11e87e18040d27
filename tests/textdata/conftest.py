"""
Fixtures of the tests of text, tokenizers and token shards.
"""

import json
import random

import pytest

from tests.textdata.helpers import (
    VOCAB_SIZE,
    joined_documents,
    write_stories,
    write_token_folder,
)
from textdata.corpus import read_documents

FOREIGN = (
    "Naïve façades – “quoted” … 日本語のテキスト、and 中文; Ελληνικά, Русский, العربية, हिन्दी. "
    "Flags 🇯🇵, a family 👩‍👩‍👧 and a llama 🦙!\tTabs\n\nand  several   spaces    , 1234567890 "
    "e\u0301 \u00a0 \u200b \ufeff {x: [1, 2]} <s> </s> <0x41> \\n \x00 \x7f"
)


@pytest.fixture
def texts_of(tmp_path):
    """texts_of("a.txt", content) writes the file and reads its documents."""

    def write_and_read(name: str, content: str | bytes, **options) -> list[str]:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return joined_documents(read_documents(str(path), **options))

    return write_and_read


def random_slices(text: str, count: int, seed: int) -> list[str]:
    """Parts of the text of 1 to 199 characters."""
    rng = random.Random(seed)
    starts = [rng.randrange(len(text)) for _ in range(count)]
    return [text[start : start + rng.randrange(1, 200)] for start in starts]


@pytest.fixture(scope="session")
def texts(stories) -> list[str]:
    """Random slices of stories and of many scripts, and unusual spaces."""
    odd = ["", " ", "  ", "\n", " a", "  a", "a ", "\n a", "a", "\t", "日", "🦙", " 🦙"]
    slices = random_slices("\n".join(stories), 500, 1) + random_slices(FOREIGN * 3, 500, 2)
    return [*odd, *slices]


@pytest.fixture(scope="session")
def tokenizer_bin(tokenizer, tmp_path_factory) -> str:
    """The path of a tokenizer.bin of the tokenizer."""
    path = tmp_path_factory.mktemp("bin") / "tokenizer.bin"
    path.write_bytes(tokenizer.to_bin())
    return str(path)


@pytest.fixture
def text_folder(tmp_path, stories):
    """A folder with three files of stories: a.txt, b.json and c.jsonl."""
    folder = tmp_path / "texts"
    write_stories(folder / "b.json", stories[100:200])
    (folder / "a.txt").write_text(
        "\n\n\n".join(story.replace("\n\n", "\n") for story in stories[:100])
    )
    (folder / "c.jsonl").write_text(
        "".join(json.dumps({"text": story}) + "\n" for story in stories[200:])
    )
    return folder


@pytest.fixture
def options(text_folder, tokenizer_path):
    """The options of pretokenize that write the tokens of text_folder to out/tok512."""
    return (
        f"--input={text_folder}",
        "--data_dir=out",
        f"--tokenizer={tokenizer_path}",
        f"--vocab_size={VOCAB_SIZE}",
    )


@pytest.fixture
def folder(tmp_path) -> str:
    """Three shards of distinct tokens: 100 to 199, 200 to 204 (less than a window), 300 to 363."""
    shards = [range(100, 200), range(200, 205), range(300, 364)]
    return write_token_folder(tmp_path / "tok", shards)
