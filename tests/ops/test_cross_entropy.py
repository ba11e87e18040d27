import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import ModelArgs, Transformer
from ops import cross_entropy
from ops.cross_entropy import linear_cross_entropy

N, C, V = 37, 11, 53


def inputs(dtype=torch.float64, ignore_index=-1):
    """hidden (N, C), weight (V, C) and targets (N,), some of them to be left out."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = ignore_index
    return hidden, weight, targets


def reference(hidden, weight, targets, ignore_index=-1):
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=ignore_index)


def value_and_gradients(function, hidden, weight, targets, **options):
    value = function(hidden, weight, targets, **options)
    return value.detach(), *torch.autograd.grad(3 * value, (hidden, weight))


@pytest.mark.parametrize("ignore_index", [-1, -100, 7])
@pytest.mark.parametrize("elements", [1, 3 * V + 1, 36 * V, 37 * V, 2**24])
def test_value_and_gradients_equal_the_plain_loss(elements, ignore_index, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    tensors = inputs(ignore_index=ignore_index)
    results = value_and_gradients(linear_cross_entropy, *tensors, ignore_index=ignore_index)
    expected = value_and_gradients(reference, *tensors, ignore_index=ignore_index)
    torch.testing.assert_close(results, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("elements", [1, 2**24])
def test_without_targets_loss_and_gradients_are_zero(elements, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    hidden, weight, targets = inputs()
    value, *gradients = value_and_gradients(
        linear_cross_entropy, hidden, weight, torch.full_like(targets, -1)
    )
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_huge_logits_do_not_overflow():
    hidden, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        hidden *= 1e4
    results = value_and_gradients(linear_cross_entropy, hidden, weight, targets)
    torch.testing.assert_close(
        results, value_and_gradients(reference, hidden, weight, targets), rtol=1e-4, atol=1e-2
    )


def test_bfloat16_autocast_is_close_and_keeps_gradients_in_float32():
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = value_and_gradients(linear_cross_entropy, hidden, weight, targets)
    expected = value_and_gradients(reference, hidden, weight, targets)
    assert [tensor.dtype for tensor in results] == [torch.float32] * 3
    torch.testing.assert_close(results, expected, rtol=0.02, atol=0.01)
    assert not torch.equal(results[0], expected[0])  # else autocast was not in force


def test_in_bfloat16_the_sums_over_chunks_are_kept_in_float32(monkeypatch):
    """Sums in bfloat16 stop growing after some hundred terms."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
    hidden, weight, targets = inputs(torch.bfloat16)
    repeated = hidden.detach().repeat(40, 1).requires_grad_()
    value, _, weight_grad = value_and_gradients(
        linear_cross_entropy, repeated, weight, targets.repeat(40)
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected, _, expected_grad = value_and_gradients(reference, *exact, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        [value.double(), weight_grad.double()], [expected, expected_grad], rtol=0.02, atol=0.003
    )


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed(without):
    tensors = inputs()
    expected = linear_cross_entropy(*tensors).detach()
    with without(), FlopCounterMode(display=False) as counter:
        value = linear_cross_entropy(*tensors)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    assert counter.get_total_flops() == 2 * N * V * C


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_are_never_held_whole(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 4 * V)
    hidden, weight, targets = inputs()
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest.elements == max(4 * V, N * C, V * C) < N * V


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_it_is_the_same(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 20 * V)
    tensors = inputs(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    results = value_and_gradients(compiled, *tensors)
    torch.testing.assert_close(results, value_and_gradients(reference, *tensors))


def tiny_model(tied: bool) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=V, max_seq_len=8, tie_embeddings=tied)
    )


def test_gradients_of_micro_batches_sum_to_those_of_the_batch():
    tokens = torch.randint(V, (8, 9), generator=torch.Generator().manual_seed(0))
    whole, parts = tiny_model(True), tiny_model(True)
    whole(tokens[:, :-1], tokens[:, 1:])[1].backward()
    for micro_batch in tokens.chunk(4):
        (parts(micro_batch[:, :-1], micro_batch[:, 1:])[1] / 4).backward()
    gradients = [[parameter.grad for parameter in model.parameters()] for model in (whole, parts)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)


def test_the_gradient_of_tied_weights_sums_both_uses():
    tokens = torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(0))
    tied, untied = tiny_model(True), tiny_model(False)
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    both = untied.tok_embeddings.weight.grad + untied.output.weight.grad
    torch.testing.assert_close(tied.tok_embeddings.weight.grad, both, atol=1e-8, rtol=1e-5)


def test_float16_keeps_the_gradients_of_unlikely_tokens():
    """Divided by the number of targets, in float16, they would all be 0."""
    hidden, weight, targets = (
        torch.randn(4096, 16),
        torch.randn(1024, 16) * 0.02,
        torch.randint(0, 512, (4096,)),
    )
    scale, gradients = 2.0**16, []
    for dtype in (torch.float32, torch.float16):
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
            (linear_cross_entropy(hidden, leaf, targets) * scale).backward()
        gradients.append(leaf.grad)
    exact, half = gradients
    assert half[512:].count_nonzero() == half[512:].numel()
    assert (half - exact).norm() < 5e-3 * exact.norm()
