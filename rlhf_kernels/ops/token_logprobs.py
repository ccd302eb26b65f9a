"""Log-probabilities of given tokens, and the entropy, from logits."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import _autograd, backend
from rlhf_kernels.ops import _check, _rows


class LogProbs(NamedTuple):
    """`logp` of each token in nats, and the `entropy` of each whole distribution in nats (None unless asked for)."""

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

    logits [..., V] floating, any strides; tokens [...] integer, or [..., K] for K tokens of each row (the top ones of a
    teacher, say), which gives logp [..., K] for one reading of the logits. `temperature` is a number or a tensor [...]
    (one per row) and must be the one that the tokens were sampled at; it gets no gradient. `mask` [...] bool, True =
    counts: a masked position gives exactly 0 and gets exactly 0 gradient, whatever lies under it. `entropy=True` adds
    the entropy, which is differentiable too and does not change a bit of logp.

    Results are in nats, logp in the shape of tokens, entropy [...], float32 (float64 for float64 logits), accumulated
    in that dtype. A logit of -inf has probability 0; a row of nothing but -inf gives logp -inf, entropy 0 and gradient
    0. A row's result depends on no other row. Small inputs on a CPU (up to a million logits) keep their exponentials
    for the backward pass, which becomes faster; larger ones, and all on a GPU, are computed again there.

    `inplace_backward=True` writes the gradient over the logits' storage: use it where nobody reads the logits after
    the backward pass. A second backward then raises. (Under torch.compile it changes nothing: the compiler plans the
    memory.) A double backward always raises.

    Raises IndexError for a counted token outside [0, V) on a CPU (on a GPU, and under torch.compile, its logp is
    NaN); ValueError for shapes that do not match or a temperature that is not positive; TypeError for wrong dtypes.
    """
    if not _clearly_right(logits, tokens, temperature, mask):
        check_logits(logits, tokens, mask)
        _check.together(logits=logits, tokens=tokens, mask=mask, temperature=temperature)
    dtype = _check.accumulation_dtype(logits)
    leading = logits.shape[:-1]
    inverse = _rows.inverse_temperature(temperature, leading, mask, dtype)
    if inplace_backward:
        _check_overwritable(logits)
    if backend.use_triton("token_logprobs", logits):
        logp, entropies = _on_triton(logits, tokens, inverse, mask, entropy, inplace_backward)
    elif torch.compiler.is_compiling():
        return definition(logits.to(dtype), tokens, inverse, mask, entropy)
    else:
        logp, entropies = _on_torch(logits, tokens, inverse, mask, entropy, inplace_backward)
    return LogProbs(logp.view_as(tokens), None if entropies is None else entropies.view(leading))


