"""The clipped policy loss straight from hidden states and the output layer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import _autograd, backend
from rlhf_kernels._vocabulary_parallel import VocabularySlice
from rlhf_kernels.ops import _check, _linear_gradients, _rows
from rlhf_kernels.ops._linear_head import Head, Passed, log_probs
from rlhf_kernels.ops._policy_terms import GSPO, EntropyTerm, KLTerm, Surrogate
from rlhf_kernels.ops.linear_logprobs import Rows, check_arguments, linear_logprobs
from rlhf_kernels.ops.masked_mean import normalized
from rlhf_kernels.ops.policy_loss import PolicyLoss, Reduce, policy_loss


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocabulary_parallel: VocabularySlice | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    surrogate: Surrogate | None = None,
    weights: Tensor | None = None,
    kl: KLTerm | None = None,
    entropy_coefficient: float | None = None,
    reduce: Reduce = "tokens",
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    """`policy_loss` of the log-probs that `linear_logprobs` gives, with the gradients made in the forward pass.

    The logits of some rows at a time are formed, turned into their gradient and multiplied out, so that they need not
    be computed again: three matrix products in all, where the two operations one after the other take four unless all
    logits are kept. Rows that get no gradient (masked, of zero advantage, clipped) are left out of the two backward
    products, on a GPU too: there the host waits once for the number of counted tokens, and once for each lot of rows.

    hidden, weight, tokens, bias, lora, temperature, softcap and vocabulary_parallel are those of `linear_logprobs`;
    old_logp, advantages, clip_low, clip_high, dual_clip, surrogate, weights, kl, reduce and normalizer those of
    `policy_loss`; `mask` is both's. `entropy_coefficient` is that of an `EntropyTerm` whose entropy comes from the same
    pass; None for no entropy, in the metrics neither. The errors are theirs too, and the gradients reach what those of
    `linear_logprobs` do.

    Memory: the logits of one lot of rows (up to 256 MiB on a CPU, up to 2 GiB on a GPU, and their gradient beside
    them), and the gradients, in float32 until the backward pass, which multiplies them by the loss's own gradient and
    hands them out: a second backward pass through the same graph raises RuntimeError (so does `torch.autograd.grad` by
    one leaf after another: ask for all in one call), and so does torch if a leaf was changed in place before it.

    It is the two operations one after the other, with their products and memory, where no gradient is asked for; with
    GSPO, whose gradient is known only when the whole sequence is; with `vocabulary_parallel`; under torch.compile; and
    on a GPU without Triton. A first pass over the same rows has ratios of 1 up to the rounding of the matrix product,
    which may be another one for another number of rows.
    """
    check_arguments(hidden, weight, tokens, bias, lora, softcap, mask, vocabulary_parallel)
    clips: dict[str, Any] = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "surrogate": surrogate,
    }
    options: dict[str, Any] = {**clips, "weights": weights, "kl": kl, "reduce": reduce, "normalizer": normalizer}
    _check.floating(old_logp=old_logp, advantages=advantages)
    _check.same_shape(tokens=tokens, old_logp=old_logp)
    _check.together(hidden=hidden, old_logp=old_logp, advantages=advantages, mask=mask)
    if not isinstance(entropy_coefficient, int | float | None):
        raise TypeError(f"entropy_coefficient must be a number or None, got {type(entropy_coefficient).__name__}")
    if entropy_coefficient is not None and not math.isfinite(entropy_coefficient):
        raise ValueError(f"entropy_coefficient must be a finite number or None, got {entropy_coefficient}")

    def loss_of(logp: Tensor, entropies: Tensor | None) -> PolicyLoss:
        entropy = None
        if entropies is not None and entropy_coefficient is not None:
            entropy = EntropyTerm(entropy=entropies, coefficient=entropy_coefficient)
        return policy_loss(logp, old_logp, advantages, mask, **options, entropy=entropy)

    given = [x for x in (hidden, weight, bias, *(lora or ())) if x is not None]
    triton = backend.use_triton("linear_policy_loss", *given, old_logp, advantages)
    loss_of(old_logp.detach(), None)  # refuses what it cannot take before any product is formed
    fused = (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in given)
        and not isinstance(surrogate, GSPO)
        and vocabulary_parallel is None
        and not torch.compiler.is_compiling()
        and (triton or _check.on_host(tokens))
    )
    asks_entropy = entropy_coefficient is not None
    if not fused:
        head: dict[str, Any] = {"bias": bias, "lora": lora, "temperature": temperature, "softcap": softcap}
        head |= {"mask": mask, "vocabulary_parallel": vocabulary_parallel}
        return loss_of(*linear_logprobs(hidden, weight, tokens, **head, entropy=asks_entropy))

    dtype = _check.accumulation_dtype(*given)
    inverse = _rows.inverse_temperature(temperature, tokens.shape, mask, dtype)
    asks_gradient = mask
    if not entropy_coefficient and (kl is None or not kl.coefficient):
        for factor in (advantages,) if weights is None else (advantages, weights):
            asks_gradient = asks_gradient & _of_tokens(factor, mask).ne(0)
    learning, others = (x.reshape(-1).nonzero().squeeze(-1) for x in (asks_gradient, mask & ~asks_gradient))
    rows = Rows.of(hidden, tokens, weight.shape[0], inverse, mask, torch.cat([learning, others]), lora, dtype)
    leaves = (rows.hidden, weight, bias, rows.low, None if lora is None else lora[1])
    of_rows = _OfRows.of(rows, old_logp, advantages, mask, weights, kl, _shares(mask, reduce, normalizer, dtype))
    lots = (_lots_on_triton if triton else _LotsOnTorch)(rows, learning.shape[0], leaves, softcap, asks_entropy, dtype)
    logps: list[Tensor] = []
    entropies: list[Tensor | None] = []
    with torch.no_grad():
        for lot in lots.learning():
            passed = lots.forward(lot)
            logps.append(passed.logp)
            entropies.append(passed.entropies)
            slope = of_rows.slope(passed.logp.reshape(-1), lot, clips)
            of_entropy = -entropy_coefficient * of_rows.share[lot] if entropy_coefficient else None
            lots.backward(lot, passed, slope, of_entropy)
        logp, entropy = lots.others()
        logp, of_all = torch.cat([*logps, logp]), [x for x in (*entropies, entropy) if x is not None]
        loss, metrics = loss_of(*rows.results(logp, torch.cat(of_all) if of_all else None))
    return PolicyLoss(_WithGradients.apply(loss, lots.gradients(), *leaves), metrics)


def _of_tokens(x: Tensor, mask: Tensor) -> Tensor:
    return x if x.shape == mask.shape else x[:, None].expand(mask.shape)


def _shares(mask: Tensor, reduce: Reduce, normalizer: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the loss of each token is multiplied by, in the shape of the mask."""
    one, count = torch.ones_like(mask, dtype=dtype), mask.sum()
    if reduce == "sequences":
        lengths = mask.sum(1, keepdim=True)
        one, count = one / lengths.clamp(min=1), (lengths > 0).sum()
    return normalized(one, count, normalizer)


