"""What one step of a run file's `rl` stage asks for, whatever the model and the machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from rlhf_engine.config import ConfigError, RunFile, table_name
from rlhf_engine.manager import load, make
from rlhf_engine.plan.architecture import Architecture, find_architecture

__all__ = ["Job", "job_of", "model_of", "not_counted"]

MODELS = "hf"  # the plugin whose table says what the model is; transformers takes seconds to import
PROMPT_TOKENS = 512
NOT_COUNTED = ("dtype", "gradient_checkpointing", "lora_rank", "reward_models")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step: prompts, responses, and which models are asked. Every prompt and response is taken at full length."""

    prompts: int
    samples: int = 1
    """responses to a prompt"""
    prompt_tokens: int
    response_tokens: int
    epochs: int = 1
    minibatch: int
    """responses in an optimizer step"""
    piece: int
    """responses that go through a model at once, on one device"""
    old_logp: bool = False
    """a forward of the policy before the first update"""
    reference: bool = False
    values: bool = False
    own_critic: bool = False
    """the values come from a network of their own"""
    reward_model: bool = False
    entropy: bool = False

    @property
    def responses(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> int:
        """Of a prompt and its response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def updates(self) -> int:
        """Optimizer steps."""
        return self.epochs * ceil(self.responses / self.minibatch)

    def resized(self, *, batch: int = 0, tokens: int = 0, prompt_tokens: int = 0) -> Job:
        """The same with another number of responses, or other lengths; 0: as it was."""
        if batch % self.samples:
            raise ConfigError(f"--batch {batch}: responses, {self.samples} to a prompt; give a multiple of that")
        responses = batch or self.responses
        response_tokens = tokens or self.response_tokens
        if not prompt_tokens:
            prompt_tokens = min(PROMPT_TOKENS, response_tokens) if tokens else self.prompt_tokens
        return replace(
            self, prompts=responses // self.samples, response_tokens=response_tokens, prompt_tokens=prompt_tokens,
            minibatch=min(self.minibatch, responses), piece=min(self.piece, responses),
        )  # fmt: skip


def job_of(file: RunFile) -> Job:
    """What the `[rl]` table and the plugins' needs say. Raises ConfigError where there is no `rl` stage."""
    if "rl" not in file.options.stages:
        raise ConfigError(f"{file.path}: its stages are {', '.join(file.options.stages)}; a plan is of the stage rl")
    rl = _built(file, "rl")
    needs: set[str] = set()
    for name in file.options.plugins:
        if name != MODELS and hasattr(load(name), "rlhf_needs"):
            needs |= _built(file, name).rlhf_needs()
    responses = rl.prompts_per_step * rl.samples_per_prompt
    minibatch = min(rl.minibatch_size, responses)
    values = "values" in needs
    return Job(
        prompts=rl.prompts_per_step, samples=rl.samples_per_prompt, epochs=rl.epochs, minibatch=minibatch,
        prompt_tokens=min(PROMPT_TOKENS, rl.response_length), response_tokens=rl.response_length,
        piece=min(rl.rows_per_forward or minibatch, responses), old_logp="old_logp" in needs, values=values,
        reference="ref_logp" in needs, own_critic=values and not file.tables.get(MODELS, {}).get("shared_critic"),
        reward_model="reward_model" in file.options.plugins, entropy="entropy" in needs,
    )  # fmt: skip


def model_of(file: RunFile) -> Architecture:
    """The model that a run file itself names: a folder's `config.json`, or the fresh Llama of `[hf]`."""
    if MODELS not in file.options.plugins:
        raise ConfigError(f"{file.path}: its models come from no plugin that a plan can read; say --model")
    hf = _built(file, MODELS)
    if hf.policy:
        return find_architecture(hf.policy)
    return Architecture(
        name="a fresh Llama", source=f"[hf] of {Path(file.path).name}", vocabulary=hf.vocabulary, hidden=hf.hidden,
        intermediate=hf.intermediate, layers=hf.layers, heads=hf.heads, kv_heads=hf.heads,
        head_size=hf.hidden // hf.heads, tied=True,
    )  # fmt: skip


def not_counted(file: RunFile) -> list[str]:
    """What `[hf]` says of the model that a plan does not read."""
    table = file.tables.get(MODELS, {})
    return [f"{MODELS}.{key} = {table[key]!r}" for key in NOT_COUNTED if table.get(key)]


def _built(file: RunFile, name: str) -> Any:
    table = table_name(name)
    return make(load(name), file.tables.get(table, {}), where=f"{file.path}: [{table}]")
