"""
bench.py compares equal things, and reports what it measured.
"""

import json
import os
import sys
import time

import pytest
import torch

import bench
from benchmarks import decoding as bench_sample
from benchmarks import llama_cpp, sample_command, training, training_run
from benchmarks.baselines import BaselineLlama
from benchmarks.data import SAMPLE_CHARS, DataBench, limit_chars, load_texts
from benchmarks.decoding import (
    DIFFERENT,
    OPTION_SETS,
    README_OPTIONS,
    TEMPERATURE_ONLY,
    TOKENS,
    SampleBench,
    dummy_tokenizer,
    random_model,
    report,
    row_params,
    write_files,
)
from benchmarks.llama_cpp import NativeBuild
from benchmarks.sample_command import run_sample_command
from benchmarks.timing import Measurement, Variant, measure, measure_cases
from benchmarks.training import training_variants
from checkpoints import manager
from formats.registry import load_model
from model import ModelArgs, Transformer
from tests.processes import ROOT
from textdata.tokenizer import train_sentencepiece

SMALL = dict(dim=32, n_layers=2, n_heads=4, vocab_size=50, multiple_of=8, max_seq_len=24)


def to_half_split(weight, head_dim: int):
    """The rows of a query or key projection from interleaved pairs to half-split pairs."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_baseline(model: Transformer) -> BaselineLlama:
    """The baseline model with the weights of model."""
    baseline, head_dim = BaselineLlama(model.args), model.args.head_dim
    with torch.no_grad():
        baseline.embedding.weight.copy_(model.tok_embeddings.weight)
        baseline.head.weight.copy_(model.output.weight)
        baseline.norm.weight.copy_(model.norm.weight)
        for block, layer in zip(baseline.blocks, model.layers, strict=True):
            block.attention.query.weight.copy_(to_half_split(layer.attention.wq.weight, head_dim))
            block.attention.key.weight.copy_(to_half_split(layer.attention.wk.weight, head_dim))
            block.attention.value.weight.copy_(layer.attention.wv.weight)
            block.attention.out.weight.copy_(layer.attention.wo.weight)
            block.gate.weight.copy_(layer.feed_forward.w1.weight)
            block.down.weight.copy_(layer.feed_forward.w2.weight)
            block.up.weight.copy_(layer.feed_forward.w3.weight)
            block.attention_norm.weight.copy_(layer.attention_norm.weight)
            block.ffn_norm.weight.copy_(layer.ffn_norm.weight)
    return baseline


@pytest.mark.parametrize("shape", [{}, dict(n_kv_heads=2), dict(tie_embeddings=False)], ids=str)
def test_the_baseline_model_is_the_same_model(shape):
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**(SMALL | shape)))
    baseline = to_baseline(model)
    assert sum(p.numel() for p in baseline.parameters()) == model.num_parameters()
    inputs, targets = torch.randint(50, (2, 3, 24)).unbind()
    loss = model(inputs, targets)[1]
    baseline_loss = baseline(inputs, targets)
    torch.testing.assert_close(loss, baseline_loss)
    loss.backward()
    baseline_loss.backward()
    torch.testing.assert_close(
        model.layers[0].feed_forward.w2.weight.grad, baseline.blocks[0].down.weight.grad
    )
    torch.testing.assert_close(model.tok_embeddings.weight.grad, baseline.embedding.weight.grad)


def test_the_baseline_model_gives_the_same_next_logits():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**SMALL)).eval()
    tokens = torch.randint(50, (3, 24))
    with torch.inference_mode():
        torch.testing.assert_close(to_baseline(model).next_logits(tokens), model(tokens)[0][:, -1])


@pytest.mark.slow
def test_the_training_table_and_records(run_script, monkeypatch, tmp_path):
    path = tmp_path / "bench.json"
    chosen = ("baseline", "cria")  # each takes seconds to start
    monkeypatch.setattr(
        bench,
        "training_variants",
        lambda *args: [v for v in training_variants(*args) if v.name in chosen],
    )
    monkeypatch.setattr(training, "pick_dtype", lambda name, device: "float32")
    presets = training_run.PRESETS
    monkeypatch.setitem(presets, "260K", [*presets["260K"], "--compile=False"])
    options = (
        "--preset=260K",
        "--rounds=2",
        "--seconds=0.01",
        "--batch_size=1",
        "--device=cpu",
        f"--json={path}",
    )
    status, out, error = run_script("bench.py", "train", *options)
    assert status == 0, error
    records = {record["variant"]: record for record in json.loads(path.read_text())}
    assert records.keys() == set(chosen)
    for name, record in records.items():
        assert record["preset"] == "260K" and record["tokens_per_second"] > 0
        assert record["peak_memory_bytes"] > 50 * 2**20
        rate, ratio = f"{record['tokens_per_second']:,.0f}", f"{record['ratio_to_plain']:.2f}"
        assert f"| {name} | {rate} | {ratio} |" in out
    assert records["baseline"]["ratio_to_plain"] == 1.0
    assert 0 < records["cria"]["share_of_ceiling"] < 1


@pytest.mark.parametrize(
    "device, dtype, expected",
    [
        ("cpu", "float32", ["baseline", "baseline, compiled", "cria"]),
        (
            "cpu",
            "bfloat16",
            ["baseline", "baseline, compiled", "baseline, compiled, bfloat16", "cria"],
        ),
        ("cuda", "bfloat16", ["baseline", "cria"]),
    ],
)
def test_the_training_steps_that_are_compared(device, dtype, expected, monkeypatch):
    monkeypatch.setattr(training, "pick_dtype", lambda name, device: dtype)
    monkeypatch.setattr(training, "find_spec", lambda package: None)
    assert [variant.name for variant in training_variants([], device)] == expected


def test_the_training_report_shows_rates_ratios_and_matmul_peak(capsys):
    measurements = {
        "baseline": Measurement([100.0, 200.0], 2**20),
        "cria": Measurement([300.0, 400.0], 2**21),
        "matmul float32": Measurement([5e9, 5e9], 0),
    }
    options = training_run.preset_options("260K", "cpu", 1)
    baseline, cria = bench.report_training("260K", options, "cpu", measurements)
    out = capsys.readouterr().out
    assert "| variant | tokens/s | x baseline | spread | peak memory | of matmul peak |" in out
    assert "micro-batch 1 x 512 tokens; matrix products: 5 GFLOP/s float32" in out
    assert "| cria | 350 | 2.50 | 2.00 to 3.00 | 2 MB |" in out
    assert (baseline["ratio_to_plain"], cria["ratio_to_plain"]) == (1.0, 2.5)


@pytest.mark.slow
def test_the_cost_table_and_records(run_script, monkeypatch, tmp_path):
    path = tmp_path / "cost.json"
    setting = training.CostSetting("260K", max_seq_len=16, batch_size=1, processes=2)
    monkeypatch.setattr(bench, "COST_SETTINGS", (setting,))
    options = ("--compile=False", "--rounds=1", "--seconds=0.01", "--device=cpu", f"--json={path}")
    status, out, error = run_script("bench.py", "cost", *options)
    assert status == 0, error
    (record,) = json.loads(path.read_text())
    assert (record["preset"], record["processes"], record["parallel"]) == ("260K", 2, "ddp")
    assert record["tokens_per_second"] > 0 and record["share_of_ceiling"] > 0
    assert f"| 260K | 16 | 1 | 2 | ddp | {record['tokens_per_second']:,.0f} |" in out


@pytest.mark.slow
def test_the_data_benchmark_reports_what_it_measured(run_script, monkeypatch, tmp_path):
    path = tmp_path / "data.json"
    monkeypatch.setitem(
        training_run.PRESETS,
        "15M",
        ["--dim=32", "--n_layers=2", "--n_heads=4", "--compile=False"],
    )
    monkeypatch.setattr(
        bench, "measure", lambda variants, **_: measure(variants, rounds=1, seconds=0.01)
    )
    options = ("--megabytes=1", "--rounds=1", "--vocab_size=512", f"--json={path}")
    status, _, error = run_script("bench.py", "data", *options)
    assert status == 0, error
    records = {record["variant"]: record for record in json.loads(path.read_text())}
    assert records["pretokenize cria"]["tokens_per_second"] > 1000
    assert records["pretokenize cria"]["peak_memory_bytes"] > 50 * 2**20
    assert 0 < records["sampler"]["share_of_step"] < 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["speed"], "must come first and be one of train, cost, save, data, sample"),
        (["train", "--preset=7B"], "--preset=7B: must be one of all, 260K"),
        (["train", "--rounds=0"], "--rounds=0: must be 1 or more"),
        (["train", "--seconds=0"], "--seconds=0: must be above 0"),
        (["train", "--json=nowhere/x.json"], "there is no folder nowhere"),
        (["train", "--json=/tmp"], "--json=/tmp: a file cannot be written there"),
        (["save", "--checkpoint_interval=0"], "--checkpoint_interval=0: must be 1 or more"),
        (["data", "--megabytes=0"], "--megabytes=0: must be 1 or more"),
        (["sample", "--batch=3"], "--batch=3: must be one of all, 1, 4, 16, 64"),
        (["sample", "--rounds=0", "--seconds=0"], "--seconds=0: must be above 0"),
        (["sample", "--json=nowhere/x.json"], "there is no folder nowhere"),
        (["sample", "--variants=int8,float8"], "--variants=int8,float8: must be all, or some of"),
        (["sample", "--llama_bench=nowhere"], "there is no program nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_reported_in_one_sentence(run_script, arguments, sentence):
    result = run_script("bench.py", *arguments)
    assert (
        result.returncode in (1, 2)
        and sentence in result.stderr
        and "Traceback" not in result.stderr
    )


def sleeper(device: str, milliseconds: float):
    """A variant with steps of one unit of work and so many milliseconds."""

    def step() -> int:
        time.sleep(milliseconds / 1000)
        return 1

    return step


def broken(device: str, message: str):
    raise RuntimeError(message)


def dying(device: str):
    os._exit(3)


@pytest.mark.slow
def test_variants_are_measured_in_turns():
    variants = [Variant(str(ms), sleeper, dict(device="cpu", milliseconds=ms)) for ms in (20, 80)]
    fast, slow = measure(variants, rounds=3, seconds=0.2).values()
    assert len(fast.rates) == len(slow.rates) == 3
    assert fast.rate / slow.rate == pytest.approx(4, rel=0.3)


def sleeper_of_cases(device: str):
    """A variant whose cases are milliseconds."""

    def step(case: str) -> int:
        time.sleep(int(case) / 1000)
        return 1

    return step


@pytest.mark.slow
def test_the_cases_of_a_variant_are_measured_separately():
    variant = Variant("sleeper", sleeper_of_cases, dict(device="cpu"), cases=("20", "80"))
    measurements = measure_cases([variant], rounds=2, seconds=0.2)
    fast, slow = measurements["sleeper", "20"], measurements["sleeper", "80"]
    assert len(fast.rates) == len(slow.rates) == 2
    assert fast.rate / slow.rate == pytest.approx(4, rel=0.3)


def test_a_failing_variant_is_named_with_its_reason():
    with pytest.raises(ValueError, match="bad: RuntimeError: no such thing"):
        measure([Variant("bad", broken, dict(device="cpu", message="no such thing"))], 1, 0.1)


def second_fails(device: str):
    """The first process waits for the second, which fails."""
    if os.environ["RANK"] == "1":
        raise ValueError("no second device")
    time.sleep(600)


@pytest.mark.slow
def test_a_failing_process_ends_those_that_wait_for_it():
    with pytest.raises(ValueError, match="pair: ValueError: no second device"):
        measure([Variant("pair", second_fails, dict(device="cpu"), processes=2)], 1, 0.1)


def test_an_input_without_text_is_refused(run_script, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    result = run_script("bench.py", "data", f"--input={tmp_path / 'empty.txt'}")
    assert result.returncode == 1 and "there is no text in it" in result.stderr


@pytest.mark.slow
def test_the_default_vocabulary_can_be_learned_from_the_default_text():
    config = DataBench()
    texts = load_texts(config)
    assert train_sentencepiece(limit_chars(texts, SAMPLE_CHARS), config.vocab_size)


@pytest.mark.slow
def test_a_variant_whose_process_dies_ends_the_measurement():
    with pytest.raises(ValueError, match="bad: its process died"):
        measure([Variant("bad", dying, dict(device="cpu"))], 1, 0.1)


TINY = ModelArgs(**SMALL | dict(vocab_size=300, max_seq_len=bench_sample.CONTEXT))


@pytest.mark.parametrize("of, package", [("plain", "torch"), ("transformers", "transformers")])
def test_baselines_generate_the_requested_number_of_tokens(of, package):
    pytest.importorskip(package)
    threads = torch.get_num_threads()
    step = bench_sample.baseline_step(of, TINY, "cpu", threads, batch_size=2)
    assert [step(), step()] == [2 * TOKENS] * 2


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_cria_generates_the_requested_number_of_tokens(dtype):
    step = bench_sample.cria_step(
        TINY, "cpu", torch.get_num_threads(), batch_size=3, dtype=dtype, compile=False
    )
    assert [step("defaults"), step(DIFFERENT)] == [3 * TOKENS] * 2


def test_an_uncompiled_model_is_not_measured_as_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("generation.prepared_model.PreparedModel.start_compiling", lambda *_: None)
    with pytest.raises(ValueError, match="it cannot be compiled here"):
        bench_sample.prepare(TINY, "cpu", 1, "float32", compile=True)


def test_rows_with_different_options_take_the_option_sets_in_turn():
    params = [row_params(DIFFERENT, row) for row in range(7)]
    assert params[:5] == [row_params(name, 0) for name in OPTION_SETS]
    assert params[5:] == params[:2] != params[1:3]
    readme = row_params("README's options", 3)
    assert (readme.temperature, readme.top_p, readme.max_new_tokens) == (0.8, 0.9, TOKENS)


def test_the_commands_have_the_options_of_the_readme():
    options = " ".join(f"--{name}={value}" for name, value in README_OPTIONS.items())
    assert options in sample_command.COMMAND
    assert options in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", llama_cpp.GGUF_DTYPES.values())
def test_llama_cpp_generates_the_requested_number_of_tokens(dtype, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed")
    write_files(TINY, str(tmp_path), with_gguf=True)
    path = str(tmp_path / f"{dtype}.gguf")
    step = llama_cpp.wheel_step(path, "cpu", 1, bench_sample.CONTEXT, TOKENS)
    assert [step(), step()] == [TOKENS] * 2


def native_programs(folder, lines: list[str]) -> str:
    """The path of a program in place of llama-bench, with one beside it; both run lines."""
    for name in ("llama-bench", "llama-batched-bench"):
        path = folder / name
        path.write_text("\n".join([f"#!{sys.executable}", "import sys", *lines]))
        path.chmod(0o755)
    return str(folder / "llama-bench")


LLAMA_BENCH_OUTPUT = '''print("""[
  {"avg_ts": 1, "samples_ns": [ 250000000, 350000000 ]}
]""")'''
BATCHED_BENCH_OUTPUT = """print('', '{"pl": 4, "t_pp": 9.0, "t_tg": 0.3}', sep=chr(10))"""


@pytest.mark.skipif(os.name == "nt", reason="scripts are not programs")
def test_the_rate_is_the_one_that_llama_bench_reports(tmp_path):
    program = native_programs(tmp_path, [LLAMA_BENCH_OUTPUT])
    native = NativeBuild("native", ("",), program, "model.gguf", 2, 1, TOKENS, repetitions=2)
    assert " -m model.gguf -t 2 -p 0 -n 256 -r 2 -o json" in " ".join(native.command)
    turn = native.measure_turn(seconds=1.2)
    assert (turn.units, turn.seconds) == (2 * TOKENS, pytest.approx(0.6))
    assert native.repetitions == 4  # for a turn of the requested length


@pytest.mark.skipif(os.name == "nt", reason="scripts are not programs")
def test_several_streams_are_measured_with_llama_batched_bench(tmp_path):
    program = native_programs(tmp_path, [BATCHED_BENCH_OUTPUT])
    native = NativeBuild("native", ("",), program, "model.gguf", 2, 4, TOKENS)
    assert native.command[0] == str(tmp_path / "llama-batched-bench")
    (measurement,) = measure_cases([native], rounds=2, seconds=0.1).values()
    assert measurement.rates == [pytest.approx(4 * TOKENS / 0.3)] * 2


@pytest.mark.skipif(os.name == "nt", reason="scripts are not programs")
def test_a_native_build_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_sample, "find_spec", lambda package: None)
    program = native_programs(tmp_path, ["sys.exit('illegal instruction')"])
    assert not list(bench_sample.llama_cpp_variants(program, "cpu", 1, 2, str(tmp_path)))
    out = capsys.readouterr().out
    assert "note: llama.cpp F32 (native build) is left out: llama-bench ended with" in out
    assert "status 1: illegal instruction" in out


def test_all_variants_use_the_same_random_model(tmp_path):
    write_files(TINY, str(tmp_path), with_gguf=True)
    expected = random_model(TINY).state_dict()
    for name in ("ckpt.pt", "float32.gguf"):
        model, tokenizer = load_model(str(tmp_path / name))
        torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
        assert tokenizer.vocab_size == TINY.vocab_size


def test_dummy_tokenizer_encodes_any_text():
    tokenizer = dummy_tokenizer(bench_sample.VOCAB_SIZE)
    assert (
        tokenizer.vocab_size
        == len({piece for piece, _, _ in tokenizer.pieces})
        == bench_sample.VOCAB_SIZE
    )
    assert (
        tokenizer.decode(tokenizer.encode("Once upon a time, a café 🦙"))
        == "Once upon a time, a café 🦙"
    )
    assert len(tokenizer.encode("upon a time")) < len("upon a time")


def test_the_decoding_variants_that_are_compared(monkeypatch):
    monkeypatch.setattr(bench_sample, "find_spec", lambda package: True)
    monkeypatch.setattr(bench_sample, "pick_dtype", lambda name, device: "bfloat16")

    def names(batch, threads=2, device="cpu", **options):
        config = SampleBench(**options)
        compared = bench_sample.variants(config, TINY, device, batch, threads, "folder")
        return {variant.name for variant in compared}

    cria = {"float32", "bfloat16", "int8", "uncompiled float32", "uncompiled int8"}
    wheel = {"llama.cpp F32 (wheel)", "llama.cpp Q8_0 (wheel)"}
    assert names(64) == names(4) == cria | {"transformers"}
    assert names(1, threads=1) == cria | {"transformers"} | wheel
    assert names(1) == cria | {"transformers", "plain"} | wheel
    assert names(1, device="cuda") == cria | {"transformers", "plain"}
    assert names(1, variants="int8, llama.cpp") == {"int8"} | wheel
    monkeypatch.setattr(NativeBuild, "problem", lambda self: "")
    native = {"llama.cpp F32 (native build)", "llama.cpp Q8_0 (native build)"}
    assert names(16, variants="llama.cpp", llama_bench="llama-bench") == native
    monkeypatch.setattr(bench_sample, "find_spec", lambda package: None)
    monkeypatch.setattr(bench_sample, "pick_dtype", lambda name, device: "float32")
    assert names(1) == cria - {"bfloat16"} | {"plain"}
    assert names(1, device="mps") == {"plain", "uncompiled float32", "uncompiled int8"}


def test_several_streams_are_also_measured_with_different_options(monkeypatch):
    monkeypatch.setattr(bench_sample, "find_spec", lambda package: None)
    for batch, cases in ((1, (*OPTION_SETS,)), (4, (*OPTION_SETS, DIFFERENT))):
        config = SampleBench(variants="int8")
        (variant,) = bench_sample.variants(config, TINY, "cpu", batch, 2, "folder")
        assert variant.cases == cases


def test_decoding_ratios_are_medians_within_a_round(capsys):
    rates = {
        ("transformers", ""): [1, 2, 4],
        ("llama.cpp F32 (wheel)", ""): [1, 1, 1],
        ("llama.cpp F32 (native build)", ""): [10, 20, 40],
        ("llama.cpp Q8_0 (wheel)", ""): [30, 30, 30],
        ("float32", "greedy"): [20, 40, 20],
        ("float32", TEMPERATURE_ONLY): [10, 10, 20],
        ("bfloat16", "greedy"): [7, 7, 7],
        ("uncompiled int8", TEMPERATURE_ONLY): [45, 60, 90],
    }
    where = dict(preset="15M", batch=1, threads=2)
    records = report(where, {key: Measurement(figures, 0) for key, figures in rates.items()})
    lines = capsys.readouterr().out.splitlines()
    tables = "\n".join(lines).split("\n\n")
    assert tables[0] == "\n15M: 256 tokens, streams: 1, threads: 2"
    assert tables[1].splitlines()[0] == "| tokens/s | greedy | temperature only |"
    assert "| float32 | 20 | 10 |" in tables[1] and "| transformers |  | 2 |" in tables[1]
    assert tables[2].splitlines()[0] == "| x transformers | greedy | temperature only |"
    assert tables[2].splitlines()[2:] == [
        "| float32 | 20.00 | 5.00 |",
        "| bfloat16 | 3.50 |  |",
        "| uncompiled int8 |  | 30.00 |",
    ]
    assert tables[3].splitlines()[2:] == [
        "| float32 | 2.00 | 0.50 |",
        "| uncompiled int8 |  | 2.00 |",
    ]
    assert tables[4].splitlines()[2] == "| float32 | 2.00 | 1.00 |"
    assert records[-1] == where | dict(
        variant="uncompiled int8",
        options=TEMPERATURE_ONLY,
        tokens_per_second=60,
        min=45,
        max=90,
        ratio_to_transformers=30,
        ratio_to_llama_cpp=2,
        ratio_to_temperature_only=1,
    )


@pytest.mark.slow
def test_the_sampling_tables_and_records(run_script, monkeypatch, tmp_path):
    path = tmp_path / "bench.json"
    monkeypatch.setattr(bench_sample, "VOCAB_SIZE", 300)
    monkeypatch.setitem(training_run.PRESETS, "15M", ["--dim=32", "--n_layers=2", "--n_heads=4"])
    monkeypatch.setattr(bench, "find_spec", lambda package: None)
    monkeypatch.setattr(bench_sample, "find_spec", lambda package: None)
    monkeypatch.setattr(bench_sample, "prepare", uncompiled(bench_sample.prepare))
    chosen = ("plain", "uncompiled float32")  # each takes seconds to start
    options = [f"--variants=sample.py,transformers,llama.cpp,{','.join(chosen)}", "--preset=15M"]
    options += ["--batch=1", "--rounds=1", "--seconds=0.01", "--device=cpu", f"--json={path}"]
    status, out, error = run_script("bench.py", "sample", *options, timeout=300)
    assert status == 0, error
    assert out.startswith("cpu: ")
    assert "note: llama.cpp (wheel) is left out, as xllamacpp is not installed" in out
    first, second, *records = json.loads(path.read_text())
    expected = [
        ("plain", TEMPERATURE_ONLY),
        *(("uncompiled float32", name) for name in OPTION_SETS),
    ]
    assert [(record["variant"], record["options"]) for record in records] == expected
    for record in [first, second, *records]:
        assert (record["preset"], record["batch"], record["threads"]) == ("15M", 1, 2)
    assert f"| plain |  |  |  |  | {records[0]['tokens_per_second']:,.0f} |" in out
    assert first["variant"] == "sample.py, nothing compiled"
    times = (first["seconds_to_first"], first["seconds_to_last"])
    assert 0.5 < times[0] < times[1] < 120
    assert f"| nothing compiled | {times[0]:.2f} | {times[1]:.2f} | {first['num_tokens']} |" in out


def uncompiled(prepare):
    """bench_sample.prepare without compilation, which takes a minute."""
    return lambda *args, compile: prepare(*args, compile=False)


def test_saving_is_measured_with_the_checkpoints(run_script, monkeypatch, tmp_path):
    path, steps, saved = tmp_path / "bench.json", [], []
    train, save_checkpoint = training_run.train, manager.save_checkpoint
    training_step = train.training_step
    monkeypatch.setattr(train, "training_step", lambda *run: steps.append(training_step(*run)))
    monkeypatch.setattr(
        manager, "save_checkpoint", lambda *args: saved.append(save_checkpoint(*args))
    )
    monkeypatch.setitem(
        training_run.PRESETS,
        "260K",
        ["--dim=32", "--n_layers=2", "--n_heads=4", "--compile=False"],
    )
    options = (
        "--preset=260K",
        "--checkpoint_interval=4",
        "--rounds=3",
        "--device=cpu",
        f"--json={path}",
    )
    status, out, error = run_script("bench.py", "save", *options)
    assert status == 0, error
    assert len(steps) == (3 + 3 * 4) * 2 and len(saved) == 4  # a warm-up of 3 steps, and rounds
    (record,) = json.loads(path.read_text())
    assert record["ratio_min"] <= record["ratio"] <= record["ratio_max"]
    rate, ratio = f"{record['tokens_per_second']:,.0f}", f"{record['ratio']:.3f}"
    assert f"| one in 4 steps | {rate} | {ratio} |" in out


def event(token: int | None) -> str:
    return f"print('{json.dumps(dict(prompt=0, sample=0, token=token, text=''))}', flush=True)"


def test_the_times_of_the_first_and_the_last_token():
    lines = ["import time", event(None), "time.sleep(0.5)", event(7), "time.sleep(0.5)", event(8)]
    lines += [event(None), "time.sleep(0.5)"]
    times = run_sample_command([sys.executable, "-c", "\n".join(lines)], threads=1)
    assert 0.5 < times.first < times.last - 0.4 < 30
    assert times.num_tokens == 2


@pytest.mark.parametrize(
    "line, message",
    [
        (event(None), "sample.py, status 0: no token"),
        ("raise SystemExit('no tokenizer')", "sample.py, status 1: no tokenizer"),
    ],
)
def test_a_command_without_tokens_is_an_error(line, message):
    with pytest.raises(ValueError, match=message):
        run_sample_command([sys.executable, "-c", line], threads=1)