@dataclass(frozen=True)
class _OfRows:
    """What the policy loss of each row is made from, all [N]."""

    old_logp: Tensor
    advantages: Tensor
    weights: Tensor | None
    kl: KLTerm | None
    share: Tensor

    @classmethod
    def of(
        cls,
        rows: Rows,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        weights: Tensor | None,
        kl: KLTerm | None,
        share: Tensor,
    ) -> "_OfRows":
        def per_row(x: Tensor) -> Tensor:
            return rows.of_these(_of_tokens(x, mask)).detach()

        if rows.outside is not None:
            share = share.masked_fill(rows.outside, 0)
        return cls(
            per_row(old_logp),
            per_row(advantages),
            None if weights is None else per_row(weights),
            None if kl is None else replace(kl, ref_logp=per_row(kl.ref_logp)),
            per_row(share),
        )

    def slope(self, logp: Tensor, lot: slice, clips: dict[str, Any]) -> Tensor:
        """d loss / d logp of these rows."""
        weights = None if self.weights is None else self.weights[lot]
        kl = None if self.kl is None else replace(self.kl, ref_logp=self.kl.ref_logp[lot])
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            counted = torch.ones_like(leaf, dtype=torch.bool)
            options = {**clips, "weights": weights, "kl": kl}
            loss = policy_loss(leaf, self.old_logp[lot], self.advantages[lot], counted, **options, normalizer=1.0).loss
            (slope,) = torch.autograd.grad(loss, leaf)
        return slope * self.share[lot]


