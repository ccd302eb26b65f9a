"""Models and tokenizers through transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlhf_engine.hookspecs import hookimpl
from rlhf_engine.models import Critic, Models

from .policy import HFPolicy
from .scalar import HFScalar
from .tokenizer import HFTokenizer

if TYPE_CHECKING:
    from rlhf_engine.run import Run

__all__ = ["HFPolicy", "HFScalar", "HFTokenizer", "HuggingFace", "load_models"]


def load_models(
    folder: Path | str,
    *,
    reference: bool = False,
    critic: bool = False,
    value_head: bool = False,
    reward_model: Path | str | Sequence[Path | str] | None = None,
    device: str | torch.device = "cpu",
) -> Models:
    """The models of reinforcement learning, from the Hugging Face folder of a causal language model.

    Args:
        folder: the policy and its tokenizer.
        reference: also a frozen copy of the policy.
        critic: also a value model, on the reward model's trunk if there is one, else on the policy's; its head
            is 0, so its first values are.
        value_head: also a value head, at 0, on the policy's own trunk; it serves where there is no critic.
        reward_model: the folder of a sequence classifier with the same tokenizer, which is frozen; several: an
            ensemble, and a critic then takes the first one's trunk.
        device: where the models live.

    Raises:
        FileNotFoundError: one of the folders is none.
        ValueError: a folder that does not fit its purpose, or two tokenizers that differ.
    """
    tokenizer = HFTokenizer.load(folder)
    policy = HFPolicy.load_folder(folder).to(device)
    models = Models(tokenizer=tokenizer, policy=policy, device=torch.device(device))
    if reference:
        models.reference = copy.deepcopy(policy).requires_grad_(False).eval()
    if value_head:
        policy.add_value_head()
    judges = [reward_model] if isinstance(reward_model, Path | str) else list(reward_model or ())
    members: list[Critic] = [_reward_model(judge, folder, tokenizer).to(device) for judge in judges]
    models.reward_model = members[0] if len(members) == 1 else members or None
    if critic:
        models.critic = HFScalar.on_trunk(judges[0] if judges else folder, pad_id=tokenizer.pad_id).to(device)
    return models


def _reward_model(judge: Path | str, folder: Path | str, tokenizer: HFTokenizer) -> HFScalar:
    model = HFScalar.load_folder(judge)
    if not tokenizer.same_tokens(HFTokenizer.load(judge)):
        raise ValueError(
            f"the reward model in {judge} and the policy in {folder} have different tokenizers: it could "
            "not read what the policy writes"
        )
    return model.requires_grad_(False).eval()


@dataclass(eq=False)
class HuggingFace:
    """A small Llama trained from nothing, or any causal language model in a Hugging Face folder.

    Weights are fp32 and dropout is off in every stage.
    """

    vocabulary: int = 4096
    """tokens in the vocabulary of a fresh tokenizer"""
    hidden: int = 256
    """size of a fresh model's hidden states"""
    layers: int = 4
    """layers of a fresh model"""
    heads: int = 4
    """attention heads of a fresh model; they divide `hidden` into even parts"""
    intermediate: int = 704
    """size of a fresh model's feed-forward layers"""
    context: int = 256
    """the most tokens, prompt and response together, that a fresh model takes"""
    tokenizer_documents: int = 5000
    """a fresh tokenizer is trained on at most so many of the training documents"""
    policy: str = ""
    """a Hugging Face folder (model and tokenizer) to start from instead of a fresh model; empty: a fresh one"""
    reward_models: list[str] = field(default_factory=list)
    """folders of finished reward models (runs/a/reward/result, ...) in place of a reward stage; several: an ensemble"""
    shared_critic: bool = False
    """values from a head on the policy's trunk: half the work and memory, but their loss then moves the policy too"""
    device: str = ""
    """where the models live, "cpu" or "cuda" say; empty: the first GPU, if there is one"""

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise ValueError(
                f"hidden = {self.hidden} must be an even multiple of heads = {self.heads}, so that each head "
                "gets an even number of dimensions to rotate"
            )
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @hookimpl
    def rlhf_models(self, run: Run, stage: str, needs: set[str]) -> Models:
        device = torch.device(self.device)
        start = run.result("pretrain") or self.policy
        if stage == "pretrain":
            fresh = not self.policy
            tokenizer = self._fresh_tokenizer(run) if fresh else HFTokenizer.load(self.policy)
            policy = self._fresh_policy(tokenizer, run.seed) if fresh else HFPolicy.load_folder(self.policy)
            return Models(tokenizer=tokenizer, policy=policy.to(device), device=device)
        if not start:
            raise ValueError(
                f"the stage {stage!r} needs a language model to start from: put 'pretrain' before it in [run] "
                "stages, or name a Hugging Face folder as `policy` in [hf]"
            )
        if stage == "reward":
            if self.reward_models:
                raise ValueError(
                    "[hf] reward_models names finished reward models, and this run's reward stage would train another, "
                    'which nothing would use: leave "reward" out of [run] stages, or `reward_models` out of [hf]'
                )
            tokenizer = HFTokenizer.load(start)
            reward_model = HFScalar.on_trunk(start, pad_id=tokenizer.pad_id)
            reward_model.initialise_reward_head(run.seed)
            return Models(tokenizer=tokenizer, reward_model=reward_model.to(device), device=device)
        return load_models(
            start,
            reference="ref_logp" in needs,
            critic="values" in needs and not self.shared_critic,
            value_head="values" in needs and self.shared_critic,
            reward_model=self.reward_models or run.result("reward"),
            device=device,
        )

    def _fresh_tokenizer(self, run: Run) -> HFTokenizer:
        documents = (d.text for d in run.hook.rlhf_documents(run=run) if d.split == "train")
        return HFTokenizer.train(list(islice(documents, self.tokenizer_documents)), self.vocabulary, run.say)

    def _fresh_policy(self, tokenizer: HFTokenizer, seed: int) -> HFPolicy:
        return HFPolicy.fresh(
            vocabulary=len(tokenizer),
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            intermediate=self.intermediate,
            context=self.context,
            pad_id=tokenizer.pad_id,
            end_id=tokenizer.end_id,
            seed=seed,
        )
