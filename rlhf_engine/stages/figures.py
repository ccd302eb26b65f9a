"""What the rl stage says of a cycle, and of the policy before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_engine.batch import Batch, Prompt, Rollout, Scored
from rlhf_engine.checkpoint import load_rng, rng_state
from rlhf_engine.engine import Engine, combine
from rlhf_engine.run import log
from rlhf_kernels import kl_estimate, masked_mean

__all__ = ["ROUNDING", "evaluate", "rollout_metrics", "sequence_metrics", "step_metrics"]

ROUNDING = 1e-4  # nats per token


@torch.no_grad()
def evaluate(engine: Engine, prompts: list[Prompt], *, seed: int) -> dict[str, Any]:
    """Answer prompts, and say how the rewards judge the answers. Leaves the run's random numbers as they were."""
    before = rng_state()
    torch.manual_seed(seed)
    rollout = engine.generate(prompts, samples_per_prompt=1)
    scored = engine.score(rollout, prompts, normalize=False)  # in units that stay the same
    load_rng(before)

    def judged(values: Tensor, weight: float) -> dict[str, float]:
        values = values[~values.isnan()]  # a metric may abstain on some
        return {"mean": float(values.mean()), "std": float(values.std()), "weight": weight}

    rewards = {name: judged(values, engine.weights[name]) for name, values in scored.rewards_by_name.items()}
    figures = sequence_metrics(scored)
    return {
        "score": judged(scored.scores, 1.0),
        "rewards": rewards,
        **figures,
        "samples": samples(engine, rollout),
    }


def samples(engine: Engine, rollout: Rollout) -> list[dict[str, str]]:
    """Prompts and responses as text."""
    rows = zip(rollout.prompt_tokens.tolist(), rollout.prompt_mask.tolist(), strict=True)
    prompts = engine.models.tokenizer.decode([[t for t, c in zip(*row, strict=True) if c] for row in rows])
    responses = engine.texts(rollout)
    return [{"prompt": p, "response": r} for p, r in zip(prompts, responses, strict=True)]


def sequence_metrics(scored: Scored) -> dict[str, float]:
    """What can be said of sampled sequences: their KL from the reference (nats per sequence), length, entropy."""
    lengths = scored.mask.sum(1).float()
    metrics = {
        "length": lengths.mean(),
        "truncated": (~scored.ended).float().mean(),
        # The mean surprise of sampled tokens is an unbiased estimate of the entropy, and costs nothing.
        "entropy": -masked_mean(scored.old_logp, scored.mask),
    }
    if scored.ref_logp is not None:
        estimates = {
            "kl": kl_estimate(scored.old_logp, scored.ref_logp, kind="k1"),
            "kl_k3": kl_estimate(scored.old_logp, scored.ref_logp, kind="k3"),
        }
        for name, per_token in estimates.items():
            metrics[name] = per_token.masked_fill(~scored.mask, 0.0).sum(1).mean()
    return {name: float(value) for name, value in metrics.items()}


def step_metrics(engine: Engine, batch: Batch, updates: list[dict[str, float]]) -> dict[str, Any]:
    """Everything there is to log of one cycle: its experience, its updates together, and a few samples."""
    first = updates[0].get("approx_kl", 0.0)
    sampler = float(masked_mean(kl_estimate(batch.logp, batch.old_logp, kind="k3"), batch.mask))
    # Both sides of the first come from one forward if "old_logp" is needed; a sampler's arithmetic may differ.
    warn_if_off_policy(first, 0.0 if "old_logp" in engine.needs else ROUNDING, "the first minibatch of a cycle")
    warn_if_off_policy(sampler, ROUNDING, "the sampler")
    return {
        **rollout_metrics(batch),
        **engine.rewards.step_metrics(),
        **combine([(1, update) for update in updates]),
        "first_approx_kl": first,
        "sampler_kl": sampler,
        "samples": samples(engine, batch[:3]),
    }


def rollout_metrics(batch: Batch) -> dict[str, float]:
    """The figures of one cycle's experience: scores before and after shaping, returns, and the critic's error."""
    metrics = {
        "score": batch.scores.mean(),
        "score_std": batch.scores.std(unbiased=False),
        **{f"score/{name}": values.nanmean() for name, values in batch.rewards_by_name.items()},
        "reward": batch.rewards.sum(1).mean(),
    }
    target = batch.returns[batch.mask]
    metrics["return"] = target.mean()
    if batch.values is not None:
        error = target - batch.values[batch.mask]
        metrics["value_error"] = error.square().mean()
        metrics["explained_variance"] = 1 - error.var(unbiased=False) / target.var(unbiased=False).clamp(min=1e-12)
    return {
        **{name: float(value) for name, value in metrics.items()},
        **sequence_metrics(batch),
        "episodes": len(batch),
    }


def warn_if_off_policy(kl: float, allowed: float, whose: str) -> None:
    """Before any update of a cycle the policy is the sampler: the KL between them is 0, or something is off."""
    if not kl <= allowed:
        log.warning(
            "%s has an approximate KL of %.3g nats per token from the policy (allowed: %g): the two disagree about "
            "log-probs. Look for dropout, another temperature, or weights changed in between.",
            whose,
            kl,
            allowed,
        )
