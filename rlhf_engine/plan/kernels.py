"""The least bytes and FLOPs of each operation of `rlhf_kernels`: what must be read and written once, and multiplied.

N tokens, V the vocabulary, H the hidden size, w bytes a number of the inputs; per token there are 4 bytes for a
float32 number and 1 for the mask. Backward reads its inputs again and writes a gradient of each.

    token_logprobs        N V w forward, three times that with backward
    exact_kl              2 N V w forward; with backward both read again and one gradient written: 5 N V w
    linear_logprobs       (N + V) H w, three times that with backward; 2 N V H FLOPs forward, and 4 backward; where the
                          logits are computed again, 2 more
    linear_policy_loss    2 (N + V) H w and 6 N V H: the gradients are formed in the forward pass
    shaped_gae            29 N: log-probs, reference's, values, mask; rewards, KL, advantages, returns
    gae                   17 N: rewards, values, mask; advantages, returns
    policy_loss           13 N forward (log-probs old and new, advantages, mask), 4 N for the gradient, formed with it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

__all__ = ["KERNELS", "Work", "kernel_work"]


@dataclass(frozen=True)
class Work:
    """Bytes through memory, and FLOPs of matrix products."""

    bytes: float
    flops: float = 0.0


def per_token(forward: float, backward: float = 0.0) -> Callable[..., Work]:
    """An operation on one number a token: bytes a token forward, and backward besides."""

    def work(shape: tuple[int, ...], width: int, with_backward: bool) -> Work:
        return Work(prod(shape) * (forward + (backward if with_backward else 0)))

    return work


def token_logprobs(shape: tuple[int, ...], width: int, with_backward: bool) -> Work:
    """[..., V]."""
    return Work(prod(shape) * width * (3 if with_backward else 1))


def exact_kl(shape: tuple[int, ...], width: int, with_backward: bool) -> Work:
    """[..., V], twice."""
    return Work(prod(shape) * width * (5 if with_backward else 2))


def linear_logprobs(shape: tuple[int, ...], width: int, with_backward: bool) -> Work:
    """[N, H, V]; the logits are not computed a second time."""
    tokens, hidden, vocabulary = shape
    times = 3 if with_backward else 1
    return Work((tokens + vocabulary) * hidden * width * times, 2.0 * prod(shape) * times)


def linear_policy_loss(shape: tuple[int, ...], width: int, with_backward: bool = True) -> Work:
    """[N, H, V]."""
    tokens, hidden, vocabulary = shape
    return Work((tokens + vocabulary) * hidden * width * 2, 6.0 * prod(shape))


KERNELS: dict[str, Callable[..., Work]] = {
    "token_logprobs": token_logprobs,
    "exact_kl": exact_kl,
    "linear_logprobs": linear_logprobs,
    "linear_policy_loss": linear_policy_loss,
    "gae": per_token(17),
    "shaped_gae": per_token(29),
    "policy_loss": per_token(13, 4),
    "value_loss": per_token(13, 4),
    "kl_estimate": per_token(12, 12),
    "masked_mean": per_token(5, 5),
    "masked_whiten": per_token(9),
}


def kernel_work(operation: str, shape: tuple[int, ...], width: int, *, backward: bool) -> Work | None:
    """Of one call; None for an operation whose cost nobody wrote down here."""
    formula = KERNELS.get(operation)
    return formula(shape, width, backward) if formula else None