def _on_torch(
    logits: Tensor, tokens: Tensor, inverse: float | Tensor | None, mask: Tensor | None, entropy: bool, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    """logp [A, B, K] and entropy [A, B, 1]."""
    by_row = tokens if tokens.dim() == logits.dim() else tokens.unsqueeze(-1)
    counts = None if mask is None else mask.unsqueeze(-1)
    if counts is not None:
        by_row = by_row.masked_fill(~counts, 0)
    outside = None
    if not _check.on_host(tokens):
        by_row, outside = inside_vocabulary(by_row, logits.shape[-1], None)
    arguments = (
        _rows.rows_first(logits),
        _rows.rows_first(by_row.long()),
        _rows.rows_first(inverse.unsqueeze(-1)) if isinstance(inverse, Tensor) else inverse,
        None if counts is None else _rows.rows_first(~counts),
        entropy,
    )
    try:
        if logits.requires_grad and torch.is_grad_enabled():
            logp, entropies = _TokenLogProbs.apply(*arguments, inplace)
        else:
            logp, entropies, *_ = _forward(*arguments, keep=False)
    except (IndexError, RuntimeError):  # the gathering on a CPU looks at each id itself; this says which one it was
        if outside is None:
            _check.token_ids(by_row.view(tokens.shape), logits.shape[-1])
        raise
    return (logp if outside is None else logp.masked_fill(outside.view(logp.shape), math.nan)), entropies


def _on_triton(
    logits: Tensor, tokens: Tensor, inverse: float | Tensor | None, mask: Tensor | None, entropy: bool, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    """logp [N, K] and entropy [N]."""
    from rlhf_kernels._triton import token_logprobs as twin

    several = tokens.dim() == logits.dim()
    if _check.on_host(tokens) and not torch.compiler.is_compiling():  # the interpreter
        inside_vocabulary(tokens, logits.shape[-1], mask.unsqueeze(-1) if mask is not None and several else mask)
    rows = logits.shape[:-1].numel()
    arguments = (
        _rows.rows_first(logits),
        tokens.reshape(rows, tokens.shape[-1] if several else 1).contiguous(),
        *_rows.kernel_temperature(inverse, logits),
        None if mask is None else mask.reshape(rows).contiguous(),
        entropy,
    )
    if torch.compiler.is_compiling():  # the compiler plans the memory itself: nothing is to be won in place
        logp, entropies, *_ = twin.operator(*arguments)
        return logp, entropies if entropy else None
    return twin.TokenLogProbs.apply(*arguments, inplace)


def definition(
    logits: Tensor, tokens: Tensor, inverse: float | Tensor | None, mask: Tensor | None, entropy: bool
) -> LogProbs:
    """The formula in whole-tensor operations, for logits in the accumulation dtype and inverse = 1 / temperature.

    torch.compile is given this, to fuse as it likes, for any shape without a new compilation.
    """
    if inverse is not None:
        logits = logits * (inverse.unsqueeze(-1) if isinstance(inverse, Tensor) else inverse)
    by_row = tokens if tokens.dim() == logits.dim() else tokens.unsqueeze(-1)
    empty = logits.detach().amax(-1, keepdim=True) == -math.inf
    dead = torch.zeros_like(empty) if mask is None else ~mask.unsqueeze(-1)
    empty = empty & ~dead
    outside = ((by_row < 0) | (by_row >= logits.shape[-1])) & ~dead
    log_p = torch.log_softmax(logits.masked_fill(dead | empty, 0), -1)
    logp = log_p.gather(-1, by_row.masked_fill(dead | outside, 0).long())
    logp = logp.masked_fill(empty, -math.inf).masked_fill(outside, math.nan).masked_fill(dead, 0).view(tokens.shape)
    if not entropy:
        return LogProbs(logp, None)
    entropies = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1, keepdim=True)
    return LogProbs(logp, entropies.masked_fill(dead | empty, 0).squeeze(-1))


def _clearly_right(logits: Tensor, tokens: Tensor, temperature: float | Tensor, mask: Tensor | None) -> bool:
    """Whether the checks can find nothing: a quick look at the plainest case, where they would take longer than the
    arithmetic of a small call."""
    return (
        mask is None
        and type(logits) is type(tokens) is Tensor
        and not isinstance(temperature, Tensor)
        and tokens.dtype == torch.int64
        and logits.is_floating_point()
        and logits.is_cpu
        and tokens.is_cpu
        and logits.dim() > 0
        and logits.shape[:-1] == tokens.shape
    )


def check_logits(logits: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
    """Raise TypeError or ValueError unless logits [..., V], tokens [...] or [..., K] and mask [...] belong together."""
    _check.floating(logits=logits)
    _check.integer(tokens=tokens)
    several = tokens.dim() == logits.dim() > 0
    if logits.dim() == 0 or logits.shape[:-1] != (tokens.shape[:-1] if several else tokens.shape):
        raise ValueError(
            f"logits have shape {list(logits.shape)}, tokens {list(tokens.shape)}: expected logits [..., V] with "
            "tokens [...], one for each row of V logits, or [..., K]"
        )
    if mask is not None:
        _check.boolean_mask(mask, logits.shape[:-1])


def inside_vocabulary(tokens: Tensor, vocabulary: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tokens as int64 with 0 wherever an id must not be looked up, and on a GPU which counted ones were outside
    [0, vocabulary). On a CPU those raise IndexError; a GPU would have to wait for the answer."""
    if mask is not None:
        tokens = tokens.masked_fill(~mask, 0)
    if _check.on_host(tokens) and not torch.compiler.is_compiling():
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
        logp, entropies, ctx.kept, *rest = _forward(logits, tokens, inverse, masked, entropy, keep=not inplace)
        ctx.save_for_backward(logits, tokens, entropies, *rest)
        ctx.inverse, ctx.inplace, ctx.spent = inverse, inplace, False
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """(sum_k g_k (onehot_k - p) - h p (log p + entropy)) / temperature, with g = grad_logp, h = grad_entropy."""
        _autograd.refuse_second_inplace_backward(ctx)
        logits, tokens, entropies, shift, total, still = ctx.saved_tensors
        inverse, dtype = ctx.inverse, total.dtype
        g = torch.zeros_like(total).expand(tokens.shape) if grad_logp is None else grad_logp
        if still is not None:
            g = g.masked_fill(still, 0)
        h, log_scale = grad_entropy, None
        if inverse is not None:
            g, h = g * inverse, None if h is None else h * inverse
        if h is not None:
            log_scale = total.log() - entropies

        g_of_row = g if g.shape[-1] == 1 else g.sum(-1, keepdim=True)
        kept, ctx.kept = ctx.kept, None  # it is written over here: a second backward computes it again
        own_memory = logits.dtype != dtype
        tiles = _rows.Tiles(logits, dtype, scratches=own_memory + (h is not None))
        scratch = tiles.scratch() if own_memory and kept is None else None
        second = None if h is None else tiles.scratch()
        if ctx.inplace:
            gradient = logits.detach()
        elif kept is not None and not own_memory:
            gradient = kept
        else:
            gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for tile in tiles:
            x, out = _rows.part(logits, tile), _rows.part(gradient, tile)
            d = _rows.part(kept, tile) if kept is not None else out if scratch is None else scratch.like(out)
            at = (_rows.part(shift, tile), _rows.part(inverse, tile))
            bracket = _rows.part(g_of_row, tile)
            if second is not None and h is not None and log_scale is not None:
                log_p_and_entropy = torch.sub(
                    _rows.over_temperature(x, *at, second.like(x)), _rows.part(log_scale, tile), out=second.like(x)
                )
                bracket = log_p_and_entropy.clamp_(min=_rows.SMALLEST_LOG).mul_(_rows.part(h, tile)).add_(bracket)
            if kept is None:
                _rows.exponentials(x, *at, d)
            if h is None:
                d.mul_(bracket / -_rows.part(total, tile))
            else:
                d.mul_(bracket).div_(-_rows.part(total, tile))
            d.scatter_add_(-1, _rows.part(tokens, tile), _rows.part(g, tile))
            if still is not None:
                _rows.zero_rows(d, _rows.part(still, tile))
            if own_memory:
                out.copy_(d)
        return gradient, None, None, None, None, None


def _forward(
    logits: Tensor,
    tokens: Tensor,
    inverse: float | Tensor | None,
    masked: Tensor | None,
    entropy: bool,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """logits [A, B, V], tokens [A, B, K], the rest [A, B, 1] -> logp, entropy; and for the backward pass the
    exponentials (if `keep`, and one tile held them all), shift (or 0), total = sum_j exp((x_j - shift) / temperature),
    and which rows get no gradient: masked, or nothing but -inf.

    On a CPU the exponentials are taken of the logits as they are, which saves the passes that find the maximum and
    subtract it. The few rows whose sum is then too large or too small for that start again, from their maximum.
    """
    dtype = _check.accumulation_dtype(logits)
    own = logits.gather(-1, tokens)
    if own.dtype != dtype:
        own = own.to(dtype)
    shift, kept = None, None
    if _check.on_host(logits) and _rows.is_one_tile(logits):
        exponential, total, weighted = _sums_at_once(logits, inverse, entropy, dtype)
        kept = exponential if keep else None
    else:
        if not _check.on_host(logits):
            shift = _rows.finite_maximum(logits).to(dtype)
        total, weighted = _sums_by_tile(logits, shift, inverse, entropy, own)

    if shift is None and not _rows.all_safe(total):
        shift = torch.zeros_like(total)
        _again_from_the_maximum(logits, inverse, masked, shift, total, weighted, kept)
    log_total = total.log()
    logp = own if shift is None else own - shift
    logp = (logp if inverse is None else logp * inverse) - log_total
    entropies = None if weighted is None else log_total - weighted / total
    still = masked
    if shift is not None:
        empty = total == 0
        still = empty if masked is None else empty | masked
        logp.masked_fill_(empty, -math.inf)
        if entropies is not None:
            entropies.masked_fill_(empty, 0)
    if masked is not None:
        logp.masked_fill_(masked, 0)
        if entropies is not None:
            entropies.masked_fill_(masked, 0)
    return logp, entropies, kept, shift, total, still


def _sums_at_once(
    x: Tensor, inverse: float | Tensor | None, entropy: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The exponentials of a small x, and what `_sums_by_tile` gives for it, to the bit: without the tiles, the scratch
    memory and the shift, which take a small call longer than its arithmetic does."""
    z = (x if x.dtype == dtype else x.to(dtype)).contiguous()
    if inverse is not None:
        z = z * inverse
    exponential = z.exp() if entropy or z is x else z.exp_()
    return exponential, _rows.sums(exponential), _rows.sums(z * exponential, of_numbers=True) if entropy else None


def _sums_by_tile(
    logits: Tensor, shift: Tensor | None, inverse: float | Tensor | None, entropy: bool, own: Tensor
) -> tuple[Tensor, Tensor | None]:
    """sum_j exp(z_j) and, with entropy, sum_j z_j exp(z_j) of each row of z = (logits - shift) / temperature."""
    tiles = _rows.Tiles(logits, own.dtype, scratches=1 + entropy)
    scratch = second = tiles.scratch()
    if entropy and (logits.dtype != own.dtype or shift is not None or inverse is not None):
        second = tiles.scratch()
    totals, weighteds = [], []
    for tile in tiles:
        x = logits[tile]
        z = _rows.over_temperature(x, _rows.part(shift, tile), _rows.part(inverse, tile), second.like(x))
        exponential = torch.exp(z, out=scratch.like(x))
        totals.append(_rows.sums(exponential))
        if entropy:
            weighteds.append(_rows.sums(torch.mul(z, exponential, out=second.like(x)), of_numbers=True))
    return _rows.joined(totals, own), _rows.joined(weighteds, own) if entropy else None


def _again_from_the_maximum(
    logits: Tensor,
    inverse: float | Tensor | None,
    masked: Tensor | None,
    shift: Tensor,
    total: Tensor,
    weighted: Tensor | None,
    kept: Tensor | None,
) -> None:
    """Overwrite what is wrong of the counted rows whose sum of exponentials is not safe."""
    again = ~_rows.is_safe(total)
    if masked is not None:
        again &= ~masked
    rows_at_once = _rows.Tiles(logits, total.dtype, scratches=2).rows
    for positions in again.squeeze(-1).nonzero().split(rows_at_once):
        rows = (positions[:, 0], positions[:, 1])
        x = logits[rows].to(total.dtype)
        shift[rows] = maximum = _rows.finite_maximum(x)
        z = _rows.over_temperature(x, maximum, _rows.part(inverse, rows), x)
        exponential = z.exp()
        total[rows] = _rows.sums(exponential)
        if kept is not None:
            kept[rows] = exponential
        if weighted is not None:
            weighted[rows] = _rows.sums(z.mul_(exponential), of_numbers=True)
