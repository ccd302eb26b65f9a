"""The clipped policy loss straight from hidden states and the output layer."""

from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels._vocabulary_parallel import VocabularySlice
from rlhf_kernels.ops._policy_terms import KLTerm, Surrogate
from rlhf_kernels.ops.linear_logprobs import linear_logprobs
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
    reduce: Reduce = "tokens",
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    """`policy_loss` of the log-probs that `linear_logprobs` gives: the logits are never held, only tiles of them.

    hidden, weight, tokens, bias, lora, temperature, softcap and vocabulary_parallel are those of `linear_logprobs`;
    old_logp, advantages, clip_low, clip_high, dual_clip, surrogate, weights, kl, reduce and normalizer those of
    `policy_loss`; `mask` is both's. The errors are theirs too, and the gradients reach what those of `linear_logprobs`
    do.

    This version composes the two. Computing the gradients inside the forward pass, and leaving out of every matrix
    product the rows that a zero advantage or the clip stops, is the fused kernel's work and comes with it.
    """
    backend.torch_only("linear_policy_loss")
    logp = linear_logprobs(
        hidden,
        weight,
        tokens,
        bias=bias,
        lora=lora,
        temperature=temperature,
        softcap=softcap,
        mask=mask,
        vocabulary_parallel=vocabulary_parallel,
    ).logp
    return policy_loss(
        logp,
        old_logp,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        surrogate=surrogate,
        weights=weights,
        kl=kl,
        reduce=reduce,
        normalizer=normalizer,
    )
