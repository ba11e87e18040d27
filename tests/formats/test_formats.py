"""
Every format: a model round-trips through it and converts to any other; and the command export.py.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import weakref

import pytest
import torch

from checkpoints.file import load_checkpoint, save_checkpoint, write_model_args
from formats import ckpt, gguf, hugging_face, llama2c, meta
from formats.lazy_model import LazyModel, LazyTensor, from_model
from formats.registry import FORMATS, detect_format, open_model
from formats.writer import write_model
from generation.engine import generate_tokens
from model import ModelArgs, parameter_shapes
from ops.rope import RopeScaling
from tests.helpers import LLAMA3, model_logits, random_model

TARGETS = [name for module in FORMATS for name in module.DTYPES]
EXACT = [name for name in TARGETS if name != "v2"]  # not quantized by default
UNRESTRICTED = [name for name in TARGETS if name[0] != "v"]  # any rope_theta and dtype


def round_trip(target, folder, model, tokenizer, dtype="auto") -> LazyModel:
    """The model, written to a format and opened again."""
    path = os.path.join(folder, f"model.{target}")
    write_model(from_model(model, tokenizer=tokenizer), path, target, dtype)
    return open_model(path)


def same_args(a: ModelArgs, b: ModelArgs) -> bool:
    """Whether two ModelArgs describe the same architecture, perhaps by different fields."""
    effective = (
        "ffn_dim",
        "kv_heads",
        "dim",
        "n_layers",
        "n_heads",
        "vocab_size",
        "norm_eps",
        "rope_theta",
        "rope_scaling",
        "max_seq_len",
        "tie_embeddings",
    )
    return all(getattr(a, name) == getattr(b, name) for name in effective)


@pytest.mark.parametrize("hidden_dim", [96, 100, 33])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("target", EXACT)
def test_a_model_round_trips_bit_for_bit(target, n_kv_heads, tied, hidden_dim, tokenizer, tmp_path):
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tied, hidden_dim=hidden_dim)
    again = round_trip(target, tmp_path, model, tokenizer)
    state, state_again = model.state_dict(), again.load().state_dict()
    assert list(state) == list(state_again)
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert torch.equal(
        model_logits(model), model_logits(open_model(again.path, max_seq_len=160).load())
    )
    expected = model.args if target != "meta" else dataclasses.replace(model.args, max_seq_len=4096)
    assert same_args(again.args, expected)
    assert again.read_tokenizer().hash == tokenizer.hash


@pytest.mark.parametrize("hidden_dim", [96, 100, 33])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("target", ["v2", "gguf"])
def test_quantization_error_is_at_most_half_a_step(
    target, n_kv_heads, tied, hidden_dim, tokenizer, tmp_path
):
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tied, hidden_dim=hidden_dim)
    again = round_trip(target, tmp_path, model, tokenizer, "q8_0").load()
    group = llama2c.group_size_for(model.args) if target == "v2" else 32
    for name, weight in model.named_parameters():
        read = again.get_parameter(name)
        if weight.dim() == 1:
            assert torch.equal(weight, read)
        elif weight.shape[1] % group:  # GGUF stores such rows in float16
            assert target == "gguf" and torch.equal(weight.half().float(), read)
        else:
            step = weight.reshape(-1, group).abs().amax(dim=1, keepdim=True) / 127
            rounding = 1 + 2**-11 if target == "gguf" else 1 + 2**-20  # of the scale
            assert ((weight - read).abs().reshape(-1, group) <= step / 2 * rounding).all()
    assert (model_logits(model) - model_logits(again)).abs().max() < 0.2


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("first, second", [*itertools.permutations(UNRESTRICTED, 2)])
def test_a_llama_3_converts_from_every_format_to_every_other(
    first, second, tied, tokenizer, tmp_path
):
    model = random_model(n_kv_heads=2, tie_embeddings=tied, **LLAMA3)
    between = round_trip(first, tmp_path, model, tokenizer)
    write_model(between, str(tmp_path / "end"), second)
    end = open_model(str(tmp_path / "end"), max_seq_len=160)
    assert same_args(end.args, model.args) and end.read_tokenizer().hash == tokenizer.hash
    assert torch.equal(model_logits(end.load()), model_logits(model))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("target", UNRESTRICTED)
def test_half_precision_is_preserved_and_rounds_once(target, dtype, tokenizer, tmp_path):
    model = random_model(n_kv_heads=2)
    again = round_trip(target, tmp_path, model, tokenizer, dtype)
    assert again.dtype == getattr(torch, dtype)
    for name, weight in model.named_parameters():
        is_float32 = target == "gguf" and weight.dim() == 1
        expected = weight if is_float32 else weight.to(again.dtype).float()
        assert torch.equal(again.load().get_parameter(name), expected)
    write_model(again, str(tmp_path / "second"), target)
    assert open_model(str(tmp_path / "second")).dtype == again.dtype


@pytest.mark.parametrize(
    "scaling", [RopeScaling("linear", 4.0), RopeScaling("llama3", 32.0, 1.0, 4.0, 64)]
)
@pytest.mark.parametrize("target", ["ckpt", "hf", "gguf"])
def test_rope_scaling_round_trips(target, scaling, tokenizer, tmp_path):
    again = round_trip(target, tmp_path, random_model(rope_scaling=scaling), tokenizer)
    assert again.args.rope_scaling == scaling


@pytest.mark.parametrize(
    "target, message, overrides",
    [
        ("v0", "rope_theta=500000", dict(rope_theta=500000.0)),
        ("v1", "norm_eps=1e-06", dict(norm_eps=1e-6)),
        ("v2", "llama3 rope scaling", dict(rope_scaling=RopeScaling("llama3", 8.0))),
        ("meta", "RopeScaling", dict(rope_scaling=RopeScaling("llama3", 32.0))),
        ("meta", "RopeScaling", dict(rope_scaling=RopeScaling("linear", 8.0))),
    ],
)
def test_unsupported_models_are_refused_with_alternatives(
    target, message, overrides, tokenizer, tmp_path
):
    """llama2.c #403: settings that the file cannot store were dropped, and the model ran wrong."""
    with pytest.raises(ValueError, match=rf"{message}.*--format=hf"):
        round_trip(target, tmp_path, random_model(**overrides), tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", TARGETS)
def test_nan_weights_are_written_to_no_format(target, value, tokenizer, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.layers[1].feed_forward.w3.weight[-1, -1] = value
    with pytest.raises(
        ValueError, match=r"layers\.1\.feed_forward\.w3\.weight contains NaN or Inf values"
    ):
        round_trip(target, tmp_path, model, tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", UNRESTRICTED)
def test_weights_too_large_for_float16_are_refused_by_name(target, tokenizer, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.layers[0].attention.wo.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"too large for float16; use --dtype=float32"):
        round_trip(target, tmp_path, model, tokenizer, "float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", TARGETS)
def test_writing_twice_gives_the_same_bytes(target, tokenizer, tmp_path):
    model, written = random_model(n_kv_heads=2), []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        round_trip(target, tmp_path / name, model, tokenizer)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        written.append([(path.relative_to(tmp_path / name), path.read_bytes()) for path in files])
    assert written[0] == written[1]


@pytest.mark.parametrize("target", TARGETS)
def test_exactly_one_format_matches_a_model_by_its_content(target, tokenizer, tmp_path):
    path = round_trip(target, tmp_path, random_model(), tokenizer).path
    os.rename(path, tmp_path / "anything.xyz")
    assert target in detect_format(str(tmp_path / "anything.xyz")).DTYPES
    assert sum(module.matches(str(tmp_path / "anything.xyz")) for module in FORMATS) == 1


def test_parameter_shapes_are_those_of_the_model():
    for tied, n_kv_heads in itertools.product((True, False), (None, 2)):
        model = random_model(tie_embeddings=tied, n_kv_heads=n_kv_heads)
        expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        assert list(parameter_shapes(model.args)) == expected


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_are_read_and_written_one_at_a_time(target, tokenizer, tmp_path):
    """Converting a large model takes the memory of its largest tensor."""
    model, alive, most = random_model(tie_embeddings=False), set(), 0

    class Counted(torch.Tensor):
        pass

    def counting(tensor):
        def read():
            nonlocal most
            copy = tensor.read().clone().as_subclass(Counted)
            number = object()
            alive.add(number)
            weakref.finalize(copy, alive.discard, number)
            most = max(most, len(alive))
            return copy

        return LazyTensor(tensor.shape, tensor.dtype, read)

    source = from_model(model, tokenizer=tokenizer)
    source.tensors = {name: counting(tensor) for name, tensor in source.tensors.items()}
    write_model(source, str(tmp_path / "model"), target)
    assert most == 1


# The command


@pytest.fixture
def workspace(tokenizer, tmp_path, monkeypatch):
    """The working directory, with a training checkpoint and its tokenizer in out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    model = random_model()
    checkpoint = dict(model=model.state_dict(), model_args=write_model_args(model.args), iter_num=3)
    save_checkpoint("out/ckpt.pt", checkpoint | dict(tokenizer_hash=tokenizer.hash, optimizer={}))
    (tmp_path / "out" / "tokenizer.model").write_bytes(tokenizer.content)
    return tmp_path


@pytest.fixture
def run_export(run_script, tmp_path):
    """run_export("model.bin", "--from=x") runs the command in tmp_path: (status, output, error)."""
    return functools.partial(run_script, "export.py", cwd=tmp_path)


@pytest.mark.parametrize(
    "arguments, module",
    [
        (["x.bin"], llama2c),
        (["x.gguf", "--from=out/ckpt.pt", "--dtype=q8_0"], gguf),
        (["x", "--checkpoint=out/ckpt.pt"], hugging_face),
        (["x", "--checkpoint", "out/ckpt.pt", "--version", "-1", "--dtype", "fp16"], hugging_face),
        (["x.bin", "--version", "2", "--checkpoint", "out/ckpt.pt"], llama2c),
        (["x.model", "--format=meta"], meta),
        (["new/x.pt"], ckpt),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_suffix_or_option_determines_the_format_to_write(arguments, module, workspace, run_export):
    status, output, error = run_export(*arguments)
    assert status == 0, error
    assert detect_format(arguments[0]) is module and f"wrote {arguments[0]}" in output
    assert same_args(open_model(arguments[0], max_seq_len=160).args, random_model().args)


def test_the_options_of_llama2c_name_the_input(workspace, run_export):
    assert run_export("m", "--format=meta")[0] == run_export("h", "--format=hf")[0] == 0
    for option in ("--meta-llama", "--hf"):
        source = {"--meta-llama": "m", "--hf": "h"}[option]
        status, _, error = run_export(f"{source}.bin", option, source, "--max_seq_len=160")
        assert status == 0, error
    assert (workspace / "m.bin").read_bytes() == (workspace / "h.bin").read_bytes()


def test_the_tokenizer_is_exported_with_the_model(workspace, run_export, tokenizer):
    assert run_export("c/x.bin")[0] == 0
    assert (workspace / "c" / "tokenizer.bin").read_bytes() == tokenizer.to_bin()
    assert run_export("h", "--from=c/x.bin")[0] == 0
    assert (workspace / "h" / "tokenizer.json").exists()
    assert run_export("d/x.pt", "--from=h")[0] == 0
    assert (
        open_model("d/x.pt").read_tokenizer().hash
        == open_model("d/x.pt").tokenizer_hash
        == tokenizer.hash
    )


def test_another_models_tokenizer_is_neither_used_nor_overwritten(workspace, run_export, shared):
    other = shared("models/tok512.bin")
    with open(other, "rb") as file:
        (workspace / "tokenizer.bin").write_bytes(file.read())
    status, _, error = run_export("x.bin")
    assert (
        status == 1
        and "tokenizer.bin: is another model's" in error
        and not (workspace / "x.bin").exists()
    )
    status, _, error = run_export("y", f"--tokenizer={other}")
    assert status == 1 and "is not the tokenizer that" in error and not (workspace / "y").exists()
    os.remove("out/tokenizer.model")
    (workspace / "out" / "tokenizer.bin").write_bytes((workspace / "tokenizer.bin").read_bytes())
    status, output, _ = run_export("y")
    assert (
        status == 0
        and "note: the tokenizer beside" in output
        and not (workspace / "y" / "tokenizer.json").exists()
    )


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ([], 2, "say what to write"),
        (["x.bin", "--from=nowhere.pt"], 1, "nowhere.pt: there is no such file or folder"),
        (["x.bin", "--from=notes.txt"], 1, "notes.txt: not a model"),
        (["x.bin", "--from=out"], 1, "out: a folder without config.json"),
        (["out/ckpt.pt"], 2, "out/ckpt.pt: is also the input"),
        (["notes.txt", "--format=v0"], 1, "notes.txt: exists already and would be lost"),
        (["full", "--format=hf"], 1, "full: contains other files than a model"),
        (["full", "--format=gguf"], 1, "full: is a folder; name a file"),
        ([".", "--format=hf"], 1, ".: contains other files than a model"),
        (["x.xyz"], 2, "x.xyz: the suffix names no format; choose one with --format="),
        (["x.bin", "--format=gguf", "--version=0"], 2, "--version=0 is --format=v0, not gguf"),
        (["x.bin", "--from=a", "--checkpoint=b"], 2, "name one model to read"),
        (["x.bin", "--dtype=q8_0"], 1, "--dtype=q8_0: v0 is written in float32"),
        (["x.bin", "--version=3"], 2, "--version=3: must be one of -1, 0, 1, 2 or None"),
        (["x.gguf", "--from=bare/ckpt.pt"], 1, "reads no GGUF file without a vocabulary"),
        (["x.bin", "--tokenizer=notes.txt"], 1, "notes.txt: neither a SentencePiece model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_prints_one_line_and_changes_nothing(
    arguments, status, message, workspace, run_export
):
    (workspace / "notes.txt").write_text("Buy milk.\n" * 10)
    (workspace / "full").mkdir()
    (workspace / "full" / "thesis.tex").write_text("42")
    (workspace / "bare").mkdir()
    (workspace / "bare" / "ckpt.pt").write_bytes((workspace / "out" / "ckpt.pt").read_bytes())
    before = {path: path.is_file() and path.read_bytes() for path in workspace.rglob("*")}
    ended, _, error = run_export(*arguments)
    assert (ended, len(error.splitlines())) == (status, 1) and message in error
    assert {path: path.is_file() and path.read_bytes() for path in workspace.rglob("*")} == before


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["x.bin"], 2, "x.bin: with --training_state=True it must end in .pt (one file) or .dcp"),
        (["out/best.pt"], 2, "out/best.pt: exists already"),
        (["out/ckpt.pt"], 2, "out/ckpt.pt: is also the input"),
        (["x.pt", "--format=ckpt", "--dtype=float16"], 2, "omit --format, --dtype"),
        (["x.pt", "--version=0"], 2, "does not convert the model: omit --version"),
        (["x.pt", "--tokenizer=t", "--max_seq_len=8"], 2, "omit --tokenizer, --max_seq_len"),
        (["x.dcp", "--from=nowhere.pt"], 1, "nowhere.pt: there is no checkpoint here"),
        (["x.dcp", "--from=out/tokenizer.model"], 1, "out/tokenizer.model: damaged or not a"),
        (["x.dcp", "--from=out"], 1, "out: is a folder, not a checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_state_is_refused_where_it_would_be_lost(
    arguments, status, message, workspace, run_export
):
    (workspace / "out" / "best.pt").write_bytes(b"")
    before = {path: path.is_file() and path.read_bytes() for path in workspace.rglob("*")}
    ended, _, error = run_export(*arguments, "--training_state=True")
    assert ended == status and message in error, error
    assert len(error.splitlines()) == 1 + (arguments == ["out/ckpt.pt"])  # it also exists already
    assert {path: path.is_file() and path.read_bytes() for path in workspace.rglob("*")} == before


def test_training_state_converts_to_a_sharded_checkpoint_and_back(workspace, run_export):
    status, output, error = run_export("new/x.dcp", "--training_state=True")
    assert status == 0 and "wrote new/x.dcp, the training state of step 3" in output, error
    assert run_export("y.pt", "--from=new/x.dcp", "--training_state=True")[0] == 0
    before, after = load_checkpoint("out/ckpt.pt"), load_checkpoint("y.pt")
    assert before.keys() == after.keys() and after["iter_num"] == 3 and after["optimizer"] == {}
    assert all(torch.equal(after["model"][name], w) for name, w in before["model"].items())


@pytest.mark.parametrize("target", ["hf", "meta"])
def test_an_exported_folder_is_replaced_as_a_whole(target, workspace, run_export):
    assert run_export("folder", f"--format={target}")[0] == 0
    before = sorted(os.listdir("folder"))
    assert run_export("folder", f"--format={target}", "--dtype=float16")[0] == 0
    assert sorted(os.listdir("folder")) == before and open_model("folder").dtype == torch.float16
    assert sorted(os.listdir()) == ["folder", "out"]


@pytest.mark.parametrize("target", ["v0", "v1", "v2", "gguf"])
def test_an_exported_file_is_replaced(target, workspace, run_export):
    (workspace / "x").mkdir()
    assert run_export("x/model", f"--format={target}")[0] == 0
    assert run_export("x/model", f"--format={target}", "--max_seq_len=32")[0] == 0
    assert open_model("x/model").args.max_seq_len == 32


@pytest.mark.parametrize("target", TARGETS)
def test_sample_generates_the_same_text_from_every_format(target, run_script, tokenizer, tmp_path):
    model = random_model(n_kv_heads=2)
    path = round_trip(target, tmp_path, model, tokenizer).path
    result = run_script(
        "sample.py", f"--init_from={path}", "--temperature=0", "--max_new_tokens=30", "--start=Once"
    )
    assert result.returncode == 0, result.stderr
    if target in EXACT:
        prompt = tokenizer.encode("Once", bos=True)
        options = dict(stop_ids=tokenizer.stop_ids, max_new_tokens=30, temperature=0)
        tokens = prompt + generate_tokens(model, prompt, **options)
        assert result.stdout.strip().endswith(tokenizer.decode(tokens).strip())


@pytest.mark.parametrize("target", ["v2", "hf", "gguf"])
def test_training_starts_from_the_weights_of_every_format(
    target, run_script, data_dir, tokenizer, tmp_path
):
    path = round_trip(target, tmp_path, random_model(n_kv_heads=2), tokenizer).path
    options = [
        "--batch_size=2",
        "--gradient_accumulation_steps=1",
        "--eval_iters=1",
        "--compile=False",
    ]
    options += [
        f"--data_dir={data_dir}",
        "--out_dir=run",
        "--max_iters=2",
        "--learning_rate=0",
        "--dtype=float32",
    ]
    options += ["--weight_decay=0", "--max_seq_len=32"]
    result = run_script("train.py", f"--init_from={path}", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    trained, origin = open_model(str(tmp_path / "run" / "ckpt.pt")), open_model(path)
    assert trained.args.max_seq_len == 32 and trained.args.kv_heads == 2
    assert all(torch.equal(trained.read(name), origin.read(name)) for name in origin.names())
    refused = run_script("train.py", f"--init_from={path}", "--dim=64", *options, cwd=tmp_path)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert f"--dim=64: {path} has dim=48" in refused.stderr


def test_training_refuses_data_of_another_tokenizer(run_script, data_dir, shared, tmp_path):
    """llama2.c #263: the wrong tokenizer for a model."""
    path = shared("models/stories260K.bin")
    (tmp_path / "model.bin").write_bytes(open(path, "rb").read())
    (tmp_path / "tokenizer.bin").write_bytes(open(shared("models/tok512.bin"), "rb").read())
    result = run_script("train.py", "--init_from=model.bin", f"--data_dir={data_dir}", cwd=tmp_path)
    assert result.returncode == 1 and "was trained with another tokenizer" in result.stderr


def test_numbers_in_config_json_are_exact(tokenizer, tmp_path):
    model = random_model(norm_eps=1.1e-6, rope_theta=12345.678)
    round_trip("hf", tmp_path, model, tokenizer)
    config = json.loads((tmp_path / "model.hf" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1.1e-6
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 12345.678


@pytest.mark.parametrize("target", ["v0", "v2", "hf", "gguf", "ckpt", "meta"])
def test_a_model_replaced_while_reading_is_refused(target, tokenizer, tmp_path):
    """train.py replaces out/model.bin while sample.py reads it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source = round_trip(target, tmp_path / "a", random_model(), tokenizer)
    other = round_trip(target, tmp_path / "b", random_model(rope_theta=10000.0), tokenizer)
    source.read("norm.weight")
    os.rename(source.path, tmp_path / "old")
    os.rename(other.path, source.path)
    with pytest.raises(ValueError, match="was changed while it was read; run again"):
        source.load()


def test_files_added_during_an_export_are_not_lost(workspace):
    """The folder is checked again before it is replaced."""
    source = open_model("out/ckpt.pt")
    write_model(source, "folder", "hf")
    first = next(iter(source.tensors))
    tensor = source.tensors[first]

    def read():
        (workspace / "folder" / "thesis.tex").write_text("42")
        return tensor.read()

    source.tensors[first] = LazyTensor(tensor.shape, tensor.dtype, read)
    with pytest.raises(ValueError, match=r"holds other things \(thesis\.tex\)"):
        write_model(source, "folder", "hf")
    assert (workspace / "folder" / "thesis.tex").read_text() == "42" and sorted(os.listdir()) == [
        "folder",
        "out",
    ]


@pytest.mark.parametrize("content", ["tokens", "magic alone", "a link", "a folder in the folder"])
def test_files_that_only_look_like_models_are_not_overwritten(content, workspace, run_export):
    target = {
        "tokens": "x.bin",
        "magic alone": "x.gguf",
        "a link": "x.bin",
        "a folder in the folder": "x",
    }[content]
    if content == "tokens":
        torch.tensor([45, 12, 900, 14] * 100, dtype=torch.int32).numpy().tofile(target)
    elif content == "magic alone":
        (workspace / target).write_bytes(b"GGUF, my notes")
    elif content == "a link":
        os.symlink("elsewhere.bin", target)
    else:
        (workspace / "x" / "config.json").mkdir(parents=True)
    status, _, error = run_export(target)
    assert (
        status == 1 and len(error.splitlines()) == 1 and error.startswith(f"export.py: {target}: ")
    )
    assert os.path.lexists(target) and not os.path.exists("tokenizer.bin")


def test_fine_tuning_into_the_folder_of_the_model_is_refused(run_script, data_dir, workspace):
    before = (workspace / "out" / "ckpt.pt").read_bytes()
    result = run_script(
        "train.py",
        "--init_from=out/ckpt.pt",
        "--out_dir=out",
        f"--data_dir={data_dir}",
        cwd=workspace,
    )
    assert (
        result.returncode == 1 and "--init_from=out/ckpt.pt: is in --out_dir=out" in result.stderr
    )
    assert (workspace / "out" / "ckpt.pt").read_bytes() == before


def test_training_does_not_adopt_a_long_context_silently(run_script, data_dir, tokenizer, tmp_path):
    path = round_trip("hf", tmp_path, random_model(max_seq_len=131072), tokenizer).path
    result = run_script("train.py", f"--init_from={path}", f"--data_dir={data_dir}", cwd=tmp_path)
    assert result.returncode == 1 and "a context of 131072 tokens; give the length" in result.stderr


def test_a_model_without_tokenizer_is_not_written_beside_one(workspace, run_export):
    """sample.py would use the tokenizer that is there."""
    assert run_export("d/a.bin")[0] == 0
    os.remove("out/tokenizer.model")
    status, _, error = run_export("d/b.bin")
    assert (
        status == 1
        and "d/tokenizer.bin: may be another model's" in error
        and not (workspace / "d" / "b.bin").exists()
    )
