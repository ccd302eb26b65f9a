"""V-trace: off-policy corrected value targets and advantages."""

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _scan
from rlhf_kernels.ops.gae import Advantages


@torch.no_grad()
def vtrace(
    rewards: Tensor,
    values: Tensor,
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    """V-trace targets as `returns`, and the policy gradient's `advantages` that go with them:

        vs_t  = V_t + rho_t * (r_t + gamma * V_t' - V_t) + gamma * c_t * (vs_t' - V_t')
        A_t   = rho_t * (r_t + gamma * vs_t' - V_t)
        rho_t = min(rho_clip, exp(logp_t - old_logp_t)),    c_t = lam * min(c_clip, exp(logp_t - old_logp_t))

    t' is the next counted token of the sequence: masked holes are skipped, as in `gae`. After the last counted token
    V and vs are `bootstrap`, or 0 if the text ended there. On policy (logp = old_logp, clips of 1 or more) the targets
    are the TD(lambda) returns of `gae`; the advantages are one step from vs, and equal gae's at lambda 1 only.

    The advantages already contain rho_t: the policy's loss is `-A_t * logp_t`, not a ratio times A_t. Of the two forms
    in use this is the paper's and IMPALA's code (`vs_t'`); rlax's also mixes lambda into the advantages. The paper
    clips rho in the advantages by a bound of its own, which here is rho_clip as well. Results carry no gradient.

    Args:
        rewards: `[B, T]` floating, reward of each token; or `[N]`, sequences one after another, with cu_seqlens.
        values: the same shape, floating: the critic's value before each token, in the reward's unit.
        logp: the same shape, floating, nats: log-probs of the tokens under the policy that learns.
        old_logp: the same shape, floating, nats: under the policy that sampled them.
        mask: the same shape, bool, True = counts.
        gamma: discount per counted token, in [0, 1].
        lam: factor of every c, in [0, 1] (the paper's remark 2).
        rho_clip: bound of rho, which decides what the targets converge to; positive, math.inf for none.
        c_clip: bound of c, which decides how far corrections reach; positive. The paper has c_clip <= rho_clip, and 1
            for both. Above 1 nothing bounds a product of many c: over a long sequence it can pass float32's range, and
            the targets become infinite or NaN. At most 1 they stay finite at any length.
        bootstrap: `[B]` floating, value after the last counted token of a truncated sequence; None = all ended, 0.
        cu_seqlens: `[S + 1]` integer, for packed input, as in `gae`; bootstrap is `[S]` then.

    Returns:
        In the shape of rewards, float32 (float64 if an input is), exactly 0 where masked.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape does not fit, or a number outside its range.

    Source: Espeholt et al. 2018, "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner
    Architectures", equation 1, remark 1 and section 4.2.
    """
    tokens = {"rewards": rewards, "values": values, "logp": logp, "old_logp": old_logp}
    _scan.check_layout(cu_seqlens, bootstrap, **tokens, mask=mask)
    _scan.unit_interval(gamma=gamma, lam=lam)
    for name, bound in (("rho_clip", rho_clip), ("c_clip", c_clip)):
        if not bound > 0:
            raise ValueError(f"{name} must be positive (math.inf for none), got {bound}")
    if backend.use_triton("vtrace", *(x for x in (*tokens.values(), bootstrap) if x is not None)):
        from rlhf_kernels._triton import vtrace as twin

        run = twin.operator if torch.compiler.is_compiling() else twin.forward
        rest = (mask, bootstrap, cu_seqlens, float(gamma), float(lam), float(rho_clip), float(c_clip))
        return Advantages(*run(rewards, values, logp, old_logp, *rest))
    dtype = _check.accumulation_dtype(*tokens.values())
    rewards, values, logp, old_logp = (torch.where(mask, x.to(dtype), 0.0) for x in tokens.values())
    layout = _scan.Layout.of(mask, cu_seqlens)
    at_end = layout.of_each(bootstrap, dtype)
    ratio = (logp - old_logp).exp()
    rho, c = ratio.clamp(max=rho_clip), lam * ratio.clamp(max=c_clip)
    # Equation 1 as one scan of vs: what multiplies vs_t' is the decay, all else the term.
    next_value = layout.next_counted(values, mask, at_end)
    term = values + rho * (rewards - values) + gamma * (rho - c) * next_value
    decay, term = torch.where(mask, gamma * c, 1.0), torch.where(mask, term, 0.0)
    reaching = layout.reaching(decay, term, at_end)
    targets = torch.where(mask, term + decay * reaching, 0.0)
    advantages = torch.where(mask, rho * (rewards + gamma * reaching - values), 0.0)
    return Advantages(advantages, targets)
