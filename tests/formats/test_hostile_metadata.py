"""Values of model files that are printed in messages although their type is wrong."""

import json
import os

import pytest
import torch

from formats.registry import open_model
from tests.tools.fuzz_readers import write_small_model


@pytest.mark.parametrize("key", [5, (1, 2), None])
@pytest.mark.parametrize(
    "target, name", [("meta", "consolidated.00.pth"), ("hf", "pytorch_model.bin")]
)
def test_a_weight_whose_name_is_no_text_is_refused(tmp_path, target, name, key):
    """It was an AttributeError."""
    path = str(tmp_path / "model")
    write_small_model(path, target, tie_embeddings=False)
    if target == "hf":
        os.remove(os.path.join(path, "model.safetensors"))
    torch.save(
        {
            "tok_embeddings.weight": torch.ones(2, 2),
            "output.weight": torch.ones(2, 2),
            key: torch.ones(2),
        },
        os.path.join(path, name),
    )
    with pytest.raises(ValueError, match="not a state dict"):
        open_model(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_very_large_json_file_is_refused(tmp_path, name):
    """tokenizer.json was read without a limit for its post-processor."""
    path = str(tmp_path / "model")
    write_small_model(path, "hf", tie_embeddings=False)
    with open(os.path.join(path, name), "ab") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(ValueError, match=f"{name}: too large"):
        open_model(path).read_metadata()


def nested(depth: int) -> str:
    return "[" * depth + "1" + "]" * depth


@pytest.mark.parametrize(
    "target, name, keys",
    [
        (
            "hf",
            "config.json",
            ("model_type", "hidden_act", "head_dim", "rope_scaling", "vocab_size"),
        ),
        ("meta", "params.json", ("dim", "norm_eps", "rope_theta", "use_scaled_rope")),
    ],
)
def test_a_deeply_nested_value_is_refused_in_one_sentence(tmp_path, target, name, keys):
    """JSON of 950 levels could be read but not printed, a RecursionError."""
    path = str(tmp_path / "model")
    write_small_model(path, target, tie_embeddings=False)
    file = os.path.join(path, name)
    with open(file, encoding="utf-8") as text:
        config = json.load(text)
    for key in keys:
        for depth in (1, 100, *range(800, 1000, 10), 100_000):
            content = json.dumps(config | {key: "VALUE"}).replace('"VALUE"', nested(depth))
            with open(file, "w", encoding="utf-8") as text:
                text.write(content)
            with pytest.raises(ValueError) as error:
                open_model(path)
            assert str(error.value).startswith(path) and len(str(error.value)) < 400
