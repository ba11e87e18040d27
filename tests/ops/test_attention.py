import math

import pytest
import torch

from ops.attention import (
    MAX_BLOCKS,
    MIN_BLOCK_ROWS,
    causal_attention,
    row_blocks,
    single_query_attention,
)


def reference(q, k, v):
    """softmax(q @ k.T) @ v with the future masked, as the definition says."""
    scores = q @ k.transpose(-2, -1)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def draw(length: int, dtype=torch.float64, transposed=False):
    """q, k, v and the gradient of the output, (B 2, H 3, T length, D 8)."""
    generator = torch.Generator().manual_seed(length)
    shape = (2, length, 3, 8) if transposed else (2, 3, length, 8)
    drawn = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)
    ]
    drawn = [x.transpose(1, 2) if transposed else x for x in drawn]
    return [x.detach().requires_grad_() for x in drawn[:3]], drawn[3]


def results(attention, inputs, output_grad) -> list:
    """The output, and the gradients of q, k and v."""
    output = attention(*inputs)
    return [output, *torch.autograd.grad(output, inputs, output_grad)]


@pytest.mark.parametrize(
    "length", [1, 2, MIN_BLOCK_ROWS - 1, MIN_BLOCK_ROWS, MIN_BLOCK_ROWS + 1, 200, 256, 600]
)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_output_and_gradients_are_those_of_the_definition(length, transposed):
    inputs, output_grad = draw(length, transposed=transposed)
    outputs, expected = (
        results(attention, inputs, output_grad) for attention in (causal_attention, reference)
    )
    for output, reference_output in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference_output, rtol=1e-10, atol=1e-10)


def test_in_bfloat16_it_is_as_exact_as_the_definition():
    inputs, output_grad = draw(200, torch.bfloat16)
    exact = results(reference, [x.double() for x in inputs], output_grad.double())
    outputs, expected = (
        results(attention, inputs, output_grad) for attention in (causal_attention, reference)
    )
    for output, rounded, true in zip(outputs, expected, exact, strict=True):
        assert (output - true).abs().mean() <= 1.3 * (rounded - true).abs().mean()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 512, 513, 2048])
def test_the_blocks_cover_every_row_once_and_are_few(length):
    blocks = row_blocks(length)
    rows = [row for start, stop in blocks for row in range(start, stop)]
    assert rows == list(range(length))
    assert len(blocks) <= MAX_BLOCKS


def test_no_position_sees_the_future():
    (q, k, v), _ = draw(150)
    before = causal_attention(q, k, v)
    with torch.no_grad():
        k[:, :, 100:] += 1
        v[:, :, 100:] -= 1
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


def test_dropout_zeroes_weights_and_scales_the_others():
    """With ones for values the output is the sum of the remaining weights."""
    q, k = torch.zeros(2, 64, 4, 256, 8)
    v = torch.ones(64, 4, 256, 8)
    torch.manual_seed(0)
    last = causal_attention(q, k, v, dropout=0.25)[:, :, -1]  # 256 equal weights
    remaining = last * 256 * 0.75
    torch.testing.assert_close(remaining, remaining.round(), rtol=0, atol=1e-3)
    assert remaining[..., 0].mean().item() == pytest.approx(0.75 * 256, rel=0.01)


def test_gradients_with_dropout_use_the_same_mask():
    inputs, output_grad = draw(300)
    mask = {}

    def masked_reference(q, k, v):
        scores = q @ k.transpose(-2, -1)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, -math.inf).softmax(-1) * mask["remaining"]) @ v

    def dropped(q, k, v):
        torch.manual_seed(3)
        return causal_attention(q, k, v, dropout=0.3)

    # With the identity for values the output is the weights themselves: so the mask is read off.
    q, k, _ = inputs
    identity = torch.eye(300, dtype=torch.float64).expand(2, 3, 300, 300)
    whole = causal_attention(q, k, identity)
    mask["remaining"] = torch.where(
        whole > 0, dropped(q, k, identity) / whole.clamp(min=1e-300), 0
    ).detach()
    assert (mask["remaining"][whole > 0] == 0).double().mean().item() == pytest.approx(
        0.3, abs=0.01
    )
    for output, reference_output in zip(
        results(dropped, inputs, output_grad),
        results(masked_reference, inputs, output_grad),
        strict=True,
    ):
        torch.testing.assert_close(output, reference_output, rtol=1e-10, atol=1e-10)


def test_without_gradients_the_output_is_the_same():
    inputs, _ = draw(130)
    with torch.no_grad():
        alone = causal_attention(*inputs)
    assert torch.equal(alone, causal_attention(*inputs))


@pytest.mark.parametrize("lengths", [None, [1, 5, 12]], ids=["all alike", "different lengths"])
def test_single_query_attention_follows_the_mask(lengths):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, 2, count, 8, generator=generator) for count in (4, 12, 12))
    mask = (
        None if lengths is None else torch.arange(12) < torch.tensor(lengths)[:, None, None, None]
    )
    scores = q @ k.transpose(-2, -1)
    expected = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v
    torch.testing.assert_close(single_query_attention(q, k, v, mask), expected)
