import copy
import functools
import itertools
import math
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ops.attention as attention_module
from model import ModelArgs, Transformer, flops_per_token
from tests import helpers
from tests.helpers import to_transformers

TINY = helpers.REFERENCE_MODEL
random_model = functools.partial(helpers.random_model, TINY, 0.2)


def random_tokens(*shape) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[512, 0], ids=["blockwise", "fused"])
def attention(request, monkeypatch):
    """Both ways to compute attention on a CPU."""
    monkeypatch.setattr(attention_module, "BLOCKWISE_ATTENTION_MAX_LEN", request.param)


@pytest.mark.parametrize("rope_theta", [10000.0, 500000.0])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_logits_equal_those_of_transformers(n_kv_heads, tied, rope_theta, attention):
    model = random_model(
        n_kv_heads=n_kv_heads, tie_embeddings=tied, rope_theta=rope_theta, max_seq_len=160
    )
    tokens = random_tokens(2, 160)
    with torch.no_grad():
        logits, loss = model(tokens)
        expected = to_transformers(model)(tokens).logits
    assert loss is None and logits.shape == (2, 160, TINY["vocab_size"])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_norm_eps_has_the_meaning_that_transformers_gives_it():
    model, tokens = random_model(norm_eps=0.1), random_tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens)[0], to_transformers(model)(tokens).logits, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("changed", [1, 20, 39])
def test_a_token_changes_no_logits_before_it(changed, attention):
    model, tokens = random_model(n_kv_heads=2), random_tokens(2, 40)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % TINY["vocab_size"]
    with torch.no_grad():
        before, after = model(tokens)[0], model(other)[0]
    torch.testing.assert_close(before[:, :changed], after[:, :changed], atol=1e-6, rtol=0)
    assert ((before - after).abs().amax((0, 2))[changed:] > 1e-4).all()  # and all from there on


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("seed", range(5))
def test_logits_through_the_cache_equal_those_without(seed, n_kv_heads, attention):
    model, tokens = random_model(n_kv_heads=n_kv_heads), random_tokens(3, 40)
    cuts = [0, *sorted(random.Random(seed).sample(range(1, 40), 1 + 3 * seed)), 40]
    cache = model.new_kv_cache(3, 40)
    with torch.no_grad():
        whole, _ = model(tokens)
        pieces = [
            model(tokens[:, a:b], cache=cache, start_pos=a)[0] for a, b in itertools.pairwise(cuts)
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_used_cache_gives_the_logits_of_a_new_one():
    model, tokens = random_model(), random_tokens(2, 40)
    cache = model.new_kv_cache(2, 40)
    with torch.no_grad():
        model(tokens.flip(1), cache=cache)
        model(tokens[:, :7], cache=cache)
        again, _ = model(tokens[:, 7:8], cache=cache, start_pos=7)
        torch.testing.assert_close(again[:, 0], model(tokens)[0][:, 7], atol=1e-5, rtol=1e-5)


def test_blockwise_and_fused_attention_have_the_same_gradients(monkeypatch):
    tokens, gradients = random_tokens(2, 41), []
    for longest in (512, 0):
        monkeypatch.setattr(attention_module, "BLOCKWISE_ATTENTION_MAX_LEN", longest)
        model = random_model(n_kv_heads=2)
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def gradients_and_saved_bytes(model: Transformer, tokens) -> tuple[list, int]:
    """The gradients of a training step, and the bytes that its forward pass saved for them."""
    weights, saved = {p.data_ptr() for p in model.parameters()}, {}

    def save(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()], sum(saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_saves_memory_and_keeps_the_gradients(dropout, attention):
    model = random_model(n_layers=4, dropout=dropout).train()
    tokens = random_tokens(3, 40)
    expected, saved = gradients_and_saved_bytes(model, tokens)
    model.activation_checkpointing = True
    gradients, saved_bytes = gradients_and_saved_bytes(model, tokens)
    assert all(map(torch.equal, gradients, expected))
    assert saved_bytes < saved / 3


def test_the_loss_is_the_mean_cross_entropy_of_the_logits():
    model, tokens = random_model(), random_tokens(2, 41)
    targets = tokens[:, 1:].clone()
    targets[0, 5:] = -1
    with torch.no_grad():
        logits, loss = model(tokens[:, :-1], targets)
        whole, _ = model(tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(
        whole.flatten(0, 1), targets.flatten(), ignore_index=-1
    )
    assert logits is None
    torch.testing.assert_close(loss, expected)


def test_positions_past_max_seq_len_are_refused_by_name():
    model = random_model()
    with pytest.raises(ValueError, match="max_seq_len=40"):
        model(random_tokens(1, 41))
    with pytest.raises(ValueError, match="max_seq_len=40"):
        model(random_tokens(1, 1), cache=model.new_kv_cache(1, 40), start_pos=40)


def test_dropout_acts_in_training_only(attention):
    model, tokens = random_model(dropout=0.5), random_tokens(2, 20)
    plain = random_model()
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], plain(tokens)[0])
        model.train()
        assert not torch.allclose(model(tokens)[0], model(tokens)[0], atol=1e-2)


def test_dropout_reaches_the_weights_of_attention(attention):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 20, 8, generator=generator)  # each (B, n_heads, T, head_dim)
    attend = attention_module.dot_product_attention
    assert torch.equal(attend(q, k, v), attend(q, k, v))
    assert not torch.allclose(attend(q, k, v, None, 0.5), attend(q, k, v, None, 0.5), atol=1e-2)


