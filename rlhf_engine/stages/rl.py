"""Stage 3: reinforcement learning against the rewards.   generate -> experience -> [minibatch] update"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from rlhf_engine.batch import Batch, Prompt, Rollout, Scored
from rlhf_engine.checkpoint import folder_hash, load_rng, rng_state
from rlhf_engine.engine import Engine, combine, needs, refuse_single_samples
from rlhf_engine.hookspecs import Stage, hookimpl
from rlhf_engine.models import Models
from rlhf_engine.run import Run, log
from rlhf_engine.stages.pretrain import save_result
from rlhf_engine.stages.resumable import Resumable, linear_to_zero
from rlhf_kernels import kl_estimate, masked_mean

__all__ = ["RL"]

ROUNDING = 1e-4  # nats per token


@dataclass(eq=False)
class RL:
    """Fine-tune the policy with the run's algorithm, and compare it with where it started."""

    steps: PositiveInt = 40
    """cycles of generating and learning"""
    prompts_per_step: PositiveInt = 64
    """prompts in a cycle"""
    samples_per_prompt: PositiveInt = 1
    """responses to a prompt; they form a group"""
    epochs: PositiveInt = 4
    """passes over the experience of a cycle"""
    minibatch_size: PositiveInt = 16
    """responses in an optimizer step"""
    rows_per_forward: NonNegativeInt = 0
    """responses that go through a model at once, to bound memory; 0: a minibatch"""
    response_length: PositiveInt = 32
    """most tokens in a response"""
    temperature: PositiveFloat = 1.0
    """of sampling, and of every log-prob"""
    learning_rate: PositiveFloat = 1e-4
    """at its highest; it falls linearly to 0"""
    max_grad_norm: PositiveFloat = 1.0
    """gradients are scaled down to this norm"""
    missing_end_score: float | None = None
    """the score of a response that is cut off at `response_length`; not given: what the rewards say of it"""
    evaluation_prompts: Annotated[int, Field(ge=2)] = 128
    """held-out prompts that the policy answers before and after"""
    checkpoint_every: PositiveInt = 50
    """optimizer steps between checkpoints, which may fall inside a cycle"""

    @hookimpl
    def rlhf_stages(self) -> dict[str, Stage]:
        hooks = (
            "rlhf_prompts",
            "rlhf_models",
            "rlhf_generate",
            "rlhf_reward",
            "rlhf_advantages",
            "rlhf_loss",
        )
        return {"rl": Stage(work=self.work, requires=hooks)}

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        refuse_single_samples(run.manager, self.samples_per_prompt)  # now, and not after the stages before this one

    def work(self, run: Run) -> Path:
        engine = self._engine(run)
        prompts, heldout = self._prompts(run, engine.models)
        state = self._state(run, engine)
        at, optimizer = state.position, state.optimizer
        if at["before"] is None:
            run.say(f"rl: the starting policy answers {len(heldout)} held-out prompts")
            at["before"] = evaluate(engine, heldout, seed=run.seed)

        while at["step"] < self.steps:
            if state.batch is None:
                asked = self._next_prompts(prompts, at, run.seed)
                rollout = engine.generate(asked)
                state.batch = engine.experience(rollout[torch.randperm(len(rollout))], asked)
                at.update(order=self._order(len(state.batch)), update=0, metrics=[])
                state.tick()
            linear_to_zero(optimizer, at["step"], self.steps)
            while at["update"] < len(at["order"]):
                minibatch = state.batch[at["order"][at["update"]]]
                at["metrics"].append(engine.update(minibatch, optimizer, max_grad_norm=self.max_grad_norm))
                at["update"] += 1
                state.tick()
            at["step"] += 1
            run.step_end("rl", at["step"], self.steps, step_metrics(engine, state.batch, at["metrics"]))
            state.batch = None

        run.say(f"rl: the trained policy answers the same {len(heldout)} prompts")
        results = {"before": at["before"], "after": evaluate(engine, heldout, seed=run.seed)}
        models = engine.models
        return state.finish(lambda folder: save_result(folder, models.policy, models.tokenizer, results))

    def _engine(self, run: Run) -> Engine:
        return Engine(
            run.manager,
            run.hook.rlhf_models(run=run, stage="rl", needs=needs(run.manager)),
            temperature=self.temperature,
            response_length=self.response_length,
            samples_per_prompt=self.samples_per_prompt,
            rows_per_forward=self.rows_per_forward or self.minibatch_size,
            missing_end_score=self.missing_end_score,
        )

    def _state(self, run: Run, engine: Engine) -> Resumable:
        optimizer = run.hook.rlhf_optimizer(
            parameters=engine.parameters(), learning_rate=self.learning_rate, stage="rl"
        )
        trained: dict[str, Any] = {"policy": engine.models.policy}
        if "values" in engine.needs and engine.models.critic is not None:
            trained["critic"] = engine.models.critic
        reference = run.result("pretrain")
        return Resumable(
            run,
            "rl",
            models=trained,
            optimizer=optimizer,
            position={"step": 0, "cursor": 0, "update": 0, "order": [], "metrics": [], "before": None},
            every=self.checkpoint_every,
            built_from=folder_hash(reference) if reference else "",
        )

    def _prompts(self, run: Run, models: Models) -> tuple[list[Prompt], list[Prompt]]:
        """The prompts to learn on, and a fixed few held-out ones to report on; all are checked before any is used."""
        prompts = list(run.hook.rlhf_prompts(run=run))
        by_split = {split: [p for p in prompts if p.split == split] for split in ("train", "heldout")}
        for split, found in by_split.items():
            if not found:
                raise ValueError(f'rlhf_prompts gave no prompt of the split "{split}"; this stage needs some')
            refuse_unanswerable(models, found, self.response_length)
        return by_split["train"], by_split["heldout"][: self.evaluation_prompts]

    def _next_prompts(self, prompts: list[Prompt], at: dict[str, Any], seed: int) -> list[Prompt]:
        """The next prompts of an endless walk through all of them, in a new order every time round."""
        chosen = []
        for _ in range(self.prompts_per_step):
            epoch, place = divmod(at["cursor"], len(prompts))
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed + epoch))
            chosen.append(prompts[int(order[place])])
            at["cursor"] += 1
        return chosen

    def _order(self, rows: int) -> list[Tensor]:
        """Which rows each optimizer step of a cycle takes: all of them once an epoch, in a random order.

        The rows come shuffled, and the first epoch takes them as they stand: in the very batches that `old_logp`
        was computed in, because a row's last bits depend on its place in a batch.
        """
        orders = [torch.arange(rows), *(torch.randperm(rows) for _ in range(self.epochs - 1))]
        return [part for order in orders for part in order.split(self.minibatch_size)]


def refuse_unanswerable(models: Models, prompts: list[Prompt], response_length: int) -> None:
    """Raise ValueError for an empty prompt, and for one that leaves no room for the response in the context."""
    context = getattr(models.policy, "context", None)
    encoded = models.tokenizer.encode([models.as_prompt(prompt.text) for prompt in prompts])
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens:
            raise ValueError(
                f"rlhf_prompts gave a prompt without tokens, {prompt.text!r}: there is nothing to continue. Leave "
                "empty prompts out, or begin each with some text."
            )
        if context is not None and len(tokens) + response_length > context:
            raise ValueError(
                f"rlhf_prompts gave a prompt of {len(tokens)} tokens, and with response_length = {response_length} it "
                f"is longer than the policy's context of {context}. Shorten the prompts or the response, or take a "
                f"longer context. It begins {prompt.text[:60]!r}"
            )


@torch.no_grad()
def evaluate(engine: Engine, prompts: list[Prompt], *, seed: int) -> dict[str, Any]:
    """Answer prompts, and say how the rewards judge the answers. Leaves the run's random numbers as they were."""
    before = rng_state()
    torch.manual_seed(seed)
    rollout = engine.generate(prompts, samples_per_prompt=1)
    scored = engine.score(rollout, prompts)
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
