"""Log-probabilities of given tokens (and the entropy) from logits."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _rows

# Sums of exp(x - x[token]) beyond this (a log-probability under -69) are done again from the row's maximum.
_LARGEST_SUM = 1e30


class LogProbs(NamedTuple):
    """Per token: `logp` in nats, and `entropy` of the whole distribution in nats (None unless asked for)."""

    logp: Tensor
    entropy: Tensor | None


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> LogProbs:
    """log softmax(logits / temperature)[token] for every token, without a second [..., V] tensor.

        logp = z[token] - log sum_j exp(z_j),    entropy = -sum_j p_j log p_j,    z = logits / temperature

    logits [..., V] floating, any strides; tokens [...] integer. `temperature` is a number or a tensor [...] (one per
    row) and must be the one that the tokens were sampled at; it gets no gradient. `mask` [...] bool, True = counts: a
    masked position gives exactly 0 and gets exactly 0 gradient, whatever lies under it. `entropy=True` adds the
    entropy, which is differentiable too; it does not change a bit of logp.

    Results are in nats, shape [...], float32 (float64 for float64 logits), accumulated in that dtype. A logit of -inf
    has probability 0; a row of nothing but -inf gives logp -inf, entropy 0 and gradient 0. A row's result depends on
    no other row.

    `inplace_backward=True` writes the gradient over the logits' storage: use it where nobody reads the logits after
    the backward pass. A second backward then raises. A double backward always raises.

    Raises IndexError for a counted token outside [0, V) on a CPU (on a GPU and under torch.compile its logp is NaN);
    ValueError for shapes that do not match or a temperature that is not positive; TypeError for wrong dtypes.
    """
    backend.torch_only("token_logprobs")
    _check_arguments(logits, tokens, mask)
    dtype = _check.accumulation_dtype(logits)
    inverse = _rows.inverse_temperature(temperature, tokens.shape, mask, dtype)
    if torch.compiler.is_compiling():
        return definition(logits.to(dtype), tokens, inverse, mask, entropy)

    outside = None
    if mask is not None:
        tokens = tokens.masked_fill(~mask, 0)
    if tokens.device.type == "cpu":
        _check.token_ids(tokens, logits.shape[-1])
    else:
        outside = (tokens < 0) | (tokens >= logits.shape[-1])
        tokens = tokens.masked_fill(outside, 0)
    if inplace_backward:
        _check_overwritable(logits)

    rows = _rows.rows_first(logits, tokens.numel())
    columns = (*rows.shape[:-1], 1)
    if isinstance(inverse, Tensor):
        inverse = inverse.reshape(columns)
    dead = None if mask is None else ~mask.reshape(columns[:-1])
    arguments = (rows, tokens.reshape(columns).long(), inverse, dead, entropy)
    if rows.requires_grad and torch.is_grad_enabled():
        logp, entropies = _TokenLogProbs.apply(*arguments, inplace_backward)
    else:
        logp, entropies = _forward(*arguments)[:2]
    logp = logp.view(tokens.shape)
    if outside is not None:
        logp = logp.masked_fill(outside, math.nan)
    return LogProbs(logp, None if entropies is None else entropies.view(tokens.shape))


def definition(
    logits: Tensor, tokens: Tensor, inverse_temperature: float | Tensor | None, mask: Tensor | None, entropy: bool
) -> LogProbs:
    """The formula in whole-tensor operations: what torch.compile is given, to fuse as it likes, for any shape."""
    if inverse_temperature is not None:
        scale = inverse_temperature
        logits = logits * (scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale)
    dead = torch.zeros_like(tokens, dtype=torch.bool) if mask is None else ~mask
    empty = logits.detach().amax(-1) == -math.inf
    outside = (tokens < 0) | (tokens >= logits.shape[-1])
    log_p = torch.log_softmax(logits.masked_fill((dead | empty).unsqueeze(-1), 0), -1)
    logp = log_p.gather(-1, tokens.masked_fill(outside, 0).unsqueeze(-1).long()).squeeze(-1)
    logp = logp.masked_fill(empty, -math.inf).masked_fill(outside, math.nan).masked_fill(dead, 0)
    if not entropy:
        return LogProbs(logp, None)
    entropies = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)
    return LogProbs(logp, entropies.masked_fill(dead | empty, 0))


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        inverse: float | Tensor | None,
        dead: Tensor | None,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logp, entropies, shift, total = _forward(logits, tokens, inverse, dead, entropy)
        ctx.save_for_backward(logits, tokens, dead, shift, total, entropies)
        ctx.inverse, ctx.inplace, ctx.spent = inverse, inplace, False
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "inplace_backward=True wrote the gradient over the logits, so a second backward is impossible; "
                "call token_logprobs with inplace_backward=False"
            )
        logits, tokens, dead, shift, total, entropies = ctx.saved_tensors
        inverse = 1.0 if ctx.inverse is None else ctx.inverse
        ctx.spent = ctx.inplace
        gradient = logits.detach() if ctx.inplace else torch.empty(logits.shape, dtype=logits.dtype)
        return gradient, None, None, None, None, None


