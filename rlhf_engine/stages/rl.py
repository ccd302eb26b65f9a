"""Stage 3: reinforcement learning against the rewards.   generate -> experience -> [minibatch] update"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from rlhf_engine.batch import Prompt
from rlhf_engine.checkpoint import folder_hash
from rlhf_engine.config import build
from rlhf_engine.engine import Engine, needs, refuse_single_samples
from rlhf_engine.hookspecs import Stage, hookimpl
from rlhf_engine.models import Models
from rlhf_engine.rewards import NothingJudged, RewardOptions, Rewards
from rlhf_engine.run import Run
from rlhf_engine.stages.figures import evaluate, step_metrics
from rlhf_engine.stages.pretrain import save_result
from rlhf_engine.stages.resumable import Resumable, linear_to_zero

__all__ = ["RL"]

LOST_IN_A_ROW = 3
FAILURES = "failures.jsonl"


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
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """[rl.rewards.NAME] tables, by reward plugin: what happens when it fails (the fields of RewardOptions)"""

    def __post_init__(self) -> None:
        self.reward_options = {
            name: build(RewardOptions, table, where=f"[rl.rewards.{name}]") for name, table in self.rewards.items()
        }

    def decides(self, table: dict[str, Any]) -> dict[str, Any]:
        """All but how a reward is asked and what happens when it fails: whoever reads that a reward failed may change
        that, and go on. On what scale a reward counts does decide."""
        scales = {name: {"normalize": True} for name, of in self.reward_options.items() if of.normalize}
        rest = {key: value for key, value in table.items() if key != "rewards"}
        return {**rest, "rewards": scales} if scales else rest

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
        # Now, and not after the stages before this one.
        refuse_single_samples(run.manager, self.samples_per_prompt)
        Rewards(run.hook.rlhf_reward, self.reward_options)

    def work(self, run: Run) -> Path:
        engine = self._engine(run)
        try:
            return self._learn(run, engine)
        finally:
            engine.close()

    def _learn(self, run: Run, engine: Engine) -> Path:
        prompts, heldout = self._prompts(run, engine.models)
        state = self._state(run, engine)
        at, optimizer = state.position, state.optimizer
        if at["before"] is None:
            run.say(f"rl: the starting policy answers {len(heldout)} held-out prompts")
            at["before"] = evaluate(engine, heldout, seed=run.seed)

        while at["step"] < self.steps:
            if state.batch is None and not self._experience(run, engine, prompts, state):
                continue
            linear_to_zero(optimizer, at["step"], self.steps)
            while at["update"] < len(at["order"]):
                minibatch = state.batch[at["order"][at["update"]]]
                at["metrics"].append(engine.update(minibatch, optimizer, max_grad_norm=self.max_grad_norm))
                at["update"] += 1
                state.tick()
            at["step"] += 1
            run.step_end("rl", at["step"], self.steps, step_metrics(engine, state.batch, at["metrics"]))
            state.batch = None

        if at["after"] is None:
            run.say(f"rl: the trained policy answers the same {len(heldout)} prompts")
            engine.rewards.journal.step = None
            at["after"] = evaluate(engine, heldout, seed=run.seed)
        results = {"before": at["before"], "after": at["after"]}
        results |= {"rewards": engine.rewards.summary(), "lost_cycles": at["lost"]}
        say_failures(run, engine)
        models = engine.models
        return state.finish(lambda folder: save_result(folder, models.policy, models.tokenizer, results))

    def _experience(self, run: Run, engine: Engine, prompts: list[Prompt], state: Resumable) -> bool:
        """Make the experience of a cycle. If no sample was judged it is lost, and the next prompts are asked instead.

        Raises NothingJudged for one lost cycle too many in a row.
        """
        at = state.position
        engine.rewards.journal.step = at["step"] + 1
        asked = self._next_prompts(prompts, at, run.seed)
        rollout = engine.generate(asked)
        try:
            batch = engine.experience(rollout[torch.randperm(len(rollout))], asked)
        except NothingJudged as error:
            at.update(lost=at["lost"] + 1, lost_in_a_row=at["lost_in_a_row"] + 1)
            if at["lost_in_a_row"] > LOST_IN_A_ROW:
                error.add_note(
                    f"This was cycle {at['lost_in_a_row']} in a row without a judged sample; more than {LOST_IN_A_ROW} "
                    f"stop the run. {run.folder / FAILURES} says why, if a reward failed. Mend that, then run the same "
                    "command again: it goes on from its last checkpoint."
                )
                raise
            run.say(f"rl: a cycle for step {at['step'] + 1} is lost, and begun again with the next prompts: {error}")
            state.tick()
            return False
        state.batch = batch
        at.update(order=self._order(len(batch)), update=0, metrics=[], lost_in_a_row=0)
        state.tick()
        return True

    def _engine(self, run: Run) -> Engine:
        engine = Engine(
            run.manager,
            run.hook.rlhf_models(run=run, stage="rl", needs=needs(run.manager)),
            temperature=self.temperature,
            response_length=self.response_length,
            samples_per_prompt=self.samples_per_prompt,
            rows_per_forward=self.rows_per_forward or self.minibatch_size,
            missing_end_score=self.missing_end_score,
            reward_options=self.reward_options,
        )
        engine.rewards.journal.file = run.folder / FAILURES
        return engine

    def _state(self, run: Run, engine: Engine) -> Resumable:
        optimizer = run.hook.rlhf_optimizer(
            parameters=engine.parameters(), learning_rate=self.learning_rate, stage="rl"
        )
        trained: dict[str, Any] = {"policy": engine.models.policy, "rewards": engine.rewards}
        if "values" in engine.needs and engine.models.critic is not None:
            trained["critic"] = engine.models.critic
        reference = run.result("pretrain")
        return Resumable(
            run,
            "rl",
            models=trained,
            optimizer=optimizer,
            position={
                "step": 0,
                "cursor": 0,
                "update": 0,
                "order": [],
                "metrics": [],
                "before": None,
                "after": None,
                "lost": 0,
                "lost_in_a_row": 0,
            },
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


def say_failures(run: Run, engine: Engine) -> None:
    """Tell of every reward that did not judge everything."""
    for name, counts in engine.rewards.summary().items():
        told = ", ".join(f"{what.replace('_', ' ')} {number}" for what, number in counts.items() if number)
        run.say(f"rl: the reward {name}: {told}")
    if (run.folder / FAILURES).exists():
        run.say(f"rl: every failure of a reward stands in {run.folder / FAILURES}")
