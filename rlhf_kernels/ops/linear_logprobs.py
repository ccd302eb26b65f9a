"""Log-probabilities of given tokens, and the entropy, from hidden states and the output layer."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels._vocabulary_parallel import VocabularySlice
from rlhf_kernels.ops import _check, _linear_gradients, _linear_head, _rows
from rlhf_kernels.ops.token_logprobs import LogProbs, definition, inside_vocabulary


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
    vocabulary_parallel: VocabularySlice | None = None,
) -> LogProbs:
    """log softmax(logits / temperature)[token], with logits = hidden weight^T + bias, without holding the logits.

    The same as `token_logprobs` on the output layer's logits, but these exist one tile at a time, in float32 whatever
    the inputs' dtype. On a CPU up to 256 MiB of them are kept for the backward pass; larger ones, and all on a GPU,
    are computed again there, so that memory does not grow with N * V.

    hidden [..., H]; weight [V, H] as in `nn.Linear`; bias [V] or None; tokens [...] integer. `lora` is a pair
    (A [r, H], B [V, r]) of a low-rank change: the weight is then weight + B A, which is never formed (fold the
    scaling, alpha / r, into A or B). `softcap` c (Gemma 2) replaces logits by c * tanh(logits / c). `temperature`, a
    number or a tensor [...], divides after that. `mask` [...] bool, True = counts: a masked position gives exactly 0
    and sends exactly 0 gradient, whatever lies under it; on a CPU it costs no arithmetic. `entropy=True` adds the
    entropy, which is differentiable too.

    `vocabulary_parallel` says that this process holds some rows of weight, bias and B alone (tensor parallelism), and
    which. hidden, tokens and A are whole on every process; so are the results, to the bit. One small collective runs
    in the forward pass, and in the backward pass one that sums the gradient of hidden (with `lora` a second, small
    one), so every process must call both. A weight sharded in another way (FSDP) is passed whole:
    `weight.full_tensor()`.

    Results are in nats, shape [...], float32 (float64 if an input is). Gradients reach hidden, weight, bias, A and B,
    those that ask for one, and are accumulated in float32. A logit of -inf (by the bias) has probability 0; a row of
    nothing but -inf gives logp -inf, entropy 0 and gradient 0. The matrix product may round a row differently when
    the number of rows changes (on a CPU: of counted rows). On a GPU hidden and weight of one 16-bit dtype are
    multiplied on its tensor cores, anything else in float32. A double backward raises. Under torch.compile the logits
    do exist where torch runs it, not where Triton does.

    Raises IndexError for a counted token outside [0, V) on a CPU (on a GPU, and under torch.compile, its logp is
    NaN); ValueError for shapes or devices that do not match, a temperature or softcap that is not positive; TypeError
    for dtypes and for a DTensor; RuntimeError for `vocabulary_parallel` under torch.compile or without a process group.
    """
    check_arguments(hidden, weight, tokens, bias, lora, softcap, mask, vocabulary_parallel)
    given = [x for x in (hidden, weight, bias, *(lora or ())) if x is not None]
    dtype = _check.accumulation_dtype(*given)
    inverse = _rows.inverse_temperature(temperature, tokens.shape, mask, dtype)
    triton = backend.use_triton("linear_logprobs", *given)
    if torch.compiler.is_compiling() and not triton:
        return definition(_logits(hidden, weight, bias, lora, softcap, dtype), tokens, inverse, mask, entropy)

    vocabulary = weight.shape[0] if vocabulary_parallel is None else vocabulary_parallel.size
    counted = None
    if mask is not None and _check.on_host(mask) and not triton:
        # Elsewhere masked rows go through the products, as zeros: for their number the host would wait for the device.
        counted = mask.reshape(-1).nonzero().squeeze(-1)
    rows = Rows.of(hidden, tokens, vocabulary, inverse, mask, counted, lora, dtype)
    up = None if lora is None else lora[1]
    arguments = (rows.hidden, weight, bias, rows.low, up, rows.tokens, rows.inverse, softcap, entropy)
    if triton:
        logp, entropies = _on_triton(*arguments, vocabulary_parallel)
    else:
        logp, entropies = _on_torch(*arguments, vocabulary_parallel, dtype)
    return rows.results(logp, entropies)


class Rows(NamedTuple):
    """The rows that go through the output layer, [N, ...], and how their results come to be [...] again."""

    hidden: Tensor
    low: Tensor | None
    """hidden A^T, with a LoRA change"""
    tokens: Tensor
    """[N, 1], each in the vocabulary"""
    inverse: float | Tensor | None
    """1 / temperature, None for 1, [N, 1] where it is one per row"""
    counted: Tensor | None
    """where they come from, if the masked ones are left out"""
    mask: Tensor | None
    outside: Tensor | None
    """[...]: which tokens were not in the vocabulary, on a device"""
    shape: torch.Size

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        tokens: Tensor,
        vocabulary: int,
        inverse: float | Tensor | None,
        mask: Tensor | None,
        counted: Tensor | None,
        lora: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> "Rows":
        """`counted`: which rows there are, in this order, where the masked ones are left out; else these are zeros."""
        safe_tokens, outside = inside_vocabulary(tokens, vocabulary, mask)
        rows = hidden.reshape(tokens.numel(), hidden.shape[-1])
        safe_tokens = safe_tokens.reshape(-1, 1)
        if isinstance(inverse, Tensor):
            inverse = inverse.reshape(-1, 1)
        if counted is not None:
            rows, safe_tokens = rows.index_select(0, counted), safe_tokens.index_select(0, counted)
            inverse = inverse.index_select(0, counted) if isinstance(inverse, Tensor) else inverse
        elif mask is not None:
            rows = rows.masked_fill(~mask.reshape(-1, 1), 0)
        low = None
        if lora is not None:
            with torch.autocast(hidden.device.type, enabled=False):
                low = rows.to(dtype) @ lora[0].to(dtype).t()
        return cls(rows, low, safe_tokens, inverse, counted, mask, outside, tokens.shape)

    def of_these(self, x: Tensor) -> Tensor:
        """[N] from a value of each row, [...]."""
        x = x.reshape(-1)
        return x if self.counted is None else x.index_select(0, self.counted)

    def results(self, logp: Tensor, entropies: Tensor | None) -> LogProbs:
        """[...] from what was found for these rows: 0 where masked, and logp NaN where there is no such token."""
        logp = self._in_place(logp)
        if self.outside is not None:
            logp = logp.masked_fill(self.outside, math.nan)
        return LogProbs(logp, None if entropies is None else self._in_place(entropies))

    def _in_place(self, x: Tensor) -> Tensor:
        x = x.reshape(-1)
        if self.counted is not None:
            return x.new_zeros(self.shape.numel()).index_copy(0, self.counted, x).view(self.shape)
        x = x.view(self.shape)
        return x if self.mask is None else x.masked_fill(~self.mask, 0)


def _on_torch(
    rows: Tensor,
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
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (rows, weight, bias, low, up)):
        arguments = (rows, weight, bias, low, up, tokens, inverse, softcap, entropy, place, dtype)
        return _linear_gradients.LinearLogProbs.apply(*arguments)
    head = _linear_head.Head.of(weight, bias, up, softcap, place, dtype)
    inputs = [x for x in (rows, low) if x is not None]
    passed = _linear_head.log_probs(inputs, head, tokens, inverse, entropy)
    return passed.logp, passed.entropies


def _on_triton(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    tokens: Tensor,
    inverse: float | Tensor | None,
    softcap: float | None,
    entropy: bool,
    place: VocabularySlice | None,
) -> tuple[Tensor, Tensor | None]:
    from rlhf_kernels._triton import linear_logprobs as twin

    # The kernels read these as they lie in memory.
    tokens, bias = tokens.reshape(-1).contiguous(), None if bias is None else bias.contiguous()
    if torch.compiler.is_compiling():
        from rlhf_kernels._triton import _linear_compiled

        if inverse is not None and not isinstance(inverse, Tensor):
            # A number would be a constant of what is compiled, and a new temperature a new compilation.
            inverse = torch.ones_like(tokens, dtype=torch.float32) * inverse
        inverse_rows = None if inverse is None else inverse.reshape(-1).contiguous()
        arguments = (rows, weight, bias, low, up, tokens, inverse_rows, softcap, entropy)
        logp, entropies, *_ = _linear_compiled.forward(*arguments)
        return logp, entropies if entropy else None
    inverse_rows = inverse.reshape(-1).contiguous() if isinstance(inverse, Tensor) else None
    number = inverse if isinstance(inverse, float) else 1.0
    head = (rows, weight, bias, low, up, tokens, number, inverse_rows, softcap)
    return twin.LinearLogProbs.apply(*head, entropy, place)


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The formula in whole-tensor operations, for torch.compile."""
    hidden = hidden.to(dtype)
    logits = hidden @ weight.to(dtype).t()
    if lora is not None:
        logits = logits + (hidden @ lora[0].to(dtype).t()) @ lora[1].to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    mask: Tensor | None,
    vocabulary_parallel: VocabularySlice | None,
) -> None:
    """Raise what `linear_logprobs` says it raises, but for the tokens and the temperature."""
    _check.floating(hidden=hidden, weight=weight)
    _check.integer(tokens=tokens)
    if lora is not None and not (isinstance(lora, tuple | list) and len(lora) == 2):
        raise TypeError(f"lora must be a pair (A [r, H], B [V, r]) or None, got {type(lora).__name__}")
    others = {"bias": bias, "lora[0]": lora[0] if lora else None, "lora[1]": lora[1] if lora else None, "mask": mask}
    _check.together(hidden=hidden, weight=weight, tokens=tokens, **others)
    if hidden.dim() == 0 or hidden.shape[:-1] != tokens.shape:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}, tokens {list(tokens.shape)}: expected hidden [..., H] with one "
            "token for each row"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [V, {hidden.shape[-1]}] as in nn.Linear")
    if bias is not None:
        _check.floating(bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {list(bias.shape)}, expected [{weight.shape[0]}], one per weight row")
    if lora is not None:
        _check_lora(*lora, weight)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}; None means no cap")
    if mask is not None:
        _check.boolean_mask(mask, tokens.shape)
    if vocabulary_parallel is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "vocabulary_parallel does not run under torch.compile: call it outside of what is compiled"
            )
        vocabulary_parallel.check(weight.shape[0])


def _check_lora(low: Tensor, up: Tensor, weight: Tensor) -> None:
    _check.floating(**{"lora[0]": low, "lora[1]": up})
    vocabulary, width = weight.shape
    if low.dim() != 2 or low.shape[1] != width:
        raise ValueError(f"lora[0] (A) has shape {list(low.shape)}, expected [r, {width}], as wide as weight")
    if up.shape != (vocabulary, low.shape[0]):
        raise ValueError(
            f"lora[1] (B) has shape {list(up.shape)}, expected {[vocabulary, low.shape[0]]}: a row for each weight "
            "row, and the rank of A"
        )
