"""The KL divergence between two distributions over the whole vocabulary."""

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import _autograd, backend
from rlhf_kernels.ops import _check, _rows


def exact_kl(
    logits_p: Tensor, logits_q: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    """KL(p || q) = sum_j p_j (log p_j - log q_j) per token, with p = softmax(logits_p / temperature), q likewise.

    logits_p and logits_q [..., V] floating, any strides; `temperature` a number or a tensor [...] without gradient;
    `mask` [...] bool, True = counts: a masked position gives exactly 0 and gets exactly 0 gradient, whatever lies
    under it. The result has shape [...], in nats, float32 (float64 if an input is). No tensor of the logits' size is
    made beside the gradients. Both logits get gradients, where they ask for one:

        d KL / d logits_p = p (log p - log q - KL) / temperature,    d KL / d logits_q = (q - p) / temperature

    A logit of -inf has probability 0. Where p is 0 the term is 0, whatever q is. Where q is 0 and p is not, the row's
    KL is inf. A row of logits_p with nothing but -inf has KL 0. Neither of these two kinds of row sends a gradient. A
    double backward raises.

    Raises ValueError for shapes that do not match or a temperature that is not positive, TypeError for dtypes.
    """
    _check.floating(logits_p=logits_p, logits_q=logits_q)
    _check.same_shape(logits_p=logits_p, logits_q=logits_q)
    if logits_p.dim() == 0:
        raise ValueError("logits_p and logits_q have no dimension, expected [..., V]")
    if logits_p.shape[-1] == 0:
        raise ValueError("logits_p and logits_q have an empty last dimension: there is no vocabulary")
    shape = logits_p.shape[:-1]
    if mask is not None:
        _check.boolean_mask(mask, shape)
    _check.together(logits_p=logits_p, logits_q=logits_q, mask=mask, temperature=temperature)
    dtype = _check.accumulation_dtype(logits_p, logits_q)
    inverse = _rows.inverse_temperature(temperature, shape, mask, dtype)
    if backend.use_triton("exact_kl", logits_p, logits_q):
        return _on_triton(logits_p, logits_q, inverse, mask)
    if torch.compiler.is_compiling():
        return _definition(logits_p.to(dtype), logits_q.to(dtype), inverse, mask)

    rows_p, rows_q = _rows.rows_first(logits_p), _rows.rows_first(logits_q)
    columns = (*rows_p.shape[:-1], 1)
    if isinstance(inverse, Tensor):
        inverse = inverse.reshape(columns)
    masked = None if mask is None else ~mask.reshape(columns)
    if torch.is_grad_enabled() and (rows_p.requires_grad or rows_q.requires_grad):
        kl = _ExactKL.apply(rows_p, rows_q, inverse, masked)
    else:
        kl, *_ = _forward(rows_p, rows_q, inverse, masked)
    return kl.view(shape)


def _on_triton(logits_p: Tensor, logits_q: Tensor, inverse: float | Tensor | None, mask: Tensor | None) -> Tensor:
    from rlhf_kernels._triton import exact_kl as twin

    arguments = (
        _rows.rows_first(logits_p),
        _rows.rows_first(logits_q),
        *_rows.kernel_temperature(inverse, logits_p),
        None if mask is None else mask.reshape(-1).contiguous(),
    )
    kl = twin.operator(*arguments)[0] if torch.compiler.is_compiling() else twin.ExactKL.apply(*arguments)
    return kl.view(logits_p.shape[:-1])


def _definition(p: Tensor, q: Tensor, inverse: float | Tensor | None, mask: Tensor | None) -> Tensor:
    """The formula in whole-tensor operations, which torch.compile is given to fuse as it likes."""
    masked = torch.zeros(p.shape[:-1], dtype=torch.bool, device=p.device) if mask is None else ~mask
    empty, infinite = (column.squeeze(-1) for column in _special_rows(p, q))
    still = (masked | empty | infinite).unsqueeze(-1)
    scale = 1.0 if inverse is None else inverse.unsqueeze(-1) if isinstance(inverse, Tensor) else inverse
    log_p, log_q = (torch.log_softmax(x.masked_fill(still, 0) * scale, -1) for x in (p, q))
    differences = log_p.masked_fill(log_p == -math.inf, 0) - log_q.masked_fill(log_q == -math.inf, 0)
    kl = (log_p.exp() * differences).sum(-1)
    return kl.masked_fill(infinite, math.inf).masked_fill(empty | masked, 0)


class _ExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, inverse: float | Tensor | None, masked: Tensor | None) -> Tensor:
        kl, still, columns, ctx.usual = _forward(p, q, inverse, masked)
        ctx.save_for_backward(p, q, still, *columns)
        ctx.inverse = inverse
        return kl

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, q, still, *columns = ctx.saved_tensors
        scale = grad if ctx.inverse is None else grad * ctx.inverse
        asks_p, asks_q, *_ = ctx.needs_input_grad
        grad_p = p.new_empty(p.shape) if asks_p else None
        grad_q = q.new_empty(q.shape) if asks_q else None
        tiles = _rows.Tiles(p, scale.dtype, scratches=3)
        scratch_p, scratch_q, scratch = (tiles.scratch() for _ in range(3))
        for tile, usual in zip(tiles, ctx.usual, strict=True):
            inverse = _rows.part(ctx.inverse, tile)
            largest_p, largest_q, sum_p, sum_q, mean = (column[tile] for column in columns)
            below_p = _rows.over_temperature(p[tile], largest_p, inverse, scratch_p.like(p[tile]))
            below_q = _rows.over_temperature(q[tile], largest_q, inverse, scratch_q.like(q[tile]))
            weight = torch.exp(below_p, out=scratch.like(below_p)).mul_(scale[tile] / sum_p)
            if grad_p is not None:
                ratio = below_p.sub_(below_q) if usual else _log_ratio(below_p, below_q)
                torch.mul(ratio.sub_(mean), weight, out=grad_p[tile])  # log p - log q - KL = ratio - its mean
            if grad_q is not None:
                torch.sub(below_q.exp_().mul_(scale[tile] / sum_q), weight, out=grad_q[tile])
            for gradient in (grad_p, grad_q):
                if still is not None and gradient is not None:
                    _rows.zero_rows(gradient[tile], still[tile])
        return grad_p, grad_q, None, None


