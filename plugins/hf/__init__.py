"""Models and tokenizers through transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat

from rlhf_engine.hookspecs import hookimpl
from rlhf_engine.models import Critic, Models

from .chat import ChatTokenizer
from .folders import require_folder
from .policy import HFPolicy, read_causal
from .recompute import recompute_layers
from .scalar import HFScalar
from .tokenizer import HFTokenizer

if TYPE_CHECKING:
    from rlhf_engine.run import Run

__all__ = ["ChatTokenizer", "HFPolicy", "HFScalar", "HFTokenizer", "HuggingFace", "load_models"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_models(
    folder: Path | str,
    *,
    reference: bool = False,
    critic: bool = False,
    value_head: bool = False,
    reward_model: Path | str | Sequence[Path | str] | None = None,
    lora_rank: int = 0,
    lora_alpha: float = 16.0,
    lora_targets: str = "default",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    chat_template: bool = False,
    device: str | torch.device = "cpu",
) -> Models:
    """The models of reinforcement learning, from the Hugging Face folder of a causal language model.

    Args:
        folder: the policy and its tokenizer.
        reference: also the policy as it starts, frozen: a copy of it, or with an adapter the policy's own weights
            without that.
        critic: also a value model, on the reward model's trunk if there is one, else on the policy's; its head
            is 0, so its first values are.
        value_head: also a value head, at 0, on the policy's own trunk; it serves where there is no critic.
        reward_model: the folder of a sequence classifier with the same tokenizer, which is frozen; several: an
            ensemble, and a critic then takes the first one's trunk.
        lora_rank: train an adapter of this rank on the policy instead of its weights; 0: train these.
        lora_alpha: the adapter's change is scaled by this over its rank.
        lora_targets: which layers have one: "default", those that peft knows for the architecture, or "all-linear".
        seed: of the adapter's first random numbers.
        dtype: of all weights but the adapter's and the value head's, which are fp32.
        gradient_checkpointing: the models that train keep only the inputs of their layers for the backward pass.
        chat_template: prompts are read as a user's messages, in the tokenizer's own template.
        device: where the models live.

    Raises:
        FileNotFoundError: one of the folders is none.
        ValueError: a folder that does not fit its purpose, two tokenizers that differ, or an adapter without peft.
    """
    tokenizer = tokenizer_kind(chat_template).load(folder)
    models = Models(tokenizer=tokenizer, device=torch.device(device))
    policy: HFPolicy
    if lora_rank:
        require_peft(lora_rank)
        from .lora import LoraPolicy, LoraReference  # peft, which only an adapter needs

        model = read_causal(folder, dtype)
        policy = LoraPolicy(model, rank=lora_rank, alpha=lora_alpha, targets=lora_targets, seed=seed)
        models.reference = LoraReference(policy) if reference else None
    else:
        policy = HFPolicy.load_folder(folder, dtype=dtype)
    models.policy = policy.to(device)
    if reference and models.reference is None:
        models.reference = copy.deepcopy(policy).requires_grad_(False).eval()
    if value_head:
        policy.add_value_head()
    judges = [reward_model] if isinstance(reward_model, Path | str) else list(reward_model or ())
    members: list[Critic] = [_reward_model(judge, folder, tokenizer, dtype).to(device) for judge in judges]
    models.reward_model = members[0] if len(members) == 1 else members or None
    if critic:
        trunk = HFScalar.on_trunk(judges[0] if judges else folder, pad_id=tokenizer.pad_id, dtype=dtype)
        models.critic = trunk.to(device)
    if gradient_checkpointing:
        recompute_layers(policy.model)
        if critic:
            recompute_layers(trunk.model)
    return models


def _reward_model(judge: Path | str, folder: Path | str, tokenizer: HFTokenizer, dtype: torch.dtype) -> HFScalar:
    model = HFScalar.load_folder(judge, dtype=dtype)
    if not tokenizer.same_tokens(HFTokenizer.load(judge)):
        raise ValueError(
            f"the reward model in {judge} and the policy in {folder} have different tokenizers: it could "
            "not read what the policy writes"
        )
    return model.requires_grad_(False).eval()


def tokenizer_kind(chat_template: bool) -> type[HFTokenizer]:
    """Which class reads a folder's tokenizer."""
    return ChatTokenizer if chat_template else HFTokenizer


