"""How torch gets the gradients of an output layer from those of its log-probabilities, by blocks of logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._vocabulary_parallel import VocabularySlice, sum_over
from rlhf_kernels.ops import _check, _rows
from rlhf_kernels.ops._linear_head import Head, Passed, Piece, corner, log_probs, tiles

# Up to this size the exponentials of all logits are kept for the backward pass; larger ones are computed again.
KEPT_BYTES = 256 * 2**20

# Picking rows copies them, so it has to save products of a quarter of them at least.
_MOST_PICKED = 0.75


def most_rows_kept(head: Head) -> int:
    """Of how many rows the exponentials, and with a softcap its tanh, fit into what is kept."""
    return KEPT_BYTES // (max(1, head.vocabulary) * head.dtype.itemsize * _matrices_kept(head))


def memory_to_keep(rows: int, head: Head) -> list[Tensor]:
    """For `log_probs` of so many rows."""
    return [head.empty(rows, head.vocabulary) for _ in range(_matrices_kept(head))]


def _matrices_kept(head: Head) -> int:
    return 1 if head.softcap is None else 2


class LinearLogProbs(torch.autograd.Function):
    """hidden [N, H], weight [V, H], bias [V], low [N, r] and up [V, r] (or None), tokens [N, 1] -> logp and entropy,
    [N, 1]. Their meaning stands in `linear_logprobs.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        tokens: Tensor,
        inverse: float | Tensor | None,
        softcap: float | None,
        entropy: bool,
        place: VocabularySlice | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        head = Head.of(weight, bias, up, softcap, place, dtype)
        count = tokens.shape[0]
        keep = memory_to_keep(count, head) if place is None and count <= most_rows_kept(head) else []
        passed = log_probs([x for x in (hidden, low) if x is not None], head, tokens, inverse, entropy, keep)
        figures = (passed.entropies, passed.own, passed.shift, passed.total, passed.kept, passed.tanh)
        ctx.save_for_backward(hidden, weight, bias, low, up, tokens, *figures)
        ctx.inverse, ctx.softcap, ctx.place = inverse, softcap, place
        ctx.set_materialize_grads(False)
        return passed.logp, passed.entropies

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logp is None and grad_entropy is None:
            return (None,) * 11
        hidden, weight, bias, low, up, tokens, entropies, own, shift, total, kept, tanh = ctx.saved_tensors
        head = Head.of(weight, bias, up, ctx.softcap, ctx.place, total.dtype)
        inputs = [x.to(total.dtype) for x in (hidden, low) if x is not None]
        passed = Passed(inputs, tokens, ctx.inverse, total, entropies, own, shift, total, kept, tanh)
        asks_hidden, asks_weight, asks_bias, asks_low, asks_up, *_ = ctx.needs_input_grad
        sums = Sums(head, (asks_weight, asks_up), asks_bias, [x.dtype for x in head.matrices])
        (grad_hidden, *grad_low) = sums.add(passed, grad_logp, grad_entropy, (asks_hidden, asks_low))
        (grad_weight, *grad_up) = sums.matrices
        gradients = (grad_hidden, grad_weight, sums.bias, *(grad_low or [None]), *(grad_up or [None]))
        leaves = (hidden, weight, bias, low, up)
        return (
            *(None if grad is None else grad.to(x.dtype) for grad, x in zip(gradients, leaves, strict=True)),
            *(None,) * 6,
        )


class Sums:
    """The gradients of the head's matrices and bias, those that are asked for, summed up over several lots of rows."""

    def __init__(self, head: Head, asks: Sequence[bool], asks_bias: bool, dtypes: Sequence[torch.dtype]) -> None:
        """`dtypes`: of the sums of the matrices. One that is not the head's takes one lot of rows, not several."""
        self._head = head
        self.matrices = [
            torch.empty_like(matrix, dtype=dtype, memory_format=torch.contiguous_format) if wanted else None
            for matrix, wanted, dtype in zip(head.matrices, asks, dtypes, strict=False)
        ]
        self.bias = torch.zeros_like(head.bias) if asks_bias and head.bias is not None else None
        self._is_empty = True

    def add(
        self, passed: Passed, grad_logp: Tensor | None, grad_entropy: Tensor | None, asks: Sequence[bool]
    ) -> list[Tensor | None]:
        """Take in what these rows bring, and return the gradients of their inputs, those that are asked for.

        With d the gradient of the logits, that of hidden is d weight, of weight d^T hidden, of bias the sum of d:

            d = (g * (onehot - p) - h * p * (log p + entropy)) / temperature,    g = grad_logp, h = grad_entropy

        Without h, d is total * (p - onehot), which was kept, times one number per row. That number goes to the small
        matrices, so that no pass over the large one is left beside the two products.

        Rows that get no gradient (of zero advantage, clipped) are left out of the products, if there are enough.
        """
        head, all_rows = self._head, passed.total.shape[0]
        empty = passed.total == 0
        g, h = (_over_temperature(grad, empty, passed.inverse) for grad in (grad_logp, grad_entropy))
        rows = _with_gradient(g, h)
        if rows is not None:
            passed = passed.pick(rows)
            g, h = (None if x is None else x.index_select(0, rows) for x in (g, h))
        blocks = _GradientBlocks(passed, head, g, h)
        count, scale = passed.total.shape[0], blocks.scale

        grads_x = [torch.zeros_like(x) if wanted else None for x, wanted in zip(passed.inputs, asks, strict=False)]
        scaled = [None if grad is None else x * scale for x, grad in zip(passed.inputs, self.matrices, strict=True)]
        memory = head.memory_of_a_piece(count)
        for piece in head.pieces(count):
            sums_w = [
                grad
                if grad is None
                else grad[piece.columns]
                if converted is None or grad.dtype == head.dtype
                else converted[: piece.size]
                for grad, converted in zip(self.matrices, memory, strict=True)
            ]
            for tile in tiles(count):
                d = blocks.block(piece, tile)
                for grad, matrix in zip(grads_x, piece.matrices, strict=True):
                    if grad is not None:
                        grad[tile].addmm_(d, matrix)
                is_first = self._is_empty and tile.start == 0
                for sum_w, x in zip(sums_w, scaled, strict=True):
                    if sum_w is not None and x is not None:
                        sum_w.addmm_(d.t(), x[tile], beta=int(not is_first))
                if self.bias is not None:
                    self.bias[piece.columns].addmv_(d.t(), scale[tile].squeeze(-1))
            for grad, sum_w in zip(self.matrices, sums_w, strict=True):
                if grad is not None and sum_w is not None and sum_w.dtype != grad.dtype:
                    grad[piece.columns] = sum_w
        self._is_empty = False
        for i, grad in enumerate(grads_x):
            if grad is not None:
                grad.mul_(scale)
                if rows is not None:
                    grads_x[i] = grad.new_zeros(all_rows, grad.shape[1]).index_copy_(0, rows, grad)
        sum_over(grads_x, head.place)
        return grads_x


def _over_temperature(grad: Tensor | None, empty: Tensor, inverse: float | Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    grad = grad.masked_fill(empty, 0)
    return grad if inverse is None else grad * inverse


def _with_gradient(*of_rows: Tensor | None) -> Tensor | None:
    """The rows that a gradient comes from, where leaving the others out is worth picking these (None: it is not)."""
    incoming = torch.cat([x for x in of_rows if x is not None], dim=1)
    if not _check.on_host(incoming):
        return None  # to count them the host would have to wait
    rows = (incoming != 0).any(1).nonzero().squeeze(-1)
    return rows if rows.numel() <= _MOST_PICKED * len(incoming) else None


class _GradientBlocks:
    """The gradient of the logits, by blocks; `scale` [N, 1] is what its rows have yet to be multiplied by."""

    def __init__(self, passed: Passed, head: Head, g: Tensor | None, h: Tensor | None) -> None:
        self._passed, self._head, self._h = passed, head, h
        self._total = passed.total.masked_fill(passed.total == 0, 1)
        self._g = torch.zeros_like(self._total) if g is None else g
        self._log_scale = None if passed.entropies is None else self._total.log() - passed.entropies
        # Without the entropy, one number a row is left to multiply by: the small matrices take it.
        self._is_difference = h is None
        self.scale = self._g / -self._total if self._is_difference else torch.ones_like(self._total)
        rows = self._total.shape[0]
        self._is_kept_whole = passed.kept is not None and self._is_difference and head.softcap is None
        self._block = None if self._is_kept_whole else head.block(rows)
        self._log_p = None if h is None else head.block(rows)
        self._slope = None if head.softcap is None else head.block(rows)

    def block(self, piece: Piece, tile: slice) -> Tensor:
        """total * (p - onehot) to be scaled, or g * (onehot - p) - h * p * (log p + entropy); times softcap'."""
        kept = None if self._passed.kept is None else self._passed.kept[tile, piece.columns]
        if self._block is None:
            assert kept is not None
            return kept
        d = corner(self._block, tile, piece)
        slope = None if self._slope is None else corner(self._slope, tile, piece)
        if kept is not None and self._is_difference:
            d.copy_(kept)
        else:
            self._fill(d, piece, tile, kept, slope)
        if slope is None:
            return d
        tanh = slope if self._passed.tanh is None else self._passed.tanh[tile, piece.columns]
        return d.mul_(torch.square(tanh, out=slope).neg_().add_(1))

    def _fill(self, d: Tensor, piece: Piece, tile: slice, kept: Tensor | None, tanh: Tensor | None) -> None:
        """The block but for the derivative of the softcap, and tanh(logits / softcap) where it was not kept."""
        total, g = self._total[tile], self._g[tile]
        local, elsewhere = piece.here(self._passed.tokens[tile])
        if kept is None:
            z = self._head.logits(self._passed.inputs, piece, tile, self._passed.inverse, d, tanh)
            (z if self._passed.shift is None else z.sub_(self._passed.shift[tile])).exp_()
        else:
            own = self._passed.own[tile].exp()
            d.copy_(kept)
            d.scatter_(-1, local, own if elsewhere is None else torch.where(elsewhere, d.gather(-1, local), own))
        if self._h is not None and self._log_scale is not None and self._log_p is not None:
            log_p = torch.log(d, out=corner(self._log_p, tile, piece)).sub_(self._log_scale[tile])
            d.mul_(log_p.clamp_(min=_rows.SMALLEST_LOG).mul_(self._h[tile]).add_(g)).div_(-total)
        at_token = -total if self._is_difference else g
        d.scatter_add_(-1, local, at_token if elsewhere is None else at_token.masked_fill(elsewhere, 0))
