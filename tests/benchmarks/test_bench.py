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
from benchmarks import training, training_run
from benchmarks.baselines import BaselineLlama
from benchmarks.data import SAMPLE_CHARS, DataBench, limit_chars, load_texts
from benchmarks.decoding import (
    TOKENS,
    dummy_tokenizer,
    random_model,
    report,
    seconds_to_first_token,
    write_files,
)
from benchmarks.timing import Measurement, Variant, measure
from benchmarks.training import training_variants
from checkpoints import manager
from formats.registry import load_model
from model import ModelArgs, Transformer
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
    assert [step(), step()] == [3 * TOKENS] * 2


@pytest.mark.parametrize("dtype", bench_sample.FILES.values())
def test_llama_cpp_generates_the_requested_number_of_tokens(dtype, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed")
    write_files(TINY, str(tmp_path))
    step = bench_sample.llama_cpp_step(str(tmp_path / f"{dtype}.gguf"), "cpu", threads=1)
    assert [step(), step()] == [TOKENS] * 2


def test_all_variants_use_the_same_random_model(tmp_path):
    write_files(TINY, str(tmp_path))
    model, tokenizer = load_model(str(tmp_path / "ckpt.pt"))
    torch.testing.assert_close(model.state_dict(), random_model(TINY).state_dict(), rtol=0, atol=0)
    assert tokenizer.vocab_size == TINY.vocab_size
    if (tmp_path / "float32.gguf").exists():  # where llama.cpp is installed
        torch.testing.assert_close(
            load_model(str(tmp_path / "float32.gguf"))[0].state_dict(), model.state_dict()
        )


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

    def names(batch, threads, device="cpu"):
        return {
            variant.name
            for variant in bench_sample.variants(TINY, device, batch, threads, "folder")
        }

    compiled, eager = (
        {"float32", "bfloat16", "int8"},
        {"float32, not compiled", "int8, not compiled"},
    )
    assert names(64, 1) == names(4, 2) == compiled
    assert names(16, 2) == compiled | {"transformers"}
    assert names(1, 1) == compiled | eager | {"transformers", "llama.cpp F32", "llama.cpp Q8_0"}
    assert names(1, 2) == names(1, 1) | {"plain"}
    assert names(1, 2, "cuda") == compiled | eager | {"transformers", "plain"}
    monkeypatch.setattr(bench_sample, "find_spec", lambda package: None)
    monkeypatch.setattr(bench_sample, "pick_dtype", lambda name, device: "float32")
    assert names(1, 2) == {"float32", "int8", "plain"} | eager


def test_ratios_compare_with_llama_cpp_at_the_same_precision(capsys):
    rates = {"plain": [1, 2, 4], "llama.cpp F32": [10, 20, 40], "llama.cpp Q8_0": [30, 30, 30]}
    rates |= {"float32": [20, 40, 20], "bfloat16": [7, 7, 7], "int8, not compiled": [45, 60, 90]}
    where = dict(preset="15M", batch=1, threads=2)
    records = report(where, {name: Measurement(figures, 0) for name, figures in rates.items()})
    lines = capsys.readouterr().out.splitlines()
    assert "| variant | tokens/s | spread | x plain | x llama.cpp |" in lines
    assert "| float32 | 20 | 20 to 40 | 20.00 | 2.00 |" in lines
    assert "| bfloat16 | 7 | 7 to 7 | 3.50 |  |" in lines
    assert "| int8, not compiled | 60 | 45 to 90 | 30.00 | 2.00 |" in lines
    assert records[-1] == where | dict(variant="int8, not compiled", tokens_per_second=60)


@pytest.mark.slow
def test_the_sampling_tables_and_records(run_script, monkeypatch, tmp_path):
    path, variants = tmp_path / "bench.json", bench_sample.variants
    chosen = ("plain", "float32, not compiled")  # each takes seconds to start
    monkeypatch.setattr(
        bench_sample, "variants", lambda *args: [v for v in variants(*args) if v.name in chosen]
    )
    monkeypatch.setattr(bench_sample, "RUNS", 1)
    monkeypatch.setattr(bench_sample, "VOCAB_SIZE", 300)
    monkeypatch.setitem(training_run.PRESETS, "15M", ["--dim=32", "--n_layers=2", "--n_heads=4"])
    monkeypatch.setattr(bench, "find_spec", lambda package: None)
    options = (
        "--preset=15M",
        "--batch=1",
        "--threads=2",
        "--rounds=2",
        "--seconds=0.01",
        "--device=cpu",
    )
    options += (f"--json={path}",)
    status, out, error = run_script("bench.py", "sample", *options, timeout=300)
    assert status == 0, error
    assert (
        out.startswith("cpu: ")
        and "note: llama.cpp is left out, as xllamacpp is not installed" in out
    )
    *records, first = json.loads(path.read_text())
    assert [record["variant"] for record in records] == [*chosen]
    for record in [*records, first]:
        assert (record["preset"], record["batch"], record["threads"]) == ("15M", 1, 2)
    for record in records:
        assert f"| {record['variant']} | {record['tokens_per_second']:,.0f} |" in out
    assert first["variant"] == "first token" and f"| 2 | {first['seconds']:.2f} |" in out
    assert 0.5 < first["seconds"] < 120


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


def test_the_time_ends_at_the_first_token():
    lines = ["import time", event(None), "time.sleep(0.5)", event(7), "time.sleep(60)"]
    assert 0.5 < seconds_to_first_token([sys.executable, "-c", "\n".join(lines)], threads=1) < 30


def test_output_without_a_first_token_is_an_error():
    for lines in ([event(None)], ["raise SystemExit('no tokenizer')"]):
        with pytest.raises(ValueError, match="no first token"):
            seconds_to_first_token([sys.executable, "-c", "\n".join(lines)], threads=1)
