"""
bench.py: that what it compares is comparable, and that it reports what it measured.
"""

import json
import os
import time

import pytest
import torch

from bench_data import TO_LEARN_FROM, DataBench, distinct_stories, take
from model import ModelArgs, Transformer
from peers import PlainLlama
from tokenizer import train_sentencepiece
from turns import Variant, measure

SMALL = dict(dim=32, n_layers=2, n_heads=4, vocab_size=50, multiple_of=8, max_seq_len=24)


def halves_first(weight, head_dim: int):
    """Rows of a query or key projection from Meta's order of pairs to that of halves."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def plain_twin(model: Transformer) -> PlainLlama:
    """The plain model with our model's weights."""
    plain, head_dim = PlainLlama(model.args), model.args.head_dim
    with torch.no_grad():
        plain.embedding.weight.copy_(model.tok_embeddings.weight)
        plain.head.weight.copy_(model.output.weight)
        plain.norm.weight.copy_(model.norm.weight)
        for block, layer in zip(plain.blocks, model.layers, strict=True):
            block.attention.query.weight.copy_(halves_first(layer.attention.wq.weight, head_dim))
            block.attention.key.weight.copy_(halves_first(layer.attention.wk.weight, head_dim))
            block.attention.value.weight.copy_(layer.attention.wv.weight)
            block.attention.out.weight.copy_(layer.attention.wo.weight)
            block.gate.weight.copy_(layer.feed_forward.w1.weight)
            block.down.weight.copy_(layer.feed_forward.w2.weight)
            block.up.weight.copy_(layer.feed_forward.w3.weight)
            block.attention_norm.weight.copy_(layer.attention_norm.weight)
            block.ffn_norm.weight.copy_(layer.ffn_norm.weight)
    return plain


@pytest.mark.parametrize("shape", [{}, dict(n_kv_heads=2), dict(tie_embeddings=False)], ids=str)
def test_the_plain_model_is_the_same_model(shape):
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**(SMALL | shape)))
    plain = plain_twin(model)
    assert sum(p.numel() for p in plain.parameters()) == model.num_parameters()
    inputs, targets = torch.randint(50, (2, 3, 24)).unbind()
    ours = model(inputs, targets)[1]
    theirs = plain(inputs, targets)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(model.layers[0].feed_forward.w2.weight.grad, plain.blocks[0].down.weight.grad)
    torch.testing.assert_close(model.tok_embeddings.weight.grad, plain.embedding.weight.grad)


def test_the_training_table_and_records(run_script, tmp_path):
    path = tmp_path / "bench.json"
    options = ("--preset=260K", "--rounds=2", "--seconds=0.01", "--batch_size=1", "--device=cpu", f"--json={path}")
    result = run_script("bench.py", "train", *options, env={"TORCHDYNAMO_DISABLE": "1"})
    assert result.returncode == 0, result.stderr
    records = {record["variant"]: record for record in json.loads(path.read_text())}
    assert {"plain", "plain, compiled", "ours"} <= records.keys()
    for name, record in records.items():
        assert record["preset"] == "260K" and record["tokens_per_second"] > 0
        assert record["peak_memory_bytes"] > 50 * 2**20
        assert f"| {name} | {record['tokens_per_second']:,.0f} | {record['ratio_to_plain']:.2f} |" in result.stdout
    assert records["plain"]["ratio_to_plain"] == 1.0
    assert 0 < records["ours"]["share_of_ceiling"] < 1


def test_the_data_bench_reports_what_it_measured(run_script, tmp_path):
    path = tmp_path / "data.json"
    options = ("--megabytes=1", "--rounds=1", "--vocab_size=512", f"--json={path}")
    result = run_script("bench.py", "data", *options, env={"TORCHDYNAMO_DISABLE": "1"})
    assert result.returncode == 0, result.stderr
    records = {record["variant"]: record for record in json.loads(path.read_text())}
    assert records["pretokenize ours"]["tokens_per_second"] > 1000
    assert records["pretokenize ours"]["peak_memory_bytes"] > 50 * 2**20
    assert 0 < records["sampler"]["share_of_step"] < 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["speed"], "must come first and be one of train, cost, data"),
        (["train", "--preset=7B"], "--preset=7B: must be one of all, 260K"),
        (["train", "--rounds=0"], "--rounds=0: must be 1 or more"),
        (["train", "--seconds=0"], "--seconds=0: must be above 0"),
        (["train", "--json=nowhere/x.json"], "there is no folder nowhere"),
        (["train", "--json=/tmp"], "--json=/tmp: a file cannot be written there"),
        (["data", "--megabytes=0"], "--megabytes=0: must be 1 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence(run_script, arguments, sentence):
    result = run_script("bench.py", *arguments)
    assert result.returncode in (1, 2) and sentence in result.stderr and "Traceback" not in result.stderr


def sleeper(device: str, milliseconds: float):
    """A variant that does one unit of work in so many milliseconds."""

    def step() -> int:
        time.sleep(milliseconds / 1000)
        return 1

    return step


def broken(device: str, message: str):
    raise RuntimeError(message)


def dying(device: str):
    os._exit(3)


def test_variants_are_measured_in_their_own_processes_and_compared_in_every_round():
    variants = [Variant(str(ms), sleeper, dict(device="cpu", milliseconds=ms)) for ms in (20, 80)]
    fast, slow = measure(variants, rounds=3, seconds=0.2).values()
    assert len(fast.rates) == len(slow.rates) == 3
    assert fast.rate / slow.rate == pytest.approx(4, rel=0.3)


def test_a_variant_that_fails_is_named_with_its_reason():
    with pytest.raises(ValueError, match="mine: RuntimeError: no such thing"):
        measure([Variant("mine", broken, dict(device="cpu", message="no such thing"))], 1, 0.1)


def second_fails(device: str):
    """The first process waits for the second, which fails."""
    if os.environ["RANK"] == "1":
        raise ValueError("no second device")
    time.sleep(600)


def test_a_process_that_fails_ends_those_that_wait_for_it():
    with pytest.raises(ValueError, match="pair: ValueError: no second device"):
        measure([Variant("pair", second_fails, dict(device="cpu"), processes=2)], 1, 0.1)


def test_a_text_without_stories_is_refused(run_script, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    result = run_script("bench.py", "data", f"--input={tmp_path / 'empty.txt'}")
    assert result.returncode == 1 and "there is no text in it" in result.stderr


def test_the_default_vocabulary_can_be_learned_from_the_default_text():
    config = DataBench()
    stories = distinct_stories(config)
    assert train_sentencepiece(take(stories, TO_LEARN_FROM), config.vocab_size)


def test_a_variant_whose_process_dies_ends_the_measurement():
    with pytest.raises(ValueError, match="mine: its process died"):
        measure([Variant("mine", dying, dict(device="cpu"))], 1, 0.1)
