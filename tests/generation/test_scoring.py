import functools

import pytest
import torch

from generation.request import context_start
from generation.scoring import CHUNK, token_logprobs
from tests import helpers

V = helpers.GENERATION_MODEL["vocab_size"]
random_model = functools.partial(helpers.random_model, helpers.GENERATION_MODEL, 0.3)


@pytest.mark.parametrize("max_seq_len", [16, 15, 1, CHUNK + 100])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 60, CHUNK + 60])
def test_logprobs_have_the_context_that_generation_has(max_seq_len, length):
    model = random_model(max_seq_len=max_seq_len)
    tokens = torch.randint(V, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = []
    with torch.no_grad():
        for end in range(1, length):
            context = tokens[context_start(end, max_seq_len) : end]
            expected.append(model(torch.tensor([context]))[0][0, -1].log_softmax(-1)[tokens[end]])
    logprobs = token_logprobs(model, tokens)
    assert logprobs == pytest.approx([logprob.item() for logprob in expected], rel=1e-4, abs=1e-4)


def test_repeated_tokens_are_scored_in_their_own_context():
    """The cache of the previous context, which begins with the same tokens, hid some scores."""
    model = random_model(max_seq_len=64)
    tokens = [1] + [5] * 300
    scores = token_logprobs(model, tokens)
    for position in (1, 64, 100, 128, 299, 300):
        start = context_start(position, 64)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:position]]))[0][0, -1]
        assert abs(scores[position - 1] - logits.log_softmax(-1)[5].item()) < 1e-4
    assert len(scores) == 300
