"""Our side of the step benches: what the stages do in one step, on the same model and texts as the rivals."""

import copy
import itertools
import math
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_engine import Engine, FunctionReward, Models, Preference, Prompt
from rlhf_engine.defaults import Defaults
from rlhf_engine.engine import step_optimizer
from rlhf_engine.stages.pretrain import next_token_output
from rlhf_engine.stages.reward import score_pairs
from rlhf_plugins.bradley_terry import BradleyTerry
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.hf import HFPolicy, HFScalar, HFTokenizer
from rlhf_plugins.kl_penalty import KLPenalty
from rlhf_plugins.ppo import PPO
from rlhf_plugins.reward_model import RewardModelScore
from rlhf_plugins.whiten import Whiten

from .subject import Setting, letter_share, make_blocks, make_preferences


def _batches(prompts: list[str], size: int) -> "itertools.cycle[list[Prompt]]":
    return itertools.cycle(
        [[Prompt(text=text) for text in prompts[i : i + size]] for i in range(0, len(prompts), size)]
    )


def pretrain(model: LlamaForCausalLM, setting: Setting) -> Callable[[], None]:
    """32 blocks of 128 tokens through the pretrain stage's own functions."""
    policy = HFPolicy(copy.deepcopy(model)).train()
    optimizer = Defaults().rlhf_optimizer(parameters=policy.parameters(), learning_rate=1e-6, stage="pretrain")
    batches = itertools.cycle(make_blocks(setting, 64 * setting.batch).split(setting.batch))

    def step() -> None:
        tokens = next(batches)
        everything = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
        loss = Defaults().rlhf_lm_loss(output=next_token_output(policy, tokens), mask=everything)
        loss.value.backward()
        step_optimizer(optimizer, policy.parameters(), 1.0)
        # Random tokens cannot be learned: nats per token of a model that knows nothing.
        assert abs(loss.value.item() - math.log(setting.vocabulary)) < 0.2, loss

    return step


def grpo(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], setting: Setting
) -> Callable[[], None]:
    """8 prompts x 4 responses, a plain function as the reward, one update on all 32 (token mean, as TRL's default)."""
    models = Models(
        tokenizer=HFTokenizer(copy.deepcopy(tokenizer)), policy=HFPolicy(copy.deepcopy(model)), device=model.device
    )
    engine = Engine(
        [GRPO(reduce="tokens"), FunctionReward(letter_share)],
        models,
        samples_per_prompt=setting.group,
        response_length=setting.response_length,
    )
    optimizer = _optimizer(engine)
    batches = _batches(prompts, setting.prompts)

    def step() -> None:
        asked = next(batches)
        metrics = engine.update(engine.experience(engine.generate(asked), asked), optimizer)
        # The step is right, or its time is worth nothing.
        assert abs(metrics["ratio_mean"] - 1) < (1e-4 if model.dtype == torch.float32 else 0.05), metrics

    return step


def ppo(
    policy: LlamaForCausalLM,
    critic: LlamaForSequenceClassification | None,
    reward_model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    setting: Setting,
) -> Callable[[], None]:
    """32 prompts, reward model, critic, frozen reference, 4 epochs of one minibatch each.

    Without a critic the values come from a head on the policy's trunk: one network is trained instead of two.
    """
    models = Models(
        tokenizer=HFTokenizer(copy.deepcopy(tokenizer)),
        policy=HFPolicy(copy.deepcopy(policy)),
        reference=HFPolicy(copy.deepcopy(policy)).requires_grad_(False),
        critic=None if critic is None else HFScalar(copy.deepcopy(critic)),
        reward_model=HFScalar(copy.deepcopy(reward_model)).requires_grad_(False),
        device=policy.device,
    )
    if critic is None:
        models.policy.add_value_head()  # type: ignore[union-attr]
    engine = Engine(
        [PPO(), KLPenalty(beta=0.05), Whiten(), RewardModelScore()], models, response_length=setting.response_length
    )
    optimizer = _optimizer(engine)
    batches = _batches(prompts, setting.batch)

    def step() -> None:
        asked = next(batches)
        batch = engine.experience(engine.generate(asked), asked)
        metrics = [engine.update(batch, optimizer) for _ in range(4)]
        assert abs(metrics[0]["approx_kl"]) <= (0 if policy.dtype == torch.float32 else 0.05), metrics[0]

    return step


def reward(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, setting: Setting
) -> Callable[[], None]:
    """32 pairs of 48 tokens through the reward stage's own functions."""
    models = Models(
        tokenizer=HFTokenizer(copy.deepcopy(tokenizer)), reward_model=HFScalar(copy.deepcopy(model)).train()
    )
    parameters = list(models.reward_model.parameters())  # type: ignore[union-attr, arg-type]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    loss_of = BradleyTerry().rlhf_preference_loss
    texts = make_preferences(setting, 64 * setting.batch)
    pairs = [Preference(chosen=c, rejected=r) for c, r in zip(texts["chosen"], texts["rejected"], strict=True)]
    batches = itertools.cycle([pairs[i : i + setting.batch] for i in range(0, len(pairs), setting.batch)])

    def step() -> None:
        loss = loss_of(**score_pairs(models, next(batches)))
        loss.value.backward()
        step_optimizer(optimizer, parameters, 1.0)

    return step


def _optimizer(engine: Engine) -> torch.optim.Optimizer:
    return engine.hook.rlhf_optimizer(parameters=engine.parameters(), learning_rate=1e-6, stage="rl")
