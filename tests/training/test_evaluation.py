import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch

from checkpoints.file import save_checkpoint, write_model_args
from formats import llama2c
from formats.lazy_model import from_model
from formats.registry import open_model
from model import ModelArgs, Transformer
from runtime.distributed import DistContext
from textdata.token_shards import TokenDataset
from training.evaluation import EvalResult, EvalSettings, evaluate

SEQ_LEN = 32


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    args = ModelArgs(
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=512,
        max_seq_len=SEQ_LEN,
        dropout=0.3,
    )
    model = Transformer(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model.eval()


@pytest.fixture
def quality_of(token_folder, tokenizer):
    """quality_of(model) on the whole validation split, or as the options say."""

    def measure(model, batch_size=8, num_batches=0, dtype="float32", dist_ctx=None, split="val"):
        windows = TokenDataset(token_folder, split, SEQ_LEN, include_partial=True)
        settings = EvalSettings(tokenizer.byte_counts, batch_size, num_batches, "cpu", dtype)
        if dist_ctx is not None:
            settings = dataclasses.replace(settings, dist_ctx=dist_ctx)
        return evaluate(model, windows, settings)

    return measure


def validation_tokens(folder: str) -> list[list[int]]:
    """The validation part of each shard, read without our reader."""
    with open(f"{folder}/meta.json", encoding="utf-8") as file:
        meta = json.load(file)
    return [
        np.fromfile(f"{folder}/{shard['file']}", meta["dtype"])[slice(*shard["val"])].tolist()
        for shard in meta["shards"]
    ]


@torch.no_grad()
def nats_of_each_token(model, tokens: list[int]) -> list[float]:
    nats = []
    for start in range(0, len(tokens) - 1, SEQ_LEN):
        window = torch.tensor([tokens[start : start + SEQ_LEN + 1]])
        log_probs = model(window[:, :-1])[0].double().log_softmax(-1)[0]  # (T, V)
        nats += [-log_probs[t, token].item() for t, token in enumerate(window[0, 1:].tolist())]
    return nats


def test_evaluation_counts_every_token_and_byte_of_the_split(
    model, quality_of, token_folder, tokenizer
):
    """llama2.c #475: nobody could reproduce a published loss."""
    shards = validation_tokens(token_folder)
    nats = [nat for tokens in shards for nat in nats_of_each_token(model, tokens)]
    text = "".join(tokenizer.decode(tokens) for tokens in shards)
    quality = quality_of(model)
    assert (
        len(nats) == sum(map(len, shards)) - len(shards) > 1000
    )  # a shard's first token is not predicted
    assert quality.loss == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    assert quality.bits_per_byte == pytest.approx(
        sum(nats) / math.log(2) / len(text.encode()), rel=1e-6
    )
    assert quality.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 200])
def test_the_figures_do_not_depend_on_the_batch_size(batch_size, model, quality_of):
    assert quality_of(model, batch_size) == pytest.approx(quality_of(model, 5), rel=1e-6)


def test_more_batches_than_there_are_give_the_whole_split(model, quality_of):
    assert quality_of(model, num_batches=10_000) == quality_of(model)


def test_every_evaluation_reads_the_same_batches_across_the_split(model, quality_of):
    some = quality_of(model, num_batches=4)
    assert some == quality_of(model, num_batches=4) != quality_of(model)
    assert some.loss == pytest.approx(quality_of(model).loss, rel=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_random_state_and_mode_without_dropout(training, model, quality_of):
    expected = quality_of(model)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert quality_of(model.train(training)) == expected
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    model.eval()


def test_a_checkpoint_and_the_exported_file_have_the_same_figures(model, quality_of, tmp_path):
    checkpoint = dict(model=model.state_dict(), model_args=write_model_args(model.args), iter_num=0)
    save_checkpoint(str(tmp_path / "ckpt.pt"), checkpoint)
    llama2c.write(from_model(model), str(tmp_path / "model.bin"))
    for name in ("ckpt.pt", "model.bin"):
        assert quality_of(open_model(str(tmp_path / name)).load()) == quality_of(model)


@pytest.mark.parametrize("size", [2, 3])
def test_the_shares_of_several_processes_add_up_to_the_whole(size, model, quality_of, token_folder):
    shares = []

    class Recorded(DistContext):
        def all_reduce_sum(self, values):
            shares.append(values)
            return values

    for rank in range(size):
        quality_of(model, dist_ctx=Recorded(rank, rank, size))
    nats, tokens, text_bytes = map(sum, zip(*shares, strict=True))
    assert tokens == sum(
        len(tokens) - 1 for tokens in validation_tokens(token_folder)
    )  # and none twice
    together = nats / tokens, nats / math.log(2) / text_bytes
    assert together == pytest.approx(quality_of(model), rel=1e-6)


def test_bfloat16_is_close_to_float32(model, quality_of):
    low = quality_of(model, dtype="bfloat16")
    assert low == pytest.approx(quality_of(model), rel=0.01)
    assert low != quality_of(model)


def test_perplexity_has_an_end():
    assert math.isfinite(EvalResult(loss=1e6, bits_per_byte=1.0).perplexity)
