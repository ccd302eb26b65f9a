"""What a policy or critic answered, checked: a foreign one's mistake is told here, by its name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_engine.models import Critic, Heads, Policy

__all__ = ["described", "heads_of", "values_of"]


def heads_of(policy: Policy, tokens: Tensor, mask: Tensor) -> Heads:
    """`policy(tokens, mask)`. Raises TypeError if that is not `Heads` of the right shapes."""
    heads = policy(tokens, mask)
    fault = _fault(heads, tuple(tokens.shape))
    if fault:
        raise TypeError(
            f"the policy, a {type(policy).__name__}, returned {fault}. For {tuple(tokens.shape)} tokens return "
            f"Heads(logits={_shape(tokens, 'V')}), or Heads(hidden={_shape(tokens, 'H')}, weight=[V, H], bias=[V] or "
            f"None), and values={_shape(tokens)} if it has a value head"
        )
    return heads


def values_of(critic: Critic, tokens: Tensor, mask: Tensor) -> Tensor:
    """`critic(tokens, mask)`. Raises TypeError if that is not one number per position."""
    values: Any = critic(tokens, mask)
    if not isinstance(values, Tensor) or values.shape != tokens.shape:
        raise TypeError(
            f"the critic, a {type(critic).__name__}, returned {described(values)}; return one number per position, a "
            f"tensor of shape {_shape(tokens)}"
        )
    return values


def _fault(heads: Any, positions: tuple[int, ...]) -> str:
    """What is wrong with a policy's answer, or nothing."""
    if not isinstance(heads, Heads):
        return described(heads)
    if heads.logits is None and (heads.hidden is None or heads.weight is None):
        return "Heads without logits, and without hidden and weight"
    per_token = {"logits": heads.logits} if heads.logits is not None else {"hidden": heads.hidden}
    for name, column in per_token.items():
        if not isinstance(column, Tensor) or column.dim() != 3 or column.shape[:2] != positions:
            return f"Heads with {name} as {described(column)}"
    if heads.logits is None:
        hidden, weight, bias = heads.hidden, heads.weight, heads.bias
        assert hidden is not None and weight is not None
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
            return f"Heads with hidden as {described(hidden)} and weight as {described(weight)}"
        if bias is not None and bias.shape != weight.shape[:1]:
            return f"Heads with weight as {described(weight)} and bias as {described(bias)}"
    if heads.values is not None and heads.values.shape != positions:
        return f"Heads with values as {described(heads.values)}"
    return ""


def described(answer: Any) -> str:
    """What an answer is, in words."""
    return f"a tensor of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"


def _shape(tokens: Tensor, *more: str) -> str:
    return f"[{', '.join([*map(str, tokens.shape), *more])}]"
