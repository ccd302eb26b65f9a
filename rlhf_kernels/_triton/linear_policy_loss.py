"""The policy loss from hidden states: for one lot of rows at a time the logits of the whole vocabulary, which the
forward pass leaves behind and the gradient is made from. Kernels and products are those of `linear_logprobs`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from rlhf_kernels._triton import _rows, linear_logprobs

# Logits that are held at a time, in float32 (2 GiB), and their gradient beside them. Not fewer, because each lot of
# rows costs one more read and write of the gradient of the weight, in float32.
_ELEMENTS = 2**29


@dataclass(frozen=True)
class Passed:
    """Some rows after the forward pass."""

    head: linear_logprobs.Head
    tokens: Tensor
    logp: Tensor
    entropies: Tensor | None
    maximum: Tensor
    total: Tensor


class Lots:
    """The rows by lots: forward, then backward before the next lot takes its memory."""

    def __init__(
        self, head: linear_logprobs.Head, tokens: Tensor, learning: int, entropy: bool, asks: Sequence[bool]
    ) -> None:
        """tokens [N], of which the first `learning` may get a gradient; asks: which of the gradients of hidden, weight,
        bias, low and up are wanted."""
        self._dtype = head.hidden.dtype if head.hidden.dtype == head.weight.dtype else torch.float32
        self._head = replace(head, hidden=head.hidden.to(self._dtype), weight=head.weight.to(self._dtype))
        self._tokens, self._learning, self._entropy = tokens, learning, entropy
        vocabulary = head.weight.shape[0]
        self._lots = max(1, triton.cdiv(learning * vocabulary, _ELEMENTS))
        shape = (triton.cdiv(learning, self._lots), triton.cdiv(vocabulary, 16) * 16)
        self._logits = torch.empty(shape, dtype=torch.float32, device=tokens.device)
        self._gradient = torch.empty(shape, dtype=self._dtype, device=tokens.device)
        self._hidden, self._weight, self._bias, self._low, self._up = (
            torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
            if x is not None and wanted
            else None
            for x, wanted in zip((head.hidden, head.weight, head.bias, head.low, head.up), asks, strict=True)
        )
        self._unscale: Tensor | None = None

    def learning(self) -> Iterator[slice]:
        """The lots of the rows that may get a gradient, which are the first ones."""
        size = self._logits.shape[0]
        return (slice(i * size, min((i + 1) * size, self._learning)) for i in range(self._lots))

    def others(self) -> tuple[Tensor, Tensor | None]:
        """logp and entropy of the rows that get none."""
        passed = self._pass(slice(self._learning, None), None)
        return passed.logp, passed.entropies

    def forward(self, lot: slice) -> Passed:
        return self._pass(lot, self._logits)

    def _pass(self, lot: slice, memory: Tensor | None) -> Passed:
        head, tokens = self._head, self._tokens[lot]
        head = replace(
            head,
            hidden=head.hidden[lot],
            low=None if head.low is None else head.low[lot],
            inverse_rows=None if head.inverse_rows is None else head.inverse_rows[lot],
        )
        return Passed(head, tokens, *linear_logprobs.forward(head, tokens, self._entropy, memory))

    def backward(self, lot: slice, passed: Passed, grad_logp: Tensor, grad_entropy: Tensor | None) -> None:
        """Add what these rows bring. Rows without a gradient are left out of the products, to the last one: for their
        number the host waits here."""
        wanted = grad_logp != 0 if grad_entropy is None else (grad_logp != 0) | (grad_entropy != 0)
        picked = wanted.nonzero().squeeze(-1)
        if picked.shape[0] == 0:
            return
        g, h, unscale = linear_logprobs.in_range(grad_logp, grad_entropy, passed.head.inverses(), self._dtype)
        d = self._gradient_of_logits(passed, g, h, picked)
        self._take_scale(unscale)
        head = passed.head
        hidden, low = (None if x is None else x.index_select(0, picked) for x in (head.hidden, head.low))
        for sums, matrix in ((self._hidden, head.weight), (self._low, head.up)):
            if sums is not None and matrix is not None:
                product = d.new_empty(d.shape[0], matrix.shape[1], dtype=torch.float32)
                linear_logprobs.multiply(d, matrix.to(self._dtype), product)
                sums[lot].index_copy_(0, picked, product if unscale is None else product.mul_(unscale))
        for sums, rows in ((self._weight, hidden), (self._up, low)):
            if sums is not None and rows is not None:
                linear_logprobs.multiply(d.t(), rows.to(self._dtype), sums, add=True)
        if self._bias is not None:
            self._bias += d.sum(0, dtype=torch.float32)

    def gradients(self) -> list[Tensor | None]:
        """Of hidden, weight, bias, low and up, in float32."""
        if self._unscale is not None:
            for x in (self._weight, self._bias, self._up):
                if x is not None:
                    x.mul_(self._unscale)
        return [self._hidden, self._weight, self._bias, self._low, self._up]

    def _gradient_of_logits(self, passed: Passed, g: Tensor | None, h: Tensor | None, picked: Tensor) -> Tensor:
        head, constants = passed.head, passed.head.constants()
        vocabulary = slice(0, head.weight.shape[0])
        chunks = triton.cdiv(vocabulary.stop, constants["BLOCK"] * constants["VECTORS"])
        with _rows.device_of(picked):
            linear_logprobs.gradient_kernel[(picked.shape[0], chunks)](
                self._logits,
                self._gradient,
                head.bias,
                passed.tokens,
                head.inverse_rows,
                passed.maximum,
                passed.total,
                passed.entropies,
                g,
                h,
                picked,
                head.inverse,
                head.softcap or 1.0,
                *head.numbers(vocabulary, slice(0, picked.shape[0]), self._logits),
                LOGP_GRADIENT=g is not None,
                ENTROPY_GRADIENT=h is not None,
                PICKED=True,
                **constants,
            )
        return self._gradient[: picked.shape[0], vocabulary]

    def _take_scale(self, unscale: Tensor | None) -> None:
        """float16 gradients are scaled, each lot by a power of two of its own: bring the sums to that of this one."""
        if unscale is not None and self._unscale is not None:
            for x in (self._weight, self._bias, self._up):
                if x is not None:
                    x.mul_(self._unscale / unscale)
        self._unscale = unscale
