import pytest
import torch

from ops.quantized_linear import Int8Linear, PackedLinear, int8_matvec


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_one_row_gives_the_same_product_as_many(dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(5, 7, 64) * torch.rand(5, 7, 1) * 10
    layer = Int8Linear(weight) if dtype == "int8" else PackedLinear(weight, 1)
    y = layer(x)
    assert y.shape == (5, 7, 96)
    for row in range(5):
        one_row = layer(x[row : row + 1, 3:4])[0, 0]
        torch.testing.assert_close(one_row, y[row, 3], atol=1e-5, rtol=1e-5)


SHAPES = [(7, 64), (98, 48), (96, 18), (96, 32), (9000, 64), (9003, 64), (9002, 64)]


@pytest.mark.parametrize("out_features, in_features", SHAPES)
def test_int8_matvec_is_exact_for_any_number_of_streams(out_features, in_features):
    torch.manual_seed(0)
    x = torch.randint(-127, 128, (20, in_features), dtype=torch.int8)
    weight = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    expected = torch._int_mm(x, weight.t())
    assert torch.equal(int8_matvec(x[3:4].float(), weight), expected[3:4].float())


def test_int8_error_is_within_the_rounding_of_8_bits():
    torch.manual_seed(0)
    weight, x = torch.randn(50, 64), torch.randn(20, 64)
    weight[7] = 0
    weight_scale = weight.abs().amax(1) / 127
    x_scale = x.abs().amax(1, keepdim=True) / 127
    layer = Int8Linear(weight)
    from_x = x_scale * (layer.weight.float().abs().sum(1) * weight_scale)
    from_weight = x.abs().sum(1)[:, None] * weight_scale
    error = (layer(x) - x @ weight.t()).abs()
    assert (error <= 0.5 * (from_x + from_weight) + 1e-5).all()
    assert layer(torch.zeros(1, 64)).abs().max() == 0