def _forward(
    p: Tensor, q: Tensor, inverse: float | Tensor | None, masked: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor], list[bool]]:
    """p and q [A, B, V], masked [A, B, 1] -> columns [A, B, 1]: KL; the rows that send no gradient (None: all do); what
    the backward pass needs (the largest logit of p and of q, each sum of exponentials, the mean under p of the logits'
    difference). And tile by tile, whether the plain formula served.

    torch.log_softmax would be as fast, but it adds up a vocabulary in an order that costs 1e-5 nats.
    """
    dtype = _check.accumulation_dtype(p, q)
    on_host = _check.on_host(p)
    kl, *columns = (torch.empty((*p.shape[:-1], 1), dtype=dtype, device=p.device) for _ in range(6))
    still, all_usual = None if masked is None else masked.clone(), []
    tiles = _rows.Tiles(p, dtype, scratches=3)
    scratch_p, scratch_q, scratch = (tiles.scratch() for _ in range(3))
    for tile in tiles:
        inverse_part = _rows.part(inverse, tile)
        largest_p, largest_q = (_rows.finite_maximum(x[tile]) for x in (p, q))
        below_q = _rows.over_temperature(q[tile], largest_q, inverse_part, scratch_q.like(q[tile]))
        sum_q = _rows.sums(torch.exp(below_q, out=scratch.like(below_q)))
        below_p = _rows.over_temperature(p[tile], largest_p, inverse_part, scratch_p.like(p[tile]))
        weight = torch.exp(below_p, out=scratch.like(below_p))
        sum_p = _rows.sums(weight)
        mean = _rows.sums(below_p.sub_(below_q).mul_(weight)).div_(sum_p)
        # A logit of -inf leaves no finite mean, which a CPU may see; a GPU would have to wait for the answer.
        usual = on_host and bool(mean.isfinite().all())
        if not usual:
            below_p = _rows.over_temperature(p[tile], largest_p, inverse_part, scratch_p.like(p[tile]))
            mean = _rows.sums(_log_ratio(below_p, below_q).mul_(weight)).div_(sum_p)
        found = (mean + sum_q.log() - sum_p.log(), largest_p, largest_q, sum_p, sum_q, mean)
        for whole, part in zip((kl, *columns), found, strict=True):
            whole[tile] = part
        if not usual:
            empty, infinite = _special_rows(p[tile], q[tile])
            kl[tile] = kl[tile].masked_fill(infinite, math.inf).masked_fill(empty, 0)
            still = torch.zeros_like(kl, dtype=torch.bool) if still is None else still
            still[tile] |= empty | infinite
        all_usual.append(usual)
    return (kl if masked is None else kl.masked_fill(masked, 0)), still, columns, all_usual


def _special_rows(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [..., V], as columns: is the row of p nothing but -inf; is q impossible somewhere where p is not."""
    empty = p.detach().amax(-1, keepdim=True) == -math.inf
    infinite = ((q == -math.inf) & (p > -math.inf)).any(-1, keepdim=True)
    return empty, infinite


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q, in the place of log p, finite where either is log 0: p is 0 there, or the row is special."""
    return log_p.clamp_(min=_rows.SMALLEST_LOG).sub_(log_q).clamp_(max=-_rows.SMALLEST_LOG)
