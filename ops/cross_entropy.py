"""
Linear layer and cross-entropy in one function, chunk by chunk.

The logits of a batch, (tokens, V), are the largest activation of a small model with a large
vocabulary, and the usual loss holds several copies of them. Here only one chunk of logits exists at
a time. The forward pass computes its loss and its gradients at once, and the backward pass only
scales the gradients. No logits are computed twice.

Shapes: N tokens, C width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch

CHUNK_ELEMENTS = 2**24  # logits in a chunk: 64 MB in float32


class ChunkedLoss(NamedTuple):
    """The mean loss, and the gradients of the loss's sum (None if they were not asked for)."""

    loss: torch.Tensor  # scalar
    hidden_grad: torch.Tensor | None  # (N, C)
    weight_grad: torch.Tensor | None  # (V, C)
    num_targets: torch.Tensor  # scalar, those in the mean


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    need_grad: bool,
) -> ChunkedLoss:
    """The loss of linear_cross_entropy. Matrix products run in dtype; the gradients are computed
    in the same pass, since each chunk's logits are gone afterwards."""
    acc_dtype = torch.promote_types(dtype, torch.float32)  # of the softmax and of all sums
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    num_targets = (targets != ignore_index).sum().clamp(min=1)
    loss = torch.zeros((), dtype=acc_dtype, device=hidden.device)
    hidden_grads = []
    weight_grad = torch.zeros_like(weight, dtype=acc_dtype) if need_grad else None
    # Comparing int32 token ids takes half the time of int64.
    token_ids = torch.arange(weight.shape[0], device=hidden.device, dtype=torch.int32)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        valid = target != ignore_index  # (rows,)
        logits_lp = chunk @ weight.T  # (rows, V), in low precision
        logits = logits_lp.to(acc_dtype)
        log_sum = logits.logsumexp(-1)  # (rows,)
        target_logit = logits_lp.gather(1, target.where(valid, 0)[:, None])[:, 0].to(acc_dtype)
        loss += torch.where(valid, log_sum - target_logit, 0).sum()
        if weight_grad is not None:
            # d loss / d logits = (softmax - one hot) / num_targets. The backward pass divides:
            # here, so small a number would underflow in float16.
            onehot = token_ids == target.to(torch.int32)[:, None]
            logits_grad = (logits - log_sum[:, None]).exp()  # softmax
            logits_grad = (logits_grad - onehot.to(acc_dtype)) * valid[:, None]
            logits_grad = logits_grad.to(dtype)
            hidden_grads.append(logits_grad @ weight)
            weight_grad += (logits_grad.T @ chunk).to(acc_dtype)
    return ChunkedLoss(
        loss / num_targets,
        torch.cat(hidden_grads) if need_grad else None,
        weight_grad,
        num_targets,
    )


class LinearCrossEntropy(torch.autograd.Function):
    """chunked_cross_entropy as a differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Map hidden (N, C), weight (V, C) and targets (N,) to the mean loss, a scalar."""
        ctx.dtypes = hidden.dtype, weight.dtype
        result = chunked_cross_entropy(hidden, weight, targets, ignore_index, dtype, need_grad=True)
        ctx.save_for_backward(result.hidden_grad, result.weight_grad, result.num_targets)
        return result.loss

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """Map the gradient of the loss to those of hidden (N, C) and weight (V, C)."""
        hidden_grad, weight_grad, num_targets = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        grad = grad / num_targets
        hidden_grad = (hidden_grad * grad).to(hidden_dtype)
        weight_grad = (weight_grad * grad).to(weight_dtype)
        return hidden_grad, weight_grad, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int = -1
) -> torch.Tensor:
    """Mean cross-entropy in nats of softmax(hidden @ weight.T) against targets, as a scalar.

    hidden is (N, C), weight (V, C), and targets (N,) holds token ids. Targets equal to ignore_index
    count neither in the loss nor in the mean. Under autocast the matrix products run in its dtype,
    the softmax and the sums in float32."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            return LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, dtype)
        return chunked_cross_entropy(
            hidden, weight, targets, ignore_index, dtype, need_grad=False
        ).loss