def require_peft(lora_rank: int) -> None:
    """Raise ValueError with the remedy where peft is not installed."""
    if find_spec("peft") is None:
        raise ValueError(f"lora_rank = {lora_rank} needs peft, which is not installed: pip install 'rlhf-engine[lora]'")


@dataclass(eq=False)
class HuggingFace:
    """A small Llama trained from nothing, or any causal language model in a Hugging Face folder.

    Dropout is off in every stage; log-probs, values and scores are fp32 whatever the weights are.
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
    lora_rank: NonNegativeInt = 0
    """in the rl stage train a low-rank adapter (LoRA, through peft) of this rank instead of the policy's weights, which
    then serve as the reference too; 0: train all weights"""
    lora_alpha: PositiveFloat = 16.0
    """the adapter's change is scaled by lora_alpha / lora_rank"""
    lora_targets: Literal["default", "all-linear"] = "default"
    """which layers have an adapter: those that peft knows for the architecture, or all linear ones but the output"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights in every stage. bfloat16 halves their memory, and AdamW's, whose moments take the weights' dtype;
    but there are no fp32 copies beside: an update that is smaller than about 1/256 of its weight is rounded away,
    which at RL's learning rates is most of them. With an adapter that does not matter, for the adapter stays fp32"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the rest again: less memory, a third more work"""
    chat_template: bool = False
    """read prompts, of preferences too, as a user's messages in the chat template of the `policy` folder's tokenizer; a
    response ends with that template's end of turn. Documents are read as they stand"""
    device: str = ""
    """where the models live, "cpu" or "cuda" say; empty: the first GPU, if there is one"""

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise ValueError(
                f"hidden = {self.hidden} must be an even multiple of heads = {self.heads}, so that each head "
                "gets an even number of dimensions to rotate"
            )
        if self.lora_rank:
            require_peft(self.lora_rank)
        if self.chat_template and not self.policy:
            raise ValueError(
                "chat_template = true needs a tokenizer that has a template, and a fresh one has none: name the folder "
                "of a model that was tuned for chats as `policy`"
            )
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        """Refuse now what would otherwise end the run stages later."""
        for folder in filter(None, (self.policy, *self.reward_models)):
            require_folder(folder)
        if self.chat_template:
            ChatTokenizer.load(self.policy)
        if self.reward_models and "reward" in run.stages:
            raise ValueError(
                "[hf] reward_models names finished reward models, and this run's reward stage would train another, "
                'which nothing would use: leave "reward" out of [run] stages, or `reward_models` out of [hf]'
            )

    @hookimpl
    def rlhf_models(self, run: Run, stage: str, needs: set[str]) -> Models:
        device, dtype, kind = torch.device(self.device), DTYPES[self.dtype], tokenizer_kind(self.chat_template)
        start = run.result("pretrain") or self.policy
        if stage == "pretrain":
            fresh = not self.policy
            tokenizer = self._fresh_tokenizer(run) if fresh else HFTokenizer.load(self.policy)
            policy = (
                self._fresh_policy(tokenizer, run.seed) if fresh else HFPolicy.load_folder(self.policy, dtype=dtype)
            )
            if self.gradient_checkpointing:
                recompute_layers(policy.model)
            return Models(tokenizer=tokenizer, policy=policy.to(device), device=device)
        if not start:
            raise ValueError(
                f"the stage {stage!r} needs a language model to start from: put 'pretrain' before it in [run] "
                "stages, or name a Hugging Face folder as `policy` in [hf]"
            )
        if stage == "reward":
            tokenizer = kind.load(start)
            reward_model = HFScalar.on_trunk(start, pad_id=tokenizer.pad_id, dtype=dtype)
            reward_model.initialise_reward_head(run.seed)
            if self.gradient_checkpointing:
                recompute_layers(reward_model.model)
            return Models(tokenizer=tokenizer, reward_model=reward_model.to(device), device=device)
        return load_models(
            start,
            reference="ref_logp" in needs,
            critic="values" in needs and not self.shared_critic,
            value_head="values" in needs and self.shared_critic,
            reward_model=self.reward_models or run.result("reward"),
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_targets=self.lora_targets,
            seed=run.seed,
            dtype=dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            chat_template=self.chat_template,
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
            dtype=DTYPES[self.dtype],
        )
