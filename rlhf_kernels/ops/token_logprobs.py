"""Log-probabilities of given tokens, and the entropy, from logits."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _autograd, _check, _rows

# A sum of exp(x - x[token]) beyond this (a log-probability under -69) is taken again from the row's maximum.
_LARGEST_SUM = 1e30


class LogProbs(NamedTuple):
    """Per token: `logp` in nats, and the `entropy` of the whole distribution in nats (None unless asked for)."""

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
    entropy, which is differentiable too and does not change a bit of logp.

    Results are in nats, shape [...], float32 (float64 for float64 logits), accumulated in that dtype. A logit of -inf
    has probability 0; a row of nothing but -inf gives logp -inf, entropy 0 and gradient 0. A row's result depends on
    no other row.

    `inplace_backward=True` writes the gradient over the logits' storage: use it where nobody reads the logits after
    the backward pass. A second backward then raises. (Under torch.compile it changes nothing: the compiler plans the
    memory.) A double backward always raises.

    Raises IndexError for a counted token outside [0, V) on a CPU (on a GPU, and under torch.compile, its logp is
    NaN); ValueError for shapes that do not match or a temperature that is not positive; TypeError for wrong dtypes.
    """
    backend.torch_only("token_logprobs")
    check_logits(logits, tokens, mask)
    dtype = _check.accumulation_dtype(logits)
    inverse = _rows.inverse_temperature(temperature, tokens.shape, mask, dtype)
    if torch.compiler.is_compiling():
        return definition(logits.to(dtype), tokens, inverse, mask, entropy)
    if inplace_backward:
        _check_overwritable(logits)

    safe_tokens, outside = inside_vocabulary(tokens, logits.shape[-1], mask)
    rows = _rows.rows_first(logits)
    columns = (*rows.shape[:-1], 1)
    if isinstance(inverse, Tensor):
        inverse = inverse.reshape(columns)
    masked = None if mask is None else ~mask.reshape(columns)
    arguments = (rows, safe_tokens.reshape(columns), inverse, masked, entropy)
    if rows.requires_grad and torch.is_grad_enabled():
        logp, entropies = _TokenLogProbs.apply(*arguments, inplace_backward)
    else:
        logp, entropies, *_ = _forward(*arguments)
    logp = logp.view(tokens.shape)
    if outside is not None:
        logp = logp.masked_fill(outside, math.nan)
    return LogProbs(logp, None if entropies is None else entropies.view(tokens.shape))


def definition(
    logits: Tensor, tokens: Tensor, inverse: float | Tensor | None, mask: Tensor | None, entropy: bool
) -> LogProbs:
    """The formula in whole-tensor operations, for logits in the accumulation dtype and inverse = 1 / temperature.

    torch.compile is given this, to fuse as it likes, for any shape without a new compilation.
    """
    if inverse is not None:
        logits = logits * (inverse.unsqueeze(-1) if isinstance(inverse, Tensor) else inverse)
    dead = torch.zeros_like(tokens, dtype=torch.bool) if mask is None else ~mask
    outside = ((tokens < 0) | (tokens >= logits.shape[-1])) & ~dead
    empty = (logits.detach().amax(-1) == -math.inf) & ~dead
    log_p = torch.log_softmax(logits.masked_fill((dead | empty).unsqueeze(-1), 0), -1)
    safe_tokens = tokens.masked_fill(dead | outside, 0).long()
    logp = log_p.gather(-1, safe_tokens.unsqueeze(-1)).squeeze(-1)
    logp = logp.masked_fill(empty, -math.inf).masked_fill(outside, math.nan).masked_fill(dead, 0)
    if not entropy:
        return LogProbs(logp, None)
    entropies = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)
    return LogProbs(logp, entropies.masked_fill(dead | empty, 0))


