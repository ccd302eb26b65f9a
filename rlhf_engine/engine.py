"""The steps of RLHF as methods: the stages are written with them, and so can be any loop of yours.

engine = Engine(plugins=[GRPO()], rewards=[brevity], models=models)     # a function, or a plugin
rollout = engine.generate(prompts)                  # sample
batch = engine.experience(rollout, prompts)         # score -> token rewards -> advantages
for minibatch in batch.split(8):
    loss = engine.loss(minibatch)
    loss.value.backward()                           # the optimizer and the loop are yours
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pluggy
import torch
from torch import Tensor
from torch.optim import Optimizer

from rlhf_engine.batch import Batch, Loss, Output, Prompt, Rewarded, Rollout, Scored
from rlhf_engine.config import did_you_mean
from rlhf_engine.heads import described, heads_of, values_of
from rlhf_engine.manager import PluginError, manager, replaced, require
from rlhf_engine.models import Heads, Models
from rlhf_engine.rewards import Failure, RewardOptions, Rewards, as_plugin

__all__ = ["Engine"]

NEEDS = {"ref_logp", "values", "old_logp", "entropy", "groups"}


class Engine:
    """The steps of reinforcement learning from human feedback, with these plugins and these models.

    `plugins` are objects (or a manager made by `rlhf_engine.manager.manager`), `rewards` functions or more plugins.
    `reward_options` say by the name of a reward plugin (its class's or function's) what happens when it fails.
    One `temperature` serves the sampler, the policy, the reference and the loss. `samples_per_prompt` responses to
    a prompt form a group. `rows_per_forward` bounds memory: no more sequences than that go through a model at once
    (0: all). `missing_end_score`, if given, replaces the score of a response that was cut off before its end token.

    Raises `PluginError` for a misspelt hook, two answers to one hook, or none where one is needed.
    """

    def __init__(
        self,
        plugins: Iterable[Any] | pluggy.PluginManager,
        models: Models,
        *,
        rewards: Iterable[Any] = (),
        reward_options: Mapping[str, RewardOptions] | None = None,
        temperature: float = 1.0,
        response_length: int = 32,
        samples_per_prompt: int = 1,
        rows_per_forward: int = 0,
        missing_end_score: float | None = None,
    ) -> None:
        for name, value, least in (
            ("response_length", response_length, 1),
            ("samples_per_prompt", samples_per_prompt, 1),
            ("rows_per_forward", rows_per_forward, 0),
        ):
            if value < least:
                raise ValueError(f"{name} = {value}: it must be at least {least}")
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature}: it must be greater than 0 (sampling, never argmax)")
        if isinstance(plugins, pluggy.PluginManager):
            if rewards:
                raise ValueError("rewards=[...] is too late for a manager: give it them with its other plugins")
            self.manager = plugins
        else:
            self.manager = manager([*plugins, *map(as_plugin, rewards)])
        self.hook = self.manager.hook
        require(self.manager, ("rlhf_advantages", "rlhf_loss", "rlhf_reward"), by="the engine")
        self.models = models
        self.temperature = temperature
        self.response_length = response_length
        self.samples_per_prompt = samples_per_prompt
        self.rows_per_forward = rows_per_forward
        self.missing_end_score = missing_end_score
        self.needs = needs(self.manager)
        self.rewards = Rewards(self.hook.rlhf_reward, reward_options)
        self._ask_rewards = replaced(self.manager, "rlhf_reward", self.rewards.implementations())
        refuse_single_samples(self.manager, samples_per_prompt)
        if models.policy is None:
            raise ValueError("models.policy is None: there is nothing to train")
        if "ref_logp" in self.needs and models.reference is None:
            raise PluginError(f'{_who_needs(self.manager, "ref_logp")} needs "ref_logp", and models.reference is None')
        if self._own_values and not getattr(models.policy, "has_values", False):
            raise PluginError(
                f'{_who_needs(self.manager, "values")} needs "values", and models.critic is None. Give it a critic, or '
                "a policy with a value head of its own, which says so by `has_values = True`"
            )

    @property
    def weights(self) -> dict[str, float]:
        """name -> weight of the rewards that answered last; 0: a metric only"""
        return self.rewards.weights

    @property
    def failures(self) -> list[Failure]:
        """What rewards have failed on, the newest thousand."""
        return self.rewards.journal.failures

    def close(self) -> None:
        """End the processes of rewards that have one; otherwise they end with this process."""
        self.rewards.close()

    # ------------------------------------------------------------------------------------------- experience

    def generate(self, prompts: Sequence[Prompt], *, samples_per_prompt: int | None = None) -> Rollout:
        """Sample responses to each prompt, by default `self.samples_per_prompt`.

        Row i answers `prompts[rollout.group[i]]`.
        """
        if not prompts:
            raise ValueError("generate() got no prompts")
        samples = samples_per_prompt or self.samples_per_prompt
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        rollout: Rollout = self.hook.rlhf_generate(
            models=self.models,
            prompts=repeated,
            temperature=self.temperature,
            response_length=self.response_length,
        )
        if len(rollout) != len(repeated):
            raise ValueError(f"rlhf_generate returned {len(rollout)} responses to {len(repeated)} prompts")
        if rollout.tokens.shape[1] == 0 or not rollout.mask.any(1).all():
            raise ValueError(
                "rlhf_generate returned a response without tokens; every response needs at least one counted "
                "token (its end token, if nothing else), or it cannot be scored or learned from"
            )
        self._require_context(rollout)
        group = torch.arange(len(prompts), device=rollout.tokens.device)
        return dataclasses.replace(rollout, group=group.repeat_interleave(samples))

    def _require_context(self, rollout: Rollout) -> None:
        context = getattr(self.models.policy, "context", None)
        if context is None:
            return
        longest = int((rollout.prompt_mask.sum(1) + rollout.mask.sum(1)).max())
        if longest > context:
            raise ValueError(
                f"a prompt and its response have {longest} tokens, and the policy's context is {context}: shorten the "
                f"prompts, or response_length = {self.response_length}"
            )

    @torch.no_grad()
    def score(self, rollout: Rollout, prompts: Sequence[Prompt], *, normalize: bool = True) -> Scored:
        """Ask every reward, and every model that a plugin needs, about the rollout.

        Rows for which a reward of non-zero weight abstains (NaN) are left out of what is returned. `normalize` = False
        leaves rewards in their own units, and the statistics of those that are normalized as they are.

        Raises NothingJudged if no row is left.
        """
        if int(rollout.group.max()) >= len(prompts):
            raise ValueError(
                f"the rollout answers at least {int(rollout.group.max()) + 1} prompts, and {len(prompts)} were given: "
                "pass the prompts that generate() got"
            )
        answers = self._ask_rewards(
            rollout=rollout,
            prompts=[prompts[index] for index in rollout.group.tolist()],
            texts=self.texts(rollout),
            models=self.models,
        )
        by_name, scores = self.rewards.combined(answers, rollout, normalize=normalize)
        if self.missing_end_score is not None:
            scores = torch.where(rollout.ended | scores.isnan(), scores, self.missing_end_score)
        judged = ~scores.isnan()
        if not judged.any():
            raise self.rewards.nothing_judged(by_name)
        if not judged.all():
            rollout, scores = rollout[judged], scores[judged]
            by_name = {name: values[judged] for name, values in by_name.items()}
        columns = {"old_logp": rollout.logp}
        if self._asks_old_logp or self._own_values:
            columns |= self._by_rows(rollout, self._of_policy)
        if "ref_logp" in self.needs:
            columns |= self._by_rows(rollout, self._of_reference)
        if "values" in self.needs and not self._own_values:
            columns |= self._by_rows(rollout, self._of_critic)
        return rollout.extend(Scored, scores=scores, rewards_by_name=by_name, **columns)

    def token_rewards(self, scored: Scored) -> Rewarded:
        """A reward for every token: by default the score at the last one, less a KL penalty if one is active."""
        ask = self.hook.rlhf_token_rewards
        return scored.extend(Rewarded, rewards=_per_token(ask(scored=scored), scored, ask))

    def advantages(self, rewarded: Scored) -> Batch:
        """The algorithm's advantages, and the critic's targets; of what `score` gave, its token rewards come first."""
        if not isinstance(rewarded, Rewarded):
            rewarded = self.token_rewards(rewarded)
        ask = self.hook.rlhf_advantages
        advantages, returns = (_per_token(part, rewarded, ask) for part in ask(rewarded=rewarded))
        return rewarded.extend(Batch, advantages=advantages, returns=returns)

    def experience(self, rollout: Rollout, prompts: Sequence[Prompt]) -> Batch:
        """Score -> token rewards -> advantages, in one call."""
        return self.advantages(self.token_rewards(self.score(rollout, prompts)))

    # --------------------------------------------------------------------------------------------- learning

    def output(self, batch: Scored) -> Output:
        """What the policy (and the critic) say of the batch's tokens, with gradient."""
        policy = self.models.policy
        assert policy is not None, "the engine needs models.policy"
        self._no_dropout()
        heads = heads_of(policy, *_sequence(batch))
        logp, entropy = heads.logprobs(
            batch.tokens,
            batch.mask,
            start=batch.prompt_tokens.shape[1] - 1,
            temperature=self.temperature,
            entropy="entropy" in self.needs,
        )
        values = None
        if "values" in self.needs:
            values = self._values(heads, batch) if self._own_values else self._of_critic(batch)["values"]
        return Output(logp=logp, entropy=entropy, values=values)

    def loss(self, batch: Batch) -> Loss:
        """The algorithm's loss on a minibatch: `.value.backward()`, `.metrics`.

        A piece of a larger optimizer step carries that step's `total_tokens` and `total_sequences`; otherwise
        they are those of the batch itself.
        """
        if batch.total_tokens is None:
            batch = with_totals(batch)
        return ask_loss(self.hook.rlhf_loss, output=self.output(batch), batch=batch)

    def update(self, batch: Batch, optimizer: Optimizer, *, max_grad_norm: float = 1.0) -> dict[str, float]:
        """One optimizer step on a minibatch, in pieces of `rows_per_forward` whose gradients add up exactly.

        Raises FloatingPointError, and takes no step, if a gradient is not finite.
        """
        batch = with_totals(batch)
        parts = []
        for piece in batch.split(self.rows_per_forward or len(batch)):
            loss = self.loss(piece)
            loss.value.backward()
            metrics = {"loss": loss.value.detach(), **loss.metrics}
            # A loss is divided by the whole step's totals, so that of a piece is a share, where others are means.
            share = len(piece) / len(batch)
            parts.append((len(piece), {k: v / share if k.endswith("loss") else v for k, v in metrics.items()}))
        norm = step_optimizer(optimizer, self.parameters(), max_grad_norm)
        return {**combine(parts), "grad_norm": norm}

    def parameters(self) -> list[Tensor]:
        """What the optimizer trains: the policy's parameters, and the critic's if a plugin needs values."""
        trained = [self.models.policy, self.models.critic if "values" in self.needs else None]
        return list(dict.fromkeys(p for m in trained if m is not None for p in m.parameters() if p.requires_grad))  # type: ignore

    def _no_dropout(self) -> None:
        """In RL the models are always in evaluation mode; with dropout the first ratio would not be 1."""
        for model in (self.models.policy, self.models.reference, self.models.critic):
            if model is not None:
                model.train(False)

    # ---------------------------------------------------------------------------------------------- inside

    def texts(self, rollout: Rollout) -> list[str]:
        """The responses as text, without the end token and the padding."""
        counted = rollout.mask & (rollout.tokens != self.models.tokenizer.end_id)
        rows = zip(rollout.tokens.tolist(), counted.tolist(), strict=True)
        return self.models.tokenizer.decode([[t for t, c in zip(*row, strict=True) if c] for row in rows])

    @property
    def _asks_old_logp(self) -> bool:
        """Whether the log-probs that came with the samples do not serve as the old ones."""
        return "old_logp" in self.needs or getattr(self.models.policy, "rough_sampler", False)

    @property
    def _own_values(self) -> bool:
        """Whether the values that a plugin needs come with the policy's own forward."""
        return "values" in self.needs and self.models.critic is None

    def _by_rows(self, rollout: Rollout, function: Callable[[Rollout], dict[str, Tensor]]) -> dict[str, Tensor]:
        self._no_dropout()
        pieces = [function(piece) for piece in rollout.split(self.rows_per_forward or len(rollout))]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _of_policy(self, rollout: Rollout) -> dict[str, Tensor]:
        """The columns that take a forward of the policy: one gives them all."""
        assert self.models.policy is not None
        heads = heads_of(self.models.policy, *_sequence(rollout))
        columns = {"old_logp": self._logp(heads, rollout)} if self._asks_old_logp else {}
        return columns | ({"values": self._values(heads, rollout)} if self._own_values else {})

    def _of_reference(self, rollout: Rollout) -> dict[str, Tensor]:
        assert self.models.reference is not None
        return {"ref_logp": self._logp(heads_of(self.models.reference, *_sequence(rollout)), rollout)}

    def _of_critic(self, rollout: Rollout) -> dict[str, Tensor]:
        assert self.models.critic is not None
        return {"values": self._before_tokens(values_of(self.models.critic, *_sequence(rollout)), rollout)}

    def _logp(self, heads: Heads, rollout: Rollout) -> Tensor:
        start = rollout.prompt_tokens.shape[1] - 1
        return heads.logprobs(rollout.tokens, rollout.mask, start=start, temperature=self.temperature).logp

    def _values(self, heads: Heads, rollout: Rollout) -> Tensor:
        if heads.values is None:
            raise PluginError(
                f'{_who_needs(self.manager, "values")} needs "values", models.critic is None, and the policy, a '
                f"{type(self.models.policy).__name__}, returned Heads without them. Return Heads(..., values=tensor of "
                "shape [B, L]), or give models a critic"
            )
        return self._before_tokens(heads.values, rollout)

    @staticmethod
    def _before_tokens(values: Tensor, rollout: Rollout) -> Tensor:
        """The value before each response token, `[B, T]`, of those at every position, `[B, L]`."""
        start = rollout.prompt_tokens.shape[1] - 1
        return values[:, start : start + rollout.tokens.shape[1]].masked_fill(~rollout.mask, 0.0)


