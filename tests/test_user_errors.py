"""
Mistakes of users. Each ends the script with one clear sentence and a status other than 0, without a
traceback, and changes no file that was there before.
"""

import gc
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers import TINY_RUN
from textdata import download


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    flipped = bytearray(content)
    flipped[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    cut = {"empty": b"", "half": content[:middle], "cut": content[:-5]}
    return cut | {"garbage": b"not a model" * 99, "flip": flipped}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Downloads are tried again at once."""
    monkeypatch.setattr(download, "PAUSE", 0)


@pytest.fixture(scope="module")
def folder(run_script, data_dir, tokenizer_path, tmp_path_factory) -> Path:
    """A folder with a good run, its data, and everything that can be wrong with them."""
    folder = tmp_path_factory.mktemp("errors")
    shutil.copytree(data_dir, folder / "data")
    result = run_script(
        "train.py",
        *TINY_RUN,
        "--max_iters=2",
        f"--data_dir={folder}/data",
        f"--out_dir={folder}/out",
    )
    assert result.returncode == 0, result.stderr
    checkpoint, model = (
        (folder / "out/ckpt.pt").read_bytes(),
        (folder / "out/model.bin").read_bytes(),
    )
    for damage, content in damaged(checkpoint).items():
        (folder / f"ckpt-{damage}").mkdir()
        (folder / f"ckpt-{damage}/ckpt.pt").write_bytes(content)
    for damage, content in damaged(model).items():
        (folder / f"model-{damage}.bin").write_bytes(content)
    (folder / "model-huge.bin").write_bytes(struct.pack("<7i", *[2**31 - 1] * 7) + model[28:])
    (folder / "model-negative.bin").write_bytes(
        struct.pack("<7i", -1, 2, 3, 4, 5, 6, 7) + model[28:]
    )
    (folder / "model-zero.bin").write_bytes(bytes(28) + model[28:])
    other = torch.load(folder / "out/ckpt.pt", weights_only=True) | {"tokenizer_hash": "0" * 64}
    (folder / "stranger").mkdir()
    del other["sha256"]
    torch.save(other, folder / "stranger/ckpt.pt")
    for name, text in {
        "empty.txt": b"",
        "latin1.txt": "Zoë saw a café".encode("latin-1"),
        "broken.json": b'[{"story": "a"}, {"story": "b"',
        "fields.jsonl": b'{"body": "no story here"}\n',
        "notes.md": b"# notes",
        "other.txt": b"A cat sat here. " * 999,
        "short.txt": b"A cat sat.\n\nA dog ran.",
        "config-typo.py": b"batch_size = 2\nbatch_sise = 8\n",
        "config-type.py": b'batch_size = "eight"\n',
        "config-code.py": b"import os\n",
        "config-syntax.py": b"batch_size = = 8\n",
        "bad.model": b"\x00\x01 no tokenizer",
        "tokenizer-512.model": Path(tokenizer_path).read_bytes(),
    }.items():
        (folder / name).write_bytes(text)
    (folder / "empty-folder").mkdir()
    for name in ("data-no-meta", "data-bad-meta", "data-cut-shard", "data-unfinished"):
        shutil.copytree(folder / "data/tok512", folder / name / "tok512")
    (folder / "data-no-meta/tok512/meta.json").unlink()
    (folder / "data-bad-meta/tok512/meta.json").write_text('{"shards": [{}]}')
    unfinished = folder / "data-unfinished/tok512/meta.json"
    unfinished.write_text(unfinished.read_text().replace('"complete": true', '"complete": false'))
    shard = next((folder / "data-cut-shard/tok512").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:100])
    return folder


TRAIN = ("train.py", *TINY_RUN, "--max_iters=2", "--data_dir=data", "--out_dir=new")
RESUME = ("train.py", "--init_from=resume", "--out_dir=out")
PRETOKENIZE = (
    "tinystories.py",
    "pretokenize",
    "--vocab_size=300",
    "--data_dir=made",
    "--num_workers=1",
)
STRANGER = (*PRETOKENIZE, "--input=other.txt", "--data_dir=data")
SAMPLE = ("sample.py", "--out_dir=out", "--max_new_tokens=4")

DAMAGES = ("empty", "half", "cut", "garbage")
ERRORS = [
    # options
    ((*TRAIN, "--batch_sise=8"), "did you mean batch_size?"),
    ((*TRAIN, "--batch_size=eight"), "--batch_size=eight: must be a whole number"),
    ((*TRAIN, "--batch_size=8.5"), "must be a whole number"),
    ((*TRAIN, "--batch_size=0"), "--batch_size=0: must be 1 or more"),
    ((*TRAIN, "--batch_size"), "write options as --batch_size=VALUE"),
    ((*TRAIN, "batch_size=8"), "write options as --batch_size=8"),
    ((*TRAIN, "-batch_size=8"), "write options as --batch_size=8"),
    ((*TRAIN, "--compile=1"), "--compile=1: must be True or False"),
    ((*TRAIN, "--learning_rate=nan"), "--learning_rate=nan: must be a number"),
    ((*TRAIN, "--learning_rate=-1"), "--learning_rate=-1: must be 0 or more"),
    ((*TRAIN, "--min_lr=1"), "--min_lr=1: must not be above"),
    ((*TRAIN, "--beta2=1"), "--beta2=1: must be at least 0 and below 1"),
    ((*TRAIN, "--init_from=gpt2"), "gpt2: there is no such file or folder"),
    ((*TRAIN, "--dtype=float8"), "must be one of auto, float32, bfloat16, float16"),
    ((*TRAIN, "--device=cuda:7"), "no such device"),
    ((*TRAIN, "--device=tpu"), "must be auto, cpu, cuda, cuda:N or mps"),
    ((*TRAIN, "--n_heads=5"), "--n_heads=5: must divide dim=32"),
    ((*TRAIN, "--n_kv_heads=3"), "--n_kv_heads=3: must divide n_heads=4"),
    ((*TRAIN, "--n_heads=32"), "must be even for RoPE"),
    ((*TRAIN, "--dropout=1.5"), "--dropout=1.5: must be at least 0 and below 1"),
    ((*TRAIN, "no-such-config.py"), "no-such-config.py: cannot read this config file"),
    ((*TRAIN, "config-typo.py"), "config-typo.py:2: batch_sise = 8: there is no such option"),
    ((*TRAIN, "config-type.py"), "config-type.py:1: batch_size = 'eight': must be a whole number"),
    ((*TRAIN, "config-code.py"), "config-code.py:1: a config file holds plain assignments only"),
    ((*TRAIN, "config-syntax.py"), "config-syntax.py:1"),
    (("tinystories.py", "pretokenise"), "be one of download, synthesize, train_vocab, pretokenize"),
    # data
    (
        (*TRAIN, "--data_dir=nowhere"),
        "nowhere/tok512: no tokens here; run python tinystories.py pretokenize",
    ),
    ((*TRAIN, "--vocab_size=4096"), "data/tok4096: no tokens here"),
    ((*TRAIN, "--data_dir=data-no-meta"), "no tokens here"),
    ((*TRAIN, "--data_dir=data-bad-meta"), "meta.json is damaged"),
    ((*TRAIN, "--data_dir=data-unfinished"), "has not finished"),
    ((*TRAIN, "--data_dir=data-cut-shard"), "has 100 bytes, not"),
    ((*TRAIN, "--max_seq_len=1000000"), "but one window takes 1000001"),
    ((*TRAIN, "--tokenizer=bad.model"), "bad.model: neither a SentencePiece model"),
    ((*TRAIN, "--tokenizer=nowhere.model"), "nowhere.model: No such file or directory"),
    ((*PRETOKENIZE,), "run python tinystories.py download"),
    ((*PRETOKENIZE, "--input=nowhere"), "nowhere: there is no such file or folder"),
    ((*PRETOKENIZE, "--input=empty-folder"), "empty-folder: no file here ends in .txt"),
    ((*PRETOKENIZE, "--input=notes.md"), "notes.md: give a file that ends in .txt"),
    ((*PRETOKENIZE, "--input=empty.txt"), "there is no text to learn from"),
    ((*PRETOKENIZE, "--input=latin1.txt"), "latin1.txt: not UTF-8 text"),
    ((*PRETOKENIZE, "--input=broken.json"), "broken.json: record 2 is not whole JSON"),
    (
        (*PRETOKENIZE, "--input=fields.jsonl"),
        'fields.jsonl: record 1 has no field "text" or "story" but \'body\'',
    ),
    ((*PRETOKENIZE, "--input=short.txt"), "the largest that works is --vocab_size="),
    ((*PRETOKENIZE, "--vocab_size=100"), "--vocab_size=100: must be at least 260"),
    ((*PRETOKENIZE, "--val_fraction=2"), "must be above 0 and below 1"),
    ((*PRETOKENIZE, "--vocab_source=llama2"), "say where Llama 2's tokenizer.model is"),
    (
        (*PRETOKENIZE, "--input=short.txt", "--tokenizer=tokenizer-512.model"),
        "has 512 tokens, not --vocab_size=300",
    ),
    (
        ("tinystories.py", "download", "--url=http://127.0.0.1:9/x", "--data_dir=made"),
        "tinystories.py synthesize",
    ),
    (("tinystories.py", "synthesize", "--num_stories=0"), "--num_stories=0: must be at least 1"),
    # checkpoints
    ((*RESUME, "--out_dir=nowhere"), "nowhere/ckpt.pt: there is no checkpoint"),
    *(((*RESUME, f"--out_dir=ckpt-{damage}"), "damaged or not a checkpoint") for damage in DAMAGES),
    ((*RESUME, "--dim=64"), "--dim=64: out/ckpt.pt has dim=32"),
    ((*RESUME, "--vocab_size=4096"), "--vocab_size=4096: out/ckpt.pt has vocab_size=512"),
    ((*RESUME, "--out_dir=stranger"), "another tokenizer (hash 000000000000)"),
    # writing
    ((*TRAIN, "--out_dir=notes.md/out"), "Not a directory"),
    (("export.py",), "say what to write"),
    (("export.py", "out/ckpt.pt"), "out/ckpt.pt: is also the input"),
    (("export.py", "out/model.bin", "--checkpoint=out/model.bin"), "is also the input"),
    ((*TRAIN, "--batch_size=9999999999"), "out of memory: halve --batch_size"),
    ((*TRAIN, "--seed=99999999999999999999"), "must be at least 0 and below 2**63"),
    ((*TRAIN, "--out_dir="), "--out_dir= is empty"),
    (
        (*STRANGER, "--tokenizer=tokenizer-512.model", "--vocab_size=512"),
        "holds the tokens of another text",
    ),
    (("export.py", "notes.md/x.bin"), "notes.md: File exists"),
    (("export.py", "x.bin", "--checkpoint=nowhere.pt"), "nowhere.pt: there is no such file"),
    (("export.py", "x.bin", "--checkpoint=notes.md"), "notes.md"),
    # sampling
    ((*SAMPLE, "--out_dir=nowhere"), "there is no such file"),
    ((*SAMPLE, "--init_from=data"), "data: a folder without config.json"),
    *(((*SAMPLE, f"--init_from=model-{damage}.bin"), f"model-{damage}.bin") for damage in DAMAGES),
    *(
        ((*SAMPLE, f"--init_from=model-{damage}.bin"), "not a model; it begins")
        for damage in ("huge", "negative", "zero")
    ),
    ((*SAMPLE, "--tokenizer=bad.model"), "bad.model: neither"),
    ((*SAMPLE, "--start=FILE:nowhere.txt"), "nowhere.txt: No such file or directory"),
    ((*SAMPLE, "--start=FILE:latin1.txt"), "not UTF-8 text"),
    ((*SAMPLE, "--temperature=-1"), "--temperature=-1: must be at least 0 and at most 10000"),
    ((*SAMPLE, "--top_p=0"), "--top_p=0: must be above 0"),
    ((*SAMPLE, "--max_new_tokens=0"), "must be at least 1"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("command", "sentence"), ERRORS, ids=lambda value: " ".join(value[-2:])[:60]
)
def test_a_mistake_ends_with_one_sentence(run_script, folder, command, sentence):
    before = contents(folder / "out") | contents(folder / "data")
    result = run_script(*command, cwd=folder)
    messages = [line for line in result.stderr.splitlines() if line.startswith(command[0])]
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert len(messages) == 1 and sentence in messages[0], result.stderr
    assert "Traceback" not in result.stderr
    assert contents(folder / "out") | contents(folder / "data") == before
    assert not list(folder.rglob("*.partial"))


def test_at_least_sixty_mistakes_are_tried():
    assert len(ERRORS) >= 60


def test_a_flipped_weight_is_loaded_or_refused_but_never_crashes(run_script, folder):
    for command in (
        (*SAMPLE, "--init_from=model-flip.bin", "--tokenizer=out/tokenizer.model"),
        (*RESUME,),
    ):
        result = run_script(*command, "--out_dir=ckpt-flip", cwd=folder)
        assert "Traceback" not in result.stderr and result.returncode in (0, 1)


FORMATS = ("v0", "v1", "hf", "meta", "gguf", "ckpt")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield tmp_path
    gc.collect()  # closes files that the traceback of a failed run still refers to
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    "command",
    [
        (*TRAIN, "--dim=64", "--out_dir={disk}"),
        *(
            ("export.py", "{disk}/model.bin", f"--format={target}", "--checkpoint=big/ckpt.pt")
            for target in FORMATS
        ),
        ("tinystories.py", "synthesize", "--num_stories=2000", "--data_dir={disk}"),
        (
            *PRETOKENIZE,
            "--input=big.txt",
            "--data_dir={disk}",
            "--tokenizer=tokenizer-512.model",
            "--vocab_size=512",
        ),
    ],
    ids=lambda command: command[0] + command[2].partition("=")[2] * (command[0] == "export.py"),
)
def test_a_full_disk_leaves_nothing_half_written(run_script, folder, stories, small_disk, command):
    if not (folder / "big").exists():
        result = run_script(*TRAIN, "--dim=128", "--out_dir=big", cwd=folder)
        assert result.returncode == 0, result.stderr
        (folder / "big.txt").write_text("\n\n".join(stories * 12))
    result = run_script(*(part.format(disk=small_disk) for part in command), cwd=folder)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "No space left on device" in result.stderr or "disk full" in result.stderr
    assert not list(small_disk.rglob("*.partial*")) and not (small_disk / "model.bin").exists()


def test_a_checkpoint_survives_a_disk_that_fills_up(run_script, folder, small_disk):
    """The first checkpoint fits; best.pt and ckpt.pt together do not fit twice."""
    shutil.copy(folder / "out/ckpt.pt", small_disk / "ckpt.pt")
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 8192))
    kept = (small_disk / "ckpt.pt").read_bytes()
    result = run_script(*RESUME, f"--out_dir={small_disk}", "--max_iters=4", cwd=folder)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert (small_disk / "ckpt.pt").read_bytes() == kept


def test_a_second_run_in_the_same_folder_is_refused(run_script, folder):
    from runtime.atomic_files import run_lock

    with run_lock(str(folder / "shared")):
        result = run_script(*TRAIN, "--out_dir=shared", cwd=folder)
    assert result.returncode == 1 and "another process is writing here" in result.stderr