@pytest.mark.parametrize("is_training", [False, True])
def test_attention_has_dropout_in_training_only(is_training, monkeypatch):
    probabilities = []
    attend = attention_module.dot_product_attention

    def spy(q, k, v, mask, dropout):
        probabilities.append(dropout)
        return attend(q, k, v, mask, dropout)

    monkeypatch.setattr("model.dot_product_attention", spy)
    random_model(dropout=0.5).train(is_training)(random_tokens(1, 5))
    assert set(probabilities) == {0.5 if is_training else 0.0}


@pytest.mark.parametrize("n_layers", [1, 3, 8])
def test_init_scales_wo_and_w2_by_depth_and_nothing_else(n_layers):
    """llama2.c #579: the scaled deviation landed on w3."""
    torch.manual_seed(0)
    model = Transformer(
        ModelArgs(dim=128, n_layers=n_layers, n_heads=4, n_kv_heads=2, vocab_size=512)
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        residual = name.endswith((".wo.weight", ".w2.weight"))
        expected = 0.02 / math.sqrt(2 * n_layers) if residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_a_new_model_finds_all_tokens_equally_likely():
    torch.manual_seed(0)
    model, tokens = Transformer(ModelArgs(**TINY)), random_tokens(4, 41)
    assert model(tokens[:, :-1], tokens[:, 1:])[1].item() == pytest.approx(
        math.log(TINY["vocab_size"]), abs=0.05
    )


def loaded(model: Transformer) -> Transformer:
    other = Transformer(model.args)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        loaded,
        copy.deepcopy,
        lambda model: copy.deepcopy(model).to(torch.bfloat16),
        lambda model: copy.deepcopy(model).to("cpu", torch.float64),
    ],
    ids=["init", "load", "deepcopy", "to bfloat16", "to float64"],
)
def test_tied_weights_are_one_storage_after(change):
    """LLMs-from-scratch #822: tied weights silently became two."""
    model = change(random_model())
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())
    embedding = TINY["vocab_size"] * TINY["dim"]
    assert model.num_parameters() == random_model(tie_embeddings=False).num_parameters() - embedding


def test_untied_weights_are_two():
    model = random_model(tie_embeddings=False)
    assert model.output.weight.data_ptr() != model.tok_embeddings.weight.data_ptr()


