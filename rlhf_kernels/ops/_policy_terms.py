"""What a policy loss is put together from: the surrogates, a KL term, an entropy term."""

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

from torch import Tensor

from rlhf_kernels.ops.kl_estimate import Kind


@dataclass(frozen=True, kw_only=True)
class Clip:
    """PPO's surrogate, as the keywords of `policy_loss` give it."""

    clip_low: float
    clip_high: float
    dual_clip: float | None

    def __post_init__(self) -> None:
        _check_clips(self.clip_low, self.clip_high)
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1 (or None for none), got {self.dual_clip}")


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """Per token `-clamp(ratio, 1 - clip_low, 1 + clip_high) * A * logp`; the gradient goes through logp alone.

    A clipped token keeps a gradient, of a bounded weight. Without clip_low there is no lower bound, as in the paper,
    which gives no value for clip_high. (TRL's `epsilon_high` is the bound itself: 1 + clip_high.)

    Source: MiniMax 2025, "MiniMax-M1", arXiv:2506.13585, equations 4 and 5.
    """

    clip_high: float
    clip_low: float | None = None

    def __post_init__(self) -> None:
        _check_clips(0 if self.clip_low is None else self.clip_low, self.clip_high)


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """PPO's clip on the ratio of the whole sequence, `s = exp(mean over its counted tokens of logp - old_logp)`:

        -min(s * A, clamp(s, 1 - clip_low, 1 + clip_high) * A)    for each of its tokens

    so with `reduce="sequences"` each sequence counts once, as in the paper. The gradient goes through s: every counted
    token gets an equal part, 1 / length. Needs `[B, T]`. The defaults are the paper's; s varies far less than a
    token's ratio does.

    Source: Zheng et al. 2025, "Group Sequence Policy Optimization", arXiv:2507.18071, equations 5 and 7; clips: 5.1.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        _check_clips(self.clip_low, self.clip_high)


@dataclass(frozen=True, kw_only=True)
class SAPO:
    """A soft gate for the clip: per token `-4 / tau * sigmoid(tau * (ratio - 1)) * A`, where tau is `positive` for
    A > 0 and `negative` for A < 0.

    At ratio 1 the gradient is that of `-ratio * A`, and it fades on either side, the faster the larger tau is. There
    is no clip, so the metrics have no clip fraction. The defaults are the paper's.

    Source: Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv:2511.20347.
    """

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        for name, value in (("positive", self.positive), ("negative", self.negative)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive temperature, got {value}")


Surrogate = CISPO | GSPO | SAPO


@dataclass(frozen=True, eq=False, kw_only=True)
class KLTerm:
    """`+ coefficient * kl_estimate(logp, ref_logp, kind)` per token, with a gradient to logp only.

    ref_logp has the shape of logp: the reference policy's log-probs, at the same temperature. In expectation over
    tokens from the policy the gradient follows, by kind:

        k1: nothing, it is 0; put k1 into the reward instead
        k2: KL(policy || reference)
        k3: KL(reference || policy)   (GRPO's, Shao et al. 2024, arXiv:2402.03300, equation 4)
    """

    ref_logp: Tensor
    coefficient: float
    kind: Kind = "k3"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; allowed are {', '.join(get_args(Kind))}")
        _check_coefficient(self.coefficient)


@dataclass(frozen=True, eq=False, kw_only=True)
class EntropyTerm:
    """`- coefficient * entropy` per token. entropy has the shape of logp, in nats, such as
    `token_logprobs(..., entropy=True).entropy`, and gets a gradient."""

    entropy: Tensor
    coefficient: float

    def __post_init__(self) -> None:
        _check_coefficient(self.coefficient)


class Inputs(NamedTuple):
    """The arguments of `policy_loss`, checked. form: the surrogate; sequences: whether each sequence is averaged."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor
    form: Clip | Surrogate
    weights: Tensor | None
    kl: KLTerm | None
    entropy: EntropyTerm | None
    sequences: bool
    normalizer: float | Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that decide the dtype of the result, and where it is computed."""
        given = [self.logp, self.old_logp, self.advantages]
        if self.weights is not None:
            given.append(self.weights)
        if self.kl is not None:
            given.append(self.kl.ref_logp)
        if self.entropy is not None:
            given.append(self.entropy.entropy)
        return given


def _check_clips(clip_low: float, clip_high: float) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be 0 or more, got {clip_high}")


def _check_coefficient(coefficient: float) -> None:
    if not math.isfinite(coefficient):
        raise ValueError(f"coefficient must be a finite number, got {coefficient}")