def check_logits(logits: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
    """Raise TypeError or ValueError unless logits [..., V], tokens [...] and mask [...] belong together."""
    _check.floating(logits=logits)
    _check.integer(tokens=tokens)
    if logits.shape[:-1] != tokens.shape or logits.dim() == 0:
        raise ValueError(
            f"logits have shape {list(logits.shape)}, tokens {list(tokens.shape)}: expected logits [..., V] with "
            "one token for each row of V logits"
        )
    if mask is not None:
        _check.boolean_mask(mask, tokens.shape)


def inside_vocabulary(tokens: Tensor, vocabulary: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tokens as int64 with 0 wherever an id must not be looked up, and on a GPU which counted ones were outside
    [0, vocabulary). On a CPU those raise IndexError; a GPU would have to wait for the answer."""
    if mask is not None:
        tokens = tokens.masked_fill(~mask, 0)
    if _check.on_host(tokens):
        _check.token_ids(tokens, vocabulary)
        return tokens.long(), None
    outside = (tokens < 0) | (tokens >= vocabulary)
    return tokens.masked_fill(outside, 0).long(), outside


def _check_overwritable(logits: Tensor) -> None:
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
    if overlapping or (logits.dim() > 3 and not logits.is_contiguous()):
        raise ValueError(
            f"inplace_backward=True cannot write into logits of shape {list(logits.shape)} and strides "
            f"{list(logits.stride())}: pass logits.contiguous(), or inplace_backward=False"
        )


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        inverse: float | Tensor | None,
        masked: Tensor | None,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logp, entropies, *rest = _forward(logits, tokens, inverse, masked, entropy)
        ctx.save_for_backward(logits, tokens, entropies, *rest)
        ctx.inverse, ctx.inplace, ctx.spent = inverse, inplace, False
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """(g * (onehot - p) - h * p * (log p + entropy)) / temperature, with g = grad_logp, h = grad_entropy."""
        if ctx.spent:
            raise RuntimeError(
                "inplace_backward=True wrote the gradient over the logits, so a second backward is impossible; "
                "call token_logprobs with inplace_backward=False"
            )
        ctx.spent = ctx.inplace
        logits, tokens, entropies, shift, total, still = ctx.saved_tensors
        inverse, dtype = ctx.inverse, total.dtype
        tiles = _rows.Tiles(logits, dtype)
        g = torch.zeros_like(total) if grad_logp is None else grad_logp
        if still is not None:
            g = g.masked_fill(still, 0)
        at_token = g if inverse is None else g * inverse
        if grad_entropy is None:
            over_row = at_token / -total
        else:
            over_row = (-1 if inverse is None else -inverse) / total
            log_total_less_entropy = total.log() - entropies
            bracket_scratch = tiles.scratch()

        gradient = logits.detach() if ctx.inplace else logits.new_empty(logits.shape)
        scratch = None if logits.dtype == dtype else tiles.scratch()
        for tile in tiles:
            out = gradient[tile]
            z = out if scratch is None else scratch.like(out)
            _rows.shifted(logits[tile], shift[tile], _rows.part(inverse, tile), z)
            if grad_entropy is not None:
                log_p_and_entropy = torch.sub(z, log_total_less_entropy[tile], out=bracket_scratch.like(z))
                log_p_and_entropy.clamp_(min=_rows.SMALLEST_LOG)
                bracket = log_p_and_entropy.mul_(grad_entropy[tile]).add_(g[tile])
            z.exp_().mul_(over_row[tile])
            if grad_entropy is not None:
                z.mul_(bracket)
            z.scatter_add_(-1, tokens[tile], at_token[tile])
            if still is not None:
                _rows.zero_rows(z, still[tile])
            if z is not out:
                out.copy_(z)
        return gradient, None, None, None, None, None


def _forward(
    logits: Tensor, tokens: Tensor, inverse: float | Tensor | None, masked: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """logits [A, B, V], the rest [A, B, 1] -> logp and entropy; and for the backward pass shift,
    total = sum_j exp((x_j - shift) / temperature), and which rows get no gradient: masked, or nothing but -inf.

    On a CPU the shift is the token's own logit, which saves the pass that finds the maximum: total is then at least
    1, and logp = -log(total). Rows where it overflows, or whose token has logit -inf, start again at their maximum.
    """
    dtype = _check.accumulation_dtype(logits)
    on_host = _check.on_host(logits)
    own = logits.gather(-1, tokens).to(dtype)
    shift = own if on_host else _rows.finite_maximum(logits).to(dtype)
    totals, entropy_columns = [], []
    tiles = _rows.Tiles(logits, dtype)
    scratch = tiles.scratch()
    entropy_scratch = tiles.scratch() if entropy else None
    for tile in tiles:
        x = logits[tile]
        z = _rows.shifted(x, shift[tile], _rows.part(inverse, tile), scratch.like(x))
        if entropy_scratch is None:
            totals.append(z.exp_().sum(-1, keepdim=True))
        else:
            total, column = _rows.total_and_entropy(z, entropy_scratch.like(z))
            totals.append(total)
            entropy_columns.append(column)
    total = _rows.joined(totals, own)
    entropies = _rows.joined(entropy_columns, own) if entropy else None

    still = masked
    if on_host and (total.numel() == 0 or bool(total.max() < _LARGEST_SUM)):
        logp = total.log().neg_()
    else:
        if on_host:
            shift = own.clone()
            _again_from_the_maximum(logits, inverse, masked, shift, total, entropies, tiles.rows)
        empty = total == 0
        still = empty if masked is None else empty | masked
        logp = own - shift if inverse is None else (own - shift) * inverse
        logp = (logp - total.log()).masked_fill_(empty, -math.inf)
    if masked is not None:
        logp.masked_fill_(masked, 0)
        if entropies is not None:
            entropies.masked_fill_(masked, 0)
    return logp, entropies, shift, total, still


def _again_from_the_maximum(
    logits: Tensor,
    inverse: float | Tensor | None,
    masked: Tensor | None,
    shift: Tensor,
    total: Tensor,
    entropies: Tensor | None,
    rows_at_once: int,
) -> None:
    """Overwrite shift, total and entropies of the counted rows whose total is too large or NaN."""
    again = ~(total < _LARGEST_SUM)
    if masked is not None:
        again &= ~masked
    for positions in again.squeeze(-1).nonzero().split(rows_at_once):
        rows = (positions[:, 0], positions[:, 1])
        x = logits[rows].to(total.dtype)
        shift[rows] = maximum = _rows.finite_maximum(x)
        z = _rows.shifted(x, maximum, _rows.part(inverse, rows), x)
        total[rows], entropy = _rows.total_and_entropy(z, torch.empty_like(z))
        if entropies is not None:
            entropies[rows] = entropy