@pytest.mark.parametrize(
    "name, shape",
    [
        *(
            (name, {name: 0})
            for name in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seq_len")
        ),
        *(
            (name, {name: -4})
            for name in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seq_len")
        ),
        ("n_kv_heads", dict(n_kv_heads=0)),
        ("n_kv_heads", dict(n_kv_heads=-2)),
        ("hidden_dim", dict(hidden_dim=0)),
        ("hidden_dim", dict(hidden_dim=-768)),
        ("ffn_dim_multiplier", dict(ffn_dim_multiplier=0.0)),
        ("ffn_dim_multiplier", dict(ffn_dim_multiplier=math.nan)),
        ("n_heads", dict(dim=288, n_heads=5)),
        ("n_heads", dict(dim=18, n_heads=6)),  # 3 wide, but positions turn pairs
        ("n_kv_heads", dict(n_heads=6, n_kv_heads=4)),
        ("n_kv_heads", dict(n_heads=6, n_kv_heads=12)),
        ("dropout", dict(dropout=1.0)),
        ("max_seq_len", dict(max_seq_len=True)),  # a TypeError of torch.empty
        ("hidden_dim", dict(hidden_dim=True)),
        ("dropout", dict(dropout=-0.1)),
        ("dropout", dict(dropout=math.nan)),
        ("norm_eps", dict(norm_eps=0.0)),
        ("rope_theta", dict(rope_theta=-1.0)),
        ("rope_theta", dict(rope_theta=math.nan)),
    ],
)
def test_an_impossible_shape_is_refused_by_field_name(name, shape):
    with pytest.raises(ValueError, match=name):
        ModelArgs(**shape)


@pytest.mark.parametrize(
    "published, shape",
    [
        (172, dict(dim=64, n_heads=8, multiple_of=4)),  # stories260K
        (768, dict(dim=288, n_heads=6)),  # stories15M
        (1376, dict(dim=512, n_heads=8)),  # stories42M
        (2048, dict(dim=768, n_heads=12)),  # stories110M
        (11008, dict(dim=4096, n_heads=32, multiple_of=256)),  # Llama 2 7B
        (14336, dict(dim=4096, n_heads=32, multiple_of=1024, ffn_dim_multiplier=1.3)),  # Llama 3 8B
        (100, dict(dim=64, n_heads=8, hidden_dim=100)),
    ],
)
def test_ffn_dim_is_the_published_one(published, shape):
    assert ModelArgs(**shape).ffn_dim == published


@pytest.mark.parametrize(
    "overrides", [{}, dict(n_kv_heads=1), dict(n_layers=3, tie_embeddings=False)]
)
def test_flops_per_token_equal_the_counted_ones(overrides):
    """Exactly, with plain attention and the whole square of scores; the fused kernel's backward
    pass computes the scores a second time, which is no useful work and is not in the formula."""
    model, tokens = random_model(**overrides), random_tokens(3, 41)
    with FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    assert counter.get_total_flops() == 3 * 40 * flops_per_token(model.args, 40)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_and_order_of_the_weights_are_those_of_llama2c(tied):
    parts = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
    parts += [f"feed_forward.{name}" for name in ("w1", "w2", "w3")] + [
        "attention_norm",
        "ffn_norm",
    ]
    layers = [f"layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts]
    names = ["tok_embeddings.weight", *layers, "norm.weight", "output.weight"]
    model = random_model(tie_embeddings=tied)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == (names[:-1] if tied else names)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_cache_rows_at_different_positions_do_not_mix(kv_heads):
    """Rows filled one by one, then steps of one and of three tokens in all of them at once."""
    model, lengths = random_model(n_heads=4, n_kv_heads=kv_heads), [3, 9, 1]
    tokens = random_tokens(3, 20)
    whole, _ = model(tokens)
    cache = model.new_kv_cache(5, 40)
    for row, length in enumerate(lengths):
        model.forward_hidden(
            tokens[row : row + 1, :length], cache, batch_idx=torch.tensor([4 - row])
        )
    cache.select_rows(torch.tensor([4, 3, 2]))
    starts = torch.tensor(lengths)
    for step in (1, 3, 1):
        positions = starts[:, None] + torch.arange(step)
        x = model.forward_hidden(
            tokens.gather(1, positions), cache, starts, int(starts.max()) + step
        )
        expected = whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[-1]))
        torch.testing.assert_close(model.output(x), expected, atol=1e-5, rtol=1e-5)
        starts = starts + step
