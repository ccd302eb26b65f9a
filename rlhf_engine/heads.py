"""What a policy or critic answered, checked: a foreign one's mistake is told here, by its name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_engine.models import Critic, Heads, Policy

__all__ = ["described", "heads_of", "values_of"]


def heads_of(policy: Policy, tokens: Tensor, mask: Tensor) -> Heads:
    """`policy(tokens, mask)`. Raises TypeError if that is not `Heads` for these tokens, and names the policy in
    whatever it raises itself."""
    try:
        heads: Any = policy(tokens, mask)
    except Exception as error:
        error.add_note(f"raised by the policy, a {type(policy).__name__}, for tokens of shape {tuple(tokens.shape)}")
        raise
    fault = _fault(heads, tokens)
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


def _fault(heads: Any, tokens: Tensor) -> str:
    """What is wrong with a policy's answer, or nothing. That its parts fit together, `Heads` has checked itself."""
    if not isinstance(heads, Heads):
        return described(heads)
    name, column = ("hidden", heads.hidden) if heads.logits is None else ("logits", heads.logits)
    assert column is not None
    return "" if column.shape[:2] == tokens.shape else f"Heads with {name} as {described(column)}"


def described(answer: Any) -> str:
    """What an answer is, in words."""
    return f"a tensor of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"


def _shape(tokens: Tensor, *more: str) -> str:
    return f"[{', '.join([*map(str, tokens.shape), *more])}]"