Leaves = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class _LotsOnTorch:
    """The rows by lots, each forward and then backward: the exponentials of one lot are kept, and not those of all."""

    def __init__(
        self,
        rows: Rows,
        learning: int,
        leaves: Leaves,
        softcap: float | None,
        entropy: bool,
        dtype: torch.dtype,
    ) -> None:
        hidden, weight, bias, low, up = leaves
        self._rows, self._learning, self._entropy = rows, learning, entropy
        self._head = Head.of(weight, bias, up, softcap, None, dtype)
        self._inputs = [x.detach() for x in (hidden, low) if x is not None]
        asks = [x is not None and x.requires_grad for x in leaves]
        self._sums = _linear_gradients.Sums(self._head, (asks[1], asks[4]), asks[2], [dtype] * 2)
        self._of_inputs = [
            torch.zeros_like(x, dtype=dtype) if wanted else None
            for x, wanted in zip(self._inputs, (asks[0], asks[3]), strict=False)
        ]
        self._lots = max(1, math.ceil(learning / max(1, _linear_gradients.most_rows_kept(self._head))))
        self._memory = _linear_gradients.memory_to_keep(math.ceil(learning / self._lots), self._head)

    def learning(self) -> Iterator[slice]:
        """The lots of the rows that may get a gradient, which are the first ones."""
        return (
            slice(i * self._learning // self._lots, (i + 1) * self._learning // self._lots) for i in range(self._lots)
        )

    def others(self) -> tuple[Tensor, Tensor | None]:
        """logp and entropy of the rows that get none."""
        passed = self._pass(slice(self._learning, None), [])
        return passed.logp, passed.entropies

    def forward(self, lot: slice) -> Passed:
        return self._pass(lot, [x[: lot.stop - lot.start] for x in self._memory])

    def _pass(self, lot: slice, keep: list[Tensor]) -> Passed:
        inverse = _rows.part(self._rows.inverse, lot)
        inputs = [x[lot] for x in self._inputs]
        return log_probs(inputs, self._head, self._rows.tokens[lot], inverse, self._entropy, keep)

    def backward(self, lot: slice, passed: Passed, grad_logp: Tensor, grad_entropy: Tensor | None) -> None:
        of_entropy = None if grad_entropy is None else grad_entropy[:, None]
        wanted = [x is not None for x in self._of_inputs]
        for whole, part in zip(
            self._of_inputs, self._sums.add(passed, grad_logp[:, None], of_entropy, wanted), strict=True
        ):
            if whole is not None and part is not None:
                whole[lot] = part

    def gradients(self) -> list[Tensor | None]:
        """Of the leaves, those that ask for one, in the accumulation dtype."""
        (of_hidden, *of_low), (of_weight, *of_up) = self._of_inputs, self._sums.matrices
        return [of_hidden, of_weight, self._sums.bias, *(of_low or [None]), *(of_up or [None])]


def _lots_on_triton(
    rows: Rows, learning: int, leaves: Leaves, softcap: float | None, entropy: bool, dtype: torch.dtype
) -> Any:
    from rlhf_kernels._triton import linear_logprobs, linear_policy_loss

    hidden, weight, *others = leaves
    bias, low, up = (None if x is None else x.detach() for x in others)
    inverse, inverse_rows = _rows.kernel_temperature(rows.inverse, rows.hidden)
    bias = None if bias is None else bias.contiguous()
    head = linear_logprobs.Head(hidden.detach(), weight.detach(), bias, low, up, inverse, inverse_rows, softcap, None)
    asks = [x is not None and x.requires_grad for x in leaves]
    return linear_policy_loss.Lots(head, rows.tokens.reshape(-1).contiguous(), learning, entropy, asks)


class _WithGradients(torch.autograd.Function):
    """The loss, whose gradients are known already. They are handed on, not copied, so that they go out once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *leaves: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*leaves)
        return loss.clone()

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of linear_policy_loss were handed out by the first backward pass, so a second one is "
                "impossible; call policy_loss(linear_logprobs(...)) where the graph is needed twice"
            )
        if not _check.on_host(upstream) or upstream != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        pairs = zip(gradients, ctx.saved_tensors, strict=True)
        return None, None, *(None if x is None else x.to(leaf.dtype) for x, leaf in pairs)
