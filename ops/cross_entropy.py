"""
Cross-entropy straight from the last hidden states, chunk by chunk.

The logits of a batch, (tokens, V), are by far the largest activation of a small model with a
large vocabulary, and the plain loss holds them several times over. Here only a chunk of them
exists at a time: its loss and its gradients are computed at once in the forward pass, and the
backward pass only scales them. No logits are computed twice.
"""

import torch

CHUNK_ELEMENTS = 2**24  # logits alive at a time: 64 MB in float32


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, targets, ignore_index: int, dtype: torch.dtype, need_grad: bool
    ):
        ctx.dtypes = hidden.dtype, weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # of the softmax and of all sums
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        count = (targets != ignore_index).sum().clamp(min=1)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_grad, weight_grad = [], torch.zeros_like(weight, dtype=wide) if need_grad else None
        tokens = torch.arange(
            weight.shape[0], device=hidden.device, dtype=torch.int32
        )  # half the work of int64
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            kept = target != ignore_index  # (rows,)
            narrow = chunk @ weight.T  # (rows, V)
            logits = narrow.to(wide)
            log_sum = logits.logsumexp(-1)  # (rows,)
            of_target = narrow.gather(1, target.where(kept, 0)[:, None])[:, 0].to(wide)
            loss += torch.where(kept, log_sum - of_target, 0).sum()
            if need_grad:
                # d loss / d logits = (softmax - one hot) / count, of which the division waits for
                # the backward pass: in float16 so small a number would be 0.
                is_target = tokens == target.to(torch.int32)[:, None]
                logits_grad = ((logits - log_sum[:, None]).exp() - is_target.to(wide)) * kept[
                    :, None
                ]
                logits_grad = logits_grad.to(dtype)
                hidden_grad.append(logits_grad @ weight)
                weight_grad += (logits_grad.T @ chunk).to(wide)
        ctx.save_for_backward(torch.cat(hidden_grad) if need_grad else None, weight_grad, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, weight_grad, count = ctx.saved_tensors
        grad = grad / count
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            (hidden_grad * grad).to(hidden_dtype),
            (weight_grad * grad).to(weight_dtype),
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(hidden, weight, targets, ignore_index: int = -1):
    """Mean cross-entropy in nats of softmax(hidden @ weight.T) against targets, as a scalar.

    hidden (N, C), weight (V, C), targets (N,) of token ids; a target equal to ignore_index counts
    neither in the loss nor in the mean. Under autocast the products run in its dtype, the softmax
    and the sums in float32."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return LinearCrossEntropy.apply(
            hidden, weight, targets, ignore_index, dtype, torch.is_grad_enabled()
        )
