"""
What holds for every format: a model comes back from it as it was, on any way from one to another.
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

from checkpoints.file import save_checkpoint, write_model_args
from export import write_model
from formats import ckpt, gguf, hugging_face, llama2c, meta
from formats.lazy_model import LazyModel, LazyTensor, from_model
from formats.registry import FORMATS, detect_format, open_model
from generation.engine import generate_tokens
from model import ModelArgs, parameter_shapes
from ops.rope import RopeScaling
from tests.helpers import LLAMA3, model_logits, random_model

TARGETS = [name for module in FORMATS for name in module.DTYPES]
EXACT = [name for name in TARGETS if name != "v2"]  # in float32
SAYS_ALL = [name for name in TARGETS if name[0] != "v"]


def through(target, folder, model, tokenizer, dtype="auto") -> LazyModel:
    """The model after it was written and read again."""
    path = os.path.join(folder, f"model.{target}")
    write_model(from_model(model, tokenizer=tokenizer), path, target, dtype)
    return open_model(path)


def same_args(a: ModelArgs, b: ModelArgs) -> bool:
    """Whether two architectures are the same, be it in other words."""
    effective = (
        "ffn_dim",
        "kv_heads",
        "dim",
        "n_layers",
        "n_heads",
        "vocab_size",
        "norm_eps",
        "rope_theta",
    )
    effective += ("rope_scaling", "max_seq_len", "tie_embeddings")
    return all(getattr(a, name) == getattr(b, name) for name in effective)


@pytest.mark.parametrize("hidden_dim", [96, 100, 33])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("target", EXACT)
def test_a_model_comes_back_bit_for_bit(target, n_kv_heads, tied, hidden_dim, tokenizer, tmp_path):
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tied, hidden_dim=hidden_dim)
    again = through(target, tmp_path, model, tokenizer)
    state, state_again = model.state_dict(), again.model().state_dict()
    assert list(state) == list(state_again)
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert torch.equal(
        model_logits(model), model_logits(open_model(again.path, max_seq_len=160).model())
    )
    expected = model.args if target != "meta" else dataclasses.replace(model.args, max_seq_len=4096)
    assert same_args(again.args, expected)
    assert again.own_tokenizer().hash == tokenizer.hash


@pytest.mark.parametrize("hidden_dim", [96, 100, 33])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("target, group", [("v2", None), ("gguf", 32)])
def test_a_quantized_model_is_off_by_half_a_step_at_most(
    target, group, n_kv_heads, tied, hidden_dim, tokenizer, tmp_path
):
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tied, hidden_dim=hidden_dim)
    again = through(target, tmp_path, model, tokenizer, "q8_0").model()
    group = group or llama2c.largest_group(model.args)
    for name, weight in model.named_parameters():
        read = again.get_parameter(name)
        if weight.dim() == 1:
            assert torch.equal(weight, read)
        elif weight.shape[1] % group:  # rows that GGUF's blocks do not fit stay float16
            assert target == "gguf" and torch.equal(weight.half().float(), read)
        else:
            step = weight.reshape(-1, group).abs().amax(dim=1, keepdim=True) / 127
            rounding = 1 + 2**-11 if target == "gguf" else 1 + 2**-20  # of the scale
            assert ((weight - read).abs().reshape(-1, group) <= step / 2 * rounding).all()
    assert (model_logits(model) - model_logits(again)).abs().max() < 0.2


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("first, second", [*itertools.permutations(SAYS_ALL, 2)])
def test_a_llama_3_goes_from_every_format_to_every_other(first, second, tied, tokenizer, tmp_path):
    model = random_model(n_kv_heads=2, tie_embeddings=tied, **LLAMA3)
    between = through(first, tmp_path, model, tokenizer)
    write_model(between, str(tmp_path / "end"), second)
    end = open_model(str(tmp_path / "end"), max_seq_len=160)
    assert same_args(end.args, model.args) and end.own_tokenizer().hash == tokenizer.hash
    assert torch.equal(model_logits(end.model()), model_logits(model))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("target", SAYS_ALL)
def test_half_precision_is_kept_and_rounds_once(target, dtype, tokenizer, tmp_path):
    model = random_model(n_kv_heads=2)
    again = through(target, tmp_path, model, tokenizer, dtype)
    assert again.dtype == getattr(torch, dtype)
    for name, weight in model.named_parameters():
        kept = weight if target == "gguf" and weight.dim() == 1 else weight.to(again.dtype).float()
        assert torch.equal(again.model().get_parameter(name), kept)
    write_model(again, str(tmp_path / "second"), target)
    assert open_model(str(tmp_path / "second")).dtype == again.dtype


@pytest.mark.parametrize(
    "scaling", [RopeScaling("linear", 4.0), RopeScaling("llama3", 32.0, 1.0, 4.0, 64)]
)
@pytest.mark.parametrize("target", ["ckpt", "hf", "gguf"])
def test_rope_scaling_comes_back(target, scaling, tokenizer, tmp_path):
    again = through(target, tmp_path, random_model(rope_scaling=scaling), tokenizer)
    assert again.args.rope_scaling == scaling


@pytest.mark.parametrize(
    "target, said, overrides",
    [
        ("v0", "rope_theta=500000", dict(rope_theta=500000.0)),
        ("v1", "norm_eps=1e-06", dict(norm_eps=1e-6)),
        ("v2", "llama3 rope scaling", dict(rope_scaling=RopeScaling("llama3", 8.0))),
        ("meta", "RopeScaling", dict(rope_scaling=RopeScaling("llama3", 32.0))),
        ("meta", "RopeScaling", dict(rope_scaling=RopeScaling("linear", 8.0))),
    ],
)
def test_what_a_format_cannot_say_is_refused_by_name_with_what_can(
    target, said, overrides, tokenizer, tmp_path
):
    """llama2.c #403: what had no place in the file was left out, and the model ran wrong."""
    with pytest.raises(ValueError, match=rf"{said}.*--format=hf"):
        through(target, tmp_path, random_model(**overrides), tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", TARGETS)
def test_weights_that_are_no_numbers_are_written_to_no_format(target, value, tokenizer, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.layers[1].feed_forward.w3.weight[-1, -1] = value
    with pytest.raises(
        ValueError, match=r"layers\.1\.feed_forward\.w3\.weight has values that are no numbers"
    ):
        through(target, tmp_path, model, tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", SAYS_ALL)
def test_weights_too_large_for_float16_are_refused_by_name(target, tokenizer, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.layers[0].attention.wo.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"too large for float16; use --dtype=float32"):
        through(target, tmp_path, model, tokenizer, "float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", TARGETS)
def test_writing_twice_gives_the_same_bytes(target, tokenizer, tmp_path):
    model, written = random_model(n_kv_heads=2), []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        through(target, tmp_path / name, model, tokenizer)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        written.append([(path.relative_to(tmp_path / name), path.read_bytes()) for path in files])
    assert written[0] == written[1]


@pytest.mark.parametrize("target", TARGETS)
def test_a_format_is_known_by_content_and_nothing_else_takes_it_for_its_own(
    target, tokenizer, tmp_path
):
    path = through(target, tmp_path, random_model(), tokenizer).path
    os.rename(path, tmp_path / "anything.xyz")
    assert target in detect_format(str(tmp_path / "anything.xyz")).DTYPES
    assert sum(module.matches(str(tmp_path / "anything.xyz")) for module in FORMATS) == 1


def test_shapes_by_arithmetic_are_those_of_the_model():
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
def place(tokenizer, tmp_path, monkeypatch):
    """A folder with out/ckpt.pt, a training checkpoint, and its tokenizer; the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    model = random_model()
    checkpoint = dict(model=model.state_dict(), model_args=write_model_args(model.args), iter_num=3)
    save_checkpoint("out/ckpt.pt", checkpoint | dict(tokenizer_hash=tokenizer.hash, optimizer={}))
    (tmp_path / "out" / "tokenizer.model").write_bytes(tokenizer.content)
    return tmp_path


@pytest.fixture
def run_export(run_script, tmp_path):
    """run_export("model.bin", "--from=x") runs the command in tmp_path; returns (status, output, error)."""
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
def test_the_command_writes_what_the_name_or_the_option_says(arguments, module, place, run_export):
    status, output, error = run_export(*arguments)
    assert status == 0, error
    assert detect_format(arguments[0]) is module and f"wrote {arguments[0]}" in output
    assert same_args(open_model(arguments[0], max_seq_len=160).args, random_model().args)


def test_llama2cs_own_options_read_what_they_read_there(place, run_export):
    assert run_export("m", "--format=meta")[0] == run_export("h", "--format=hf")[0] == 0
    for option in ("--meta-llama", "--hf"):
        source = {"--meta-llama": "m", "--hf": "h"}[option]
        status, _, error = run_export(f"{source}.bin", option, source, "--max_seq_len=160")
        assert status == 0, error
    assert (place / "m.bin").read_bytes() == (place / "h.bin").read_bytes()


def test_the_tokenizer_comes_along(place, run_export, tokenizer):
    assert run_export("c/x.bin")[0] == 0
    assert (place / "c" / "tokenizer.bin").read_bytes() == tokenizer.to_bin()
    assert run_export("h", "--from=c/x.bin")[0] == 0
    assert (place / "h" / "tokenizer.json").exists()
    assert run_export("d/x.pt", "--from=h")[0] == 0
    assert (
        open_model("d/x.pt").own_tokenizer().hash
        == open_model("d/x.pt").tokenizer_hash
        == tokenizer.hash
    )


def test_another_models_tokenizer_is_neither_taken_nor_overwritten(place, run_export, shared):
    other = shared("models/tok512.bin")
    with open(other, "rb") as file:
        (place / "tokenizer.bin").write_bytes(file.read())
    status, _, error = run_export("x.bin")
    assert (
        status == 1
        and "tokenizer.bin: is another model's" in error
        and not (place / "x.bin").exists()
    )
    status, _, error = run_export("y", f"--tokenizer={other}")
    assert status == 1 and "is not the tokenizer that" in error and not (place / "y").exists()
    os.remove("out/tokenizer.model")
    (place / "out" / "tokenizer.bin").write_bytes((place / "tokenizer.bin").read_bytes())
    status, output, _ = run_export("y")
    assert (
        status == 0
        and "note: the tokenizer beside" in output
        and not (place / "y" / "tokenizer.json").exists()
    )


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        ([], 2, "say what to write"),
        (["x.bin", "--from=nowhere.pt"], 1, "nowhere.pt: there is no such file or folder"),
        (["x.bin", "--from=notes.txt"], 1, "notes.txt: no model"),
        (["x.bin", "--from=out"], 1, "out: a folder without config.json"),
        (["out/ckpt.pt"], 2, "out/ckpt.pt: is also what is read"),
        (["notes.txt", "--format=v0"], 1, "notes.txt: is there already and would be lost"),
        (["full", "--format=hf"], 1, "full: holds other things than a model"),
        (["full", "--format=gguf"], 1, "full: is a folder; name a file"),
        ([".", "--format=hf"], 1, ".: holds other things than a model"),
        (["x.story"], 2, "x.story: which format is that to be? Name it with --format="),
        (["x.bin", "--format=gguf", "--version=0"], 2, "--version=0 is --format=v0, not gguf"),
        (["x.bin", "--from=a", "--checkpoint=b"], 2, "name one model to read"),
        (["x.bin", "--dtype=q8_0"], 1, "--dtype=q8_0: v0 is written in float32"),
        (["x.bin", "--version=3"], 2, "--version=3: must be one of -1, 0, 1, 2 or None"),
        (["x.gguf", "--from=bare/ckpt.pt"], 1, "reads no GGUF file without a vocabulary"),
        (["x.bin", "--tokenizer=notes.txt"], 1, "notes.txt: neither a SentencePiece model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_costs_a_sentence_and_nothing_else(arguments, status, said, place, run_export):
    (place / "notes.txt").write_text("Buy milk.\n" * 10)
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("42")
    (place / "bare").mkdir()
    (place / "bare" / "ckpt.pt").write_bytes((place / "out" / "ckpt.pt").read_bytes())
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    ended, _, error = run_export(*arguments)
    assert (ended, len(error.splitlines())) == (status, 1) and said in error
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before


@pytest.mark.parametrize("target", ["hf", "meta"])
def test_a_folder_that_was_exported_is_replaced_whole(target, place, run_export):
    assert run_export("folder", f"--format={target}")[0] == 0
    before = sorted(os.listdir("folder"))
    assert run_export("folder", f"--format={target}", "--dtype=float16")[0] == 0
    assert sorted(os.listdir("folder")) == before and open_model("folder").dtype == torch.float16
    assert sorted(os.listdir()) == ["folder", "out"]


@pytest.mark.parametrize("target", ["v0", "v1", "v2", "gguf"])
def test_a_file_that_was_exported_is_replaced(target, place, run_export):
    (place / "x").mkdir()
    assert run_export("x/model", f"--format={target}")[0] == 0
    assert run_export("x/model", f"--format={target}", "--max_seq_len=32")[0] == 0
    assert open_model("x/model").args.max_seq_len == 32


@pytest.mark.parametrize("target", TARGETS)
def test_sample_tells_the_same_story_from_every_format(target, run_script, tokenizer, tmp_path):
    model = random_model(n_kv_heads=2)
    path = through(target, tmp_path, model, tokenizer).path
    result = run_script(
        "sample.py", f"--init_from={path}", "--temperature=0", "--max_new_tokens=30", "--start=Once"
    )
    assert result.returncode == 0, result.stderr
    if target in EXACT:
        prompt = tokenizer.encode("Once", bos=True)
        tokens = [
            *prompt,
            *generate_tokens(model, prompt, tokenizer.stop_ids, max_new_tokens=30, temperature=0),
        ]
        assert result.stdout.strip().endswith(tokenizer.decode(tokens).strip())


@pytest.mark.parametrize("target", ["v2", "hf", "gguf"])
def test_training_goes_on_from_the_weights_of_every_format(
    target, run_script, data_dir, tokenizer, tmp_path
):
    path = through(target, tmp_path, random_model(n_kv_heads=2), tokenizer).path
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


def test_training_refuses_data_of_another_vocabulary_than_the_models(
    run_script, data_dir, shared, tmp_path
):
    """llama2.c #263: the wrong tokenizer for a model."""
    path = shared("models/stories260K.bin")
    (tmp_path / "model.bin").write_bytes(open(path, "rb").read())
    (tmp_path / "tokenizer.bin").write_bytes(open(shared("models/tok512.bin"), "rb").read())
    result = run_script("train.py", "--init_from=model.bin", f"--data_dir={data_dir}", cwd=tmp_path)
    assert result.returncode == 1 and "was trained with another tokenizer" in result.stderr


def test_a_config_of_settings_survives_json(tokenizer, tmp_path):
    """Numbers in config.json are those of the model, to the last digit."""
    model = random_model(norm_eps=1.1e-6, rope_theta=12345.678)
    through("hf", tmp_path, model, tokenizer)
    config = json.loads((tmp_path / "model.hf" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1.1e-6
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 12345.678


@pytest.mark.parametrize("target", ["v0", "v2", "hf", "gguf", "ckpt", "meta"])
def test_a_model_replaced_while_it_is_read_is_refused_not_mixed(target, tokenizer, tmp_path):
    """train.py replaces out/model.bin while somebody samples from it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source = through(target, tmp_path / "a", random_model(), tokenizer)
    other = through(target, tmp_path / "b", random_model(rope_theta=10000.0), tokenizer)
    source.read("norm.weight")
    os.rename(source.path, tmp_path / "old")
    os.rename(other.path, source.path)
    with pytest.raises(ValueError, match="was changed while it was read; run again"):
        source.model()


def test_files_that_came_meanwhile_are_not_lost(place):
    """The check is made again when the folder is whole."""
    source = open_model("out/ckpt.pt")
    write_model(source, "folder", "hf")
    first = next(iter(source.tensors))
    tensor = source.tensors[first]

    def read():
        (place / "folder" / "thesis.tex").write_text("42")
        return tensor.read()

    source.tensors[first] = LazyTensor(tensor.shape, tensor.dtype, read)
    with pytest.raises(ValueError, match=r"holds other things \(thesis\.tex\)"):
        write_model(source, "folder", "hf")
    assert (place / "folder" / "thesis.tex").read_text() == "42" and sorted(os.listdir()) == [
        "folder",
        "out",
    ]


@pytest.mark.parametrize("kind", ["tokens", "magic alone", "a link", "a folder in the folder"])
def test_what_only_looks_like_a_model_of_the_format_does_not_give_way(kind, place, run_export):
    target = {
        "tokens": "x.bin",
        "magic alone": "x.gguf",
        "a link": "x.bin",
        "a folder in the folder": "x",
    }[kind]
    if kind == "tokens":
        torch.tensor([45, 12, 900, 14] * 100, dtype=torch.int32).numpy().tofile(target)
    elif kind == "magic alone":
        (place / target).write_bytes(b"GGUF, my notes")
    elif kind == "a link":
        os.symlink("elsewhere.bin", target)
    else:
        (place / "x" / "config.json").mkdir(parents=True)
    status, _, error = run_export(target)
    assert (
        status == 1 and len(error.splitlines()) == 1 and error.startswith(f"export.py: {target}: ")
    )
    assert os.path.lexists(target) and not os.path.exists("tokenizer.bin")


def test_fine_tuning_into_the_models_own_folder_is_refused(run_script, data_dir, place):
    before = (place / "out" / "ckpt.pt").read_bytes()
    result = run_script(
        "train.py", "--init_from=out/ckpt.pt", "--out_dir=out", f"--data_dir={data_dir}", cwd=place
    )
    assert (
        result.returncode == 1 and "--init_from=out/ckpt.pt: lies in --out_dir=out" in result.stderr
    )
    assert (place / "out" / "ckpt.pt").read_bytes() == before


def test_a_long_context_is_not_taken_for_a_run_unasked(run_script, data_dir, tokenizer, tmp_path):
    path = through("hf", tmp_path, random_model(max_seq_len=131072), tokenizer).path
    result = run_script("train.py", f"--init_from={path}", f"--data_dir={data_dir}", cwd=tmp_path)
    assert result.returncode == 1 and "a context of 131072 tokens; say how long" in result.stderr


def test_a_model_of_unknown_vocabulary_is_not_put_beside_a_tokenizer(place, run_export):
    """A sampler would take that one for the model's."""
    assert run_export("d/a.bin")[0] == 0
    os.remove("out/tokenizer.model")
    status, _, error = run_export("d/b.bin")
    assert (
        status == 1
        and "d/tokenizer.bin: may be another model's" in error
        and not (place / "d" / "b.bin").exists()
    )