def needs(made: pluggy.PluginManager) -> set[str]:
    """What the plugins need, united; an unknown need is refused."""
    wanted: set[str] = set().union(*made.hook.rlhf_needs())
    for need in sorted(wanted - NEEDS):
        raise PluginError(
            f"{_who_needs(made, need)} needs {need!r}, which is unknown.{did_you_mean(need, NEEDS)} "
            f"Known: {', '.join(sorted(NEEDS))}"
        )
    return wanted


def refuse_single_samples(made: pluggy.PluginManager, samples_per_prompt: int) -> None:
    """Refuse an algorithm that compares the responses to a prompt where there is one: it would learn nothing."""
    if "groups" in needs(made) and samples_per_prompt < 2:
        raise PluginError(f"{_who_needs(made, 'groups')} compares responses: samples_per_prompt must be at least 2")


def _who_needs(made: pluggy.PluginManager, need: str) -> str:
    answers: list[tuple[str, Any]] = [(i.plugin_name, i.function()) for i in made.hook.rlhf_needs.get_hookimpls()]
    return " and ".join(name for name, needed in answers if need in needed)


def step_optimizer(optimizer: Optimizer, parameters: Iterable[Tensor], max_grad_norm: float) -> float:
    """Scale the gradients down to `max_grad_norm`, step, and clear them; returns their norm before.

    Raises FloatingPointError, and takes no step, if one of them is not finite.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not norm.isfinite():
        optimizer.zero_grad()
        raise FloatingPointError(
            f"the gradients' norm is {float(norm)}, so this step was not taken. Look for a learning rate that is too "
            "high, and for rewards, log-probs or a loss that are not finite."
        )
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def with_totals(batch: Batch) -> Batch:
    """The batch, with its own counts as the totals that losses are normalised by."""
    sequences = torch.tensor(len(batch), device=batch.mask.device)
    return dataclasses.replace(batch, total_tokens=batch.mask.sum(), total_sequences=sequences)


def combine(parts: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, float]:
    """Metrics of several pieces as one: the largest of those named `..._max`, the row-weighted mean of others."""
    total = sum(rows for rows, _ in parts)
    names = dict.fromkeys(name for _, metrics in parts for name in metrics)
    return {
        name: max(float(m[name]) for _, m in parts)
        if name.endswith("_max")
        else sum(rows * float(m[name]) for rows, m in parts) / total
        for name in names
    }


def _place(ask: pluggy.HookCaller) -> str:
    return f"{ask.name} (answered by {', '.join(impl.plugin_name for impl in reversed(ask.get_hookimpls()))})"


def _per_token(answer: Any, rollout: Rollout, ask: pluggy.HookCaller) -> Tensor:
    """The answer of a hook, which must have one number per response token."""
    if not isinstance(answer, Tensor) or answer.shape != rollout.mask.shape:
        raise PluginError(
            f"{_place(ask)} returned {described(answer)}; one number per token was asked: a tensor of shape "
            f"{tuple(rollout.mask.shape)}"
        )
    return answer


def ask_loss(ask: pluggy.HookCaller, **arguments: Any) -> Loss:
    """The answer of a hook, which must be a `Loss` with a scalar value."""
    answer = ask(**arguments)
    if not isinstance(answer, Loss):
        raise PluginError(f"{_place(ask)} returned {described(answer)}; return Loss(value=..., metrics={{...}})")
    if answer.value.dim():
        raise PluginError(f"{_place(ask)} returned a Loss of {described(answer.value)}; its value must be a scalar")
    return answer


def _sequence(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Prompt and response as one `[B, P + T]` of tokens and mask."""
    tokens = torch.cat([rollout.prompt_tokens, rollout.tokens], dim=1)
    return tokens, torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
