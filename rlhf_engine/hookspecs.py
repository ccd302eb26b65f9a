"""The contract: every hook that a plugin can answer. This file is the manual.

A plugin is any object with methods marked `@hookimpl` and named like a function below; such a method takes
only those of the arguments that it uses, by name. A plugin that has options is a dataclass, and its fields
are the options. `rlhf plugins FILE` shows who answers what in a run.

There are three kinds of hooks.

* **One answer** (`firstresult`): exactly one plugin answers. Two plugins that both answer are refused when the
  run is loaded, and both are named. The engine's own answers are marked `trylast` and give way.
* **All answers** (additive): every active plugin may answer, and all answers count.
* Around a hook of either kind a plugin can put a **wrapper**: `@hookimpl(wrapper=True)`, a generator that
  yields once to get the inner answer and returns its own (`kl_penalty` stands around `rlhf_token_rewards` so).

An exception that a plugin raises stops the run with the plugin's name, the hook's name and the exception. Only a
reward may be allowed to fail: `rlhf_engine.RewardOptions` say how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
from torch import Tensor
from torch.optim import Optimizer

from rlhf_engine.batch import (
    Batch,
    Document,
    Loss,
    Output,
    Preference,
    Prompt,
    Reward,
    Rewarded,
    Rollout,
    Scored,
)
from rlhf_engine.models import Models
from rlhf_kernels import Advantages

if TYPE_CHECKING:
    from rlhf_engine.run import Run

__all__ = ["Stage", "hookimpl"]

hookimpl = pluggy.HookimplMarker("rlhf_engine")
_hookspec = pluggy.HookspecMarker("rlhf_engine")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A named part of a run: `work(run)` does it and returns the folder that holds its result.

    `requires` names the one-answer hooks that it will call: a run in which nobody answers one is refused
    before any work starts.
    """

    work: Callable[[Run], Path]
    requires: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------- stages and data


@_hookspec
def rlhf_stages() -> dict[str, Stage]:
    """All answers. The stages that this plugin brings, by the name that `[run] stages = [...]` calls them by.

    Two plugins that bring one name are refused when the run is loaded.
    """
    raise NotImplementedError


@_hookspec(firstresult=True)
def rlhf_documents(run: Run) -> Iterable[Document]:
    """One answer. The texts to pretrain on, every one with its split, in a shuffled and repeatable order.

    The stage reads as many as it needs, so a generator is welcome.
    """
    raise NotImplementedError


@_hookspec(firstresult=True)
def rlhf_preferences(run: Run, split: str, epoch: int) -> Iterable[Preference]:
    """One answer. The preferences of one split, in the order in which to learn them, the same order for the
    same `epoch` and run seed.

    Neighbours that share a text are scored together: the reward stage runs each distinct text of a step
    through the model once. A plugin that builds many pairs from few texts yields them block by block.
    """
    raise NotImplementedError


@_hookspec(firstresult=True)
def rlhf_prompts(run: Run) -> Iterable[Prompt]:
    """One answer. The prompts of the rl stage: split `train` to learn on, `heldout` to report on."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------- models


@_hookspec(firstresult=True)
def rlhf_models(run: Run, stage: str, needs: set[str]) -> Models:
    """One answer. The models of a stage, with their starting weights.

    `stage` is `pretrain` (tokenizer, fresh policy), `reward` (tokenizer, reward model on the pretrained trunk)
    or `rl` (tokenizer, policy; reference if "ref_logp" is among `needs`; critic, or a policy that has values of
    its own, if "values" is; the reward model if the run has one). `run.result("pretrain")` is the folder that an
    earlier stage left, or None.
    """
    raise NotImplementedError


@_hookspec(firstresult=True)
def rlhf_optimizer(parameters: Iterable[Any], learning_rate: float, stage: str) -> Optimizer:
    """One answer; default AdamW without weight decay, eps 1e-5 in the stage `rl` and 1e-8 elsewhere. The stage
    drives the learning rate linearly to 0."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------- pretrain and reward


