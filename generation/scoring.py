"""
How likely a model finds a text that is there already. No files here.
"""

import torch

from generation.engine import check_numbers, window_start
from model import Transformer

SCORED_AT_ONCE = 256  # positions, whose logits are in memory together


@torch.inference_mode()
def log_probabilities(model: Transformer, tokens: list[int]):
    """The natural logarithm of each token's probability after those before it, as a Decoder sees
    them: (len(tokens) - 1,), float32, none for the first token."""
    longest, device, found = model.args.max_seq_len, model.tok_embeddings.weight.device, []
    ids, predicted = torch.tensor([tokens], device=device), 0
    while predicted < len(tokens) - 1:
        start = window_start(predicted + 1, longest)
        end = min(
            start + longest, len(tokens) - 1
        )  # the positions from start to end predict the next ones
        cache = model.new_kv_cache(1, end - start, model.tok_embeddings.weight.dtype)
        for first in range(start, end, SCORED_AT_ONCE):
            last = min(first + SCORED_AT_ONCE, end)
            logits, _ = model(ids[:, first:last], cache=cache, start_pos=first - start)
            likely = (
                logits[0].float().log_softmax(-1).gather(-1, ids[0, first + 1 : last + 1, None])
            )
            check_numbers(likely)
            found.append(likely[max(0, predicted - first) :, 0])
        predicted = end
    return torch.cat(found) if found else torch.zeros(0)