@_hookspec(firstresult=True)
def rlhf_lm_loss(output: Output, mask: Tensor) -> Loss:
    """One answer; default: the mean of -output.logp over the counted tokens (nats per token)."""
    raise NotImplementedError


@_hookspec(firstresult=True)
def rlhf_preference_loss(chosen: Tensor, rejected: Tensor, strength: Tensor) -> Loss:
    """One answer. The loss of `[N]` pairs from the reward model's scores of the chosen and the rejected text."""
    raise NotImplementedError


# ----------------------------------------------------------------------------------------------------------- rl


@_hookspec(firstresult=True)
def rlhf_generate(models: Models, prompts: list[Prompt], temperature: float, response_length: int) -> Rollout:
    """One answer; default: sample from `models.policy`, one response a prompt. Rows in the order of `prompts`.

    `group` is filled in by the engine.
    """
    raise NotImplementedError


@_hookspec
def rlhf_reward(rollout: Rollout, prompts: list[Prompt], texts: list[str], models: Models) -> Reward:
    """All answers. Judge the responses: row i is `texts[i]`, the response (without the prompt and the special
    tokens), to `prompts[i]`; `rollout` has the tokens.

    NaN abstains: such a row is left out of this step's baselines and gets no gradient. A weight of 0 makes the
    reward a metric only. A plain function will do (`rlhf_engine.reward`). If the options of this reward say so, it is
    asked in parts, again, on a thread or in another process; wrappers stand around the answers of all rewards.
    """
    raise NotImplementedError


@_hookspec
def rlhf_needs() -> set[str]:
    """All answers, united. What the engine must compute for this plugin: any of "ref_logp" (the reference's
    log-probs), "values" (a critic's), "old_logp" (the policy's log-probs again in the training forward, so that
    the first ratio is exactly 1; otherwise the sampler's are taken), "entropy" (with gradient, in the loss),
    "groups" (at least two responses to every prompt)."""
    raise NotImplementedError


@_hookspec(firstresult=True)
def rlhf_token_rewards(scored: Scored) -> Tensor:
    """One answer; default: the score at the last counted token, 0 elsewhere. `[B, T]` fp32."""
    raise NotImplementedError


@_hookspec(firstresult=True)
def rlhf_advantages(rewarded: Rewarded) -> Advantages:
    """One answer, from the algorithm: advantages and returns, both `[B, T]`.

    Returns are the critic's targets; without a critic, the return that each token is credited with.
    """
    raise NotImplementedError


@_hookspec(firstresult=True)
def rlhf_loss(output: Output, batch: Batch) -> Loss:
    """One answer, from the algorithm: the scalar to minimise on one minibatch, and what to log of it.

    Normalise by `batch.total_tokens` or `batch.total_sequences`, never by what happens to stand in `batch`. Of
    the metrics, those named `...loss` are normalised like the loss (the pieces of a step add up), those named
    `..._max` are maxima, and all others are means over `batch`.
    """
    raise NotImplementedError


# ------------------------------------------------------------------------------------------- the course of a run


@_hookspec(historic=True)
def rlhf_run_started(run: Run) -> None:
    """All answers, once, before any stage: a place to open files, check the environment, keep the run."""


@_hookspec
def rlhf_step_end(run: Run, stage: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
    """All answers. Step `step` of `steps` of a stage is done; `metrics` maps names to plain numbers (and
    "samples" to a few texts, now and then). A plugin may add to it: those marked `tryfirst` come before the
    trackers."""


@_hookspec
def rlhf_save(folder: Path) -> None:
    """All answers. Write this plugin's state (JSON or safetensors, never pickle) into the checkpoint, under a
    file name that begins with the plugin's name."""


@_hookspec
def rlhf_load(folder: Path) -> None:
    """All answers. Read back what `rlhf_save` wrote there, so that the run goes on as if never interrupted."""
