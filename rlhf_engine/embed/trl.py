"""TRL 1.16: its trainers on our kernels, our rewards as its reward functions, and its reward functions as ours.

    from rlhf_engine.embed.trl import as_trl, from_trl, switch_on

    trainer = GRPOTrainer(model=..., reward_funcs=[as_trl(Brevity())], args=..., train_dataset=...)
    switch_on(trainer)                    # this trainer, and nothing else; `.off()` takes it back
    trainer.train()

`with switch_on(trainer): ...` takes it back at the end. What is on stands in `rlhf_kernels.backend.report()`.

Which trainer gets what:

* GRPOTrainer: the log-probs and the entropy come from `linear_logprobs` (prompt and padding cost nothing, no logits are
  held beyond 256 MiB on a CPU), the loss from `policy_loss`. Loss, gradients and every metric that TRL logs agree to
  rounding. An option that ours does not cover is refused here by its name; nothing falls back.
* RewardTrainer: its loss comes from a plugin's `rlhf_preference_loss`, `switch_on(trainer, BradleyTerry(soft=False))`
  being its own loss. No kernel of ours serves there, since a score is one number a text: it gets neither faster nor
  smaller. What it gains are other losses, and preferences of known strength (a column "strength" of the data set).

This module imports TRL only inside `switch_on`, to which you bring a trainer of TRL's anyway.
"""

from __future__ import annotations

import functools
import types
from importlib.metadata import version
from typing import Any, Self

import torch
from torch import Tensor

from rlhf_engine.embed.trl_rewards import as_trl, from_trl
from rlhf_engine.engine import ask_loss
from rlhf_engine.manager import manager, require
from rlhf_kernels import CISPO, GSPO, SAPO, backend, kl_estimate, linear_logprobs, masked_mean, policy_loss

__all__ = ["CannotSwitch", "Switched", "as_trl", "from_trl", "switch_on"]

RELEASE = "1.16"
PPO_LIKE = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSSES = (*PPO_LIKE, "cispo", "sapo")
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class CannotSwitch(ValueError):
    """The trainer cannot be switched on as it is configured; the message names the option and what to do."""


class Switched:
    """What `switch_on` did to one trainer; `off()` takes it back. As a context it does so at the end."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.is_on = True
        self._undo = [backend.embedded_in(what)]

    def off(self) -> None:
        """Give the trainer back what it had. A second call does nothing.

        A model whose `forward` was wrapped since by accelerate (mixed precision, once training has begun) keeps the
        wrapper: what is inside then passes everything on to TRL's own.
        """
        self.is_on = False
        while self._undo:
            self._undo.pop()()

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of this one object, to be given back by `off()` if it still stands there."""
        missing = object()
        before = vars(owner).get(name, missing)
        object.__setattr__(owner, name, value)

        def give_back() -> None:
            if vars(owner).get(name) is not value:
                return
            if before is missing:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, before)

        self._undo.append(give_back)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.off()


def switch_on(trainer: Any, preference_loss: Any = None) -> Switched:
    """Let this one trainer of TRL compute with ours, from now until `.off()` of what is returned.

    Args:
        trainer: a `trl.GRPOTrainer` or `trl.RewardTrainer`, before or after `train()`. Other trainers, and later ones
            of the same class, are not touched.
        preference_loss: for a RewardTrainer, and only there: a plugin that answers `rlhf_preference_loss`, such as
            `BradleyTerry(soft=False)`, which is TRL's own loss.

    Raises:
        CannotSwitch: another release of TRL, or an option that ours does not cover.
        TypeError: neither of the two trainers, or a preference loss where none is wanted or none where one is.
    """
    if not version("trl").startswith(f"{RELEASE}."):
        raise CannotSwitch(
            f"switch_on() knows the insides of TRL {RELEASE}, and {version('trl')} is installed: "
            f'pip install "trl=={RELEASE}.*", or train without it'
        )
    from trl import GRPOTrainer, RewardTrainer

    if isinstance(trainer, GRPOTrainer):
        if preference_loss is not None:
            raise TypeError("switch_on(GRPOTrainer) takes no preference loss: that is for a RewardTrainer")
        _refuse_own_methods(trainer, GRPOTrainer, "compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")
        return _switch_grpo(trainer)
    if isinstance(trainer, RewardTrainer):
        if preference_loss is None:
            raise TypeError(
                "switch_on(RewardTrainer) needs a preference loss, such as "
                "switch_on(trainer, BradleyTerry(soft=False)), which is TRL's own"
            )
        _refuse_own_methods(trainer, RewardTrainer, "compute_loss")
        return _switch_reward(trainer, preference_loss)
    raise TypeError(f"switch_on() takes a GRPOTrainer or a RewardTrainer of TRL, got {type(trainer).__name__}")


def _refuse_own_methods(trainer: Any, base: type, *names: str) -> None:
    """A method of a subclass, or one set on the trainer, would be lost or would stand in the way."""
    for name in names:
        if name in vars(trainer):
            raise CannotSwitch(
                f"this {type(trainer).__name__} has a {name} of its own already. If it is switched on, take that back "
                "first: .off()"
            )
        if getattr(type(trainer), name) is not getattr(base, name):
            raise CannotSwitch(
                f"{type(trainer).__name__} changes {base.__name__}.{name}, which switch_on() would pass over. Use "
                "rlhf_kernels there yourself, or switch on a plain trainer"
            )


# ------------------------------------------------------------------------------------------------------------- GRPO


def _switch_grpo(trainer: Any) -> Switched:
    policy = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    _refuse_options(trainer, policy)
    surrogate, clips = _surrogate(trainer)
    switched = Switched(f"GRPOTrainer: log-probs (linear_logprobs) and loss (policy_loss, {trainer.loss_type})")
    for model, entropy in ((policy, True), (trainer.ref_model, False)):
        if model is not None:
            _use_linear_logprobs(switched, model, trainer, entropy=entropy)
    compute = functools.partial(_grpo_loss, trainer, surrogate, clips)
    switched.put(trainer, "_compute_loss", compute)
    return switched


def _refuse_options(trainer: Any, policy: Any) -> None:
    """Raise CannotSwitch for what would be computed otherwise than TRL does."""
    args, sequence = trainer.args, trainer.importance_sampling_level == "sequence"
    text = policy.config.get_text_config()
    scales = [name for name in LOGIT_SCALES if getattr(text, name, None) not in (None, 1)]
    prompts = [c for c in getattr(trainer.model, "peft_config", {}).values() if c.is_prompt_learning]
    kind = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    high = 1 + trainer.epsilon_high
    found = [
        (trainer.loss_type not in LOSSES, f'loss_type="{trainer.loss_type}"', f"one of {', '.join(LOSSES)}"),
        (
            trainer.importance_sampling_level != "token" and not (sequence and trainer.loss_type in PPO_LIKE),
            f'importance_sampling_level="{trainer.importance_sampling_level}" with loss_type="{trainer.loss_type}"',
            '"token", or "sequence" with one of ' + ", ".join(PPO_LIKE),
        ),
        (
            args.delta is not None and (sequence or trainer.loss_type not in PPO_LIKE or args.delta <= max(high, 1)),
            f"delta={args.delta}",
            f'None, or above 1 + epsilon_high = {high:g} with importance_sampling_level="token"',
        ),
        (
            trainer.loss_type == "cispo" and trainer.epsilon_high < 1,
            f'epsilon_high={trainer.epsilon_high} with loss_type="cispo"',
            "at least 1: it bounds the ratio itself (TRL's paper index has 5.0)",
        ),
        (trainer._entropy_bonus_enabled, "entropy_coef or use_adaptive_entropy", "0 and False"),
        (trainer.aux_loss_enabled, "a router loss (output_router_logits)", "False in the model's config"),
        (trainer._is_vlm, "a model of images", "a language model"),
        (args.use_liger_kernel, "use_liger_kernel=True", "False"),
        (args.torch_compile, "torch_compile=True", "False"),
        (bool(scales), f"a model with {' and '.join(scales)}", "a model whose head's product is the logits"),
        (bool(prompts), "PEFT by prompt learning", "LoRA"),
        (kind not in ("NO", "MULTI_CPU", "MULTI_GPU"), f"accelerate with {kind}", "one process, or data parallelism"),
    ]  # fmt: skip
    for wrong, option, allowed in found:
        if wrong:
            raise CannotSwitch(f"switch_on(GRPOTrainer): {option} is not covered; allowed: {allowed}")


def _surrogate(trainer: Any) -> tuple[CISPO | GSPO | SAPO | None, dict[str, float | None]]:
    """What TRL's loss type is in ours: a surrogate, or PPO's clips."""
    low, high, args = trainer.epsilon_low, trainer.epsilon_high, trainer.args
    if trainer.loss_type == "cispo":
        return CISPO(clip_high=high - 1), {}
    if trainer.loss_type == "sapo":
        return SAPO(positive=args.sapo_temperature_pos, negative=args.sapo_temperature_neg), {}
    if trainer.importance_sampling_level == "sequence":
        return GSPO(clip_low=low, clip_high=high), {}
    return None, {"clip_low": low, "clip_high": high, "dual_clip": args.delta}


def _use_linear_logprobs(switched: Switched, model: Any, trainer: Any, *, entropy: bool) -> None:
    """Put `linear_logprobs` in the place of TRL's own fused head, in this one model."""
    from trl.trainer.utils import FusedCausalLMOutput

    theirs = model.forward
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not (fused_lm_head and switched.is_on) or labels is None:
            return theirs(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        tokens = labels[:, 1:]
        head = self.get_output_embeddings()
        hidden, weight, bias = hidden.to(head.weight.device), head.weight, head.bias
        kind = hidden.device.type
        if trainer.args.cast_lm_head_to_fp32:
            hidden = hidden.float()
        elif torch.is_autocast_enabled(kind):  # multiplied as TRL does; ours adds up in float32
            hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
        with torch.autocast(kind, enabled=False):
            found = linear_logprobs(
                hidden,
                weight,
                tokens,
                bias=bias,
                temperature=trainer.temperature,
                softcap=softcap,
                mask=tokens != -100,
                entropy=entropy,
            )
        return FusedCausalLMOutput(log_probs=found.logp, entropy=found.entropy, label_mask=tokens != -100)

    switched.put(model, "forward", types.MethodType(forward, model))


def _grpo_loss(
    trainer: Any, surrogate: CISPO | GSPO | SAPO | None, clips: dict[str, Any], model: Any, inputs: dict[str, Any]
) -> Tensor:
    """`GRPOTrainer._compute_loss`: the same loss of the same inputs, and the same metrics."""
    tokens, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
    logp, entropies, _ = trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([inputs["prompt_ids"], tokens], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        tokens.shape[1],
        compute_entropy=True,
    )
    if "tool_mask" in inputs:
        mask = mask & inputs["tool_mask"].bool()
    old_logp = inputs.get("old_per_token_logps")
    old_logp = logp.detach() if old_logp is None else old_logp
    advantages = inputs["advantages"]
    reduce, normalizer = _reduction(trainer, mask, inputs)
    loss = policy_loss(
        logp,
        old_logp,
        advantages,
        mask,
        **clips,
        surrogate=surrogate,
        weights=_weights(trainer, logp, old_logp, entropies, mask, inputs),
        reduce=reduce,
        normalizer=normalizer,
    ).loss
    ratio, kl = _ratio(trainer, logp, old_logp, mask), None
    if trainer.beta != 0.0:
        kl = kl_estimate(logp, inputs["ref_per_token_logps"], kind="k3")
        if trainer.args.use_bias_correction_kl:
            kl = kl * ratio
        share = kl / mask.sum(1, keepdim=True).clamp(min=1) if reduce == "sequences" else kl
        loss = loss + trainer.beta * masked_mean(share, mask, normalizer=normalizer)
    with torch.no_grad():
        _log(trainer, ratio.detach(), advantages, entropies, mask, kl)
    return loss


def _ratio(trainer: Any, logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Each token's ratio `[B, T]`, or each sequence's `[B, 1]`."""
    difference = logp - old_logp
    if trainer.importance_sampling_level == "sequence":
        difference = ((difference * mask).sum(1) / mask.sum(1).clamp(min=1.0))[:, None]
    return difference.exp()


def _reduction(trainer: Any, mask: Tensor, inputs: dict[str, Any]) -> tuple[Any, float | Tensor]:
    """What each loss type is divided by; a training loss also by the micro-batches of its step."""
    training = trainer.model.training
    pieces = trainer.current_gradient_accumulation_steps if training else 1
    match trainer.loss_type:
        case "grpo" | "sapo":
            return "sequences", len(mask) * pieces
        case "luspo":
            return "tokens", len(mask) * pieces
        case "dr_grpo":
            return "tokens", len(mask) * trainer.max_completion_length * pieces
        case "bnpo":
            return "tokens", mask.sum().clamp(min=1) * pieces
    # dapo and cispo: the tokens of all processes and of the whole generation batch, a share of which is one step's.
    items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return "tokens", items * pieces / trainer.args.steps_per_generation if training else items


def _weights(
    trainer: Any, logp: Tensor, old_logp: Tensor, entropies: Tensor, mask: Tensor, inputs: dict[str, Any]
) -> Tensor | None:
    """What the surrogate is multiplied by: vLLM's correction, and what is left out by entropy or by its KL."""
    factors = []
    if trainer.top_entropy_quantile < 1.0:
        factors.append(trainer.get_high_entropy_mask(entropies, mask, 1 - trainer.top_entropy_quantile))
    if trainer.off_policy_mask_threshold is not None:
        advantages = inputs["advantages"]
        factors.append(
            trainer.get_off_policy_mask(
                advantages=advantages[:, None] if advantages.dim() == 1 else advantages,
                per_token_logps=logp,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_logp),
                mask=mask.to(logp.dtype),
                off_policy_threshold=trainer.off_policy_mask_threshold,
            )
        )
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        factors.append(inputs["importance_sampling_ratio"])
    weights = None
    for factor in factors:
        weights = factor * torch.ones_like(logp) if weights is None else weights * factor
    return None if weights is None else weights.detach()


def _log(trainer: Any, ratio: Tensor, advantages: Tensor, entropies: Tensor, mask: Tensor, kl: Tensor | None) -> None:
    """TRL's metrics by TRL's names, with one transfer from the device for all means."""
    from trl.trainer.utils import nanmax, nanmin

    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    counted = mask if ratio.shape == mask.shape else torch.ones_like(ratio, dtype=torch.bool)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    means = {"entropy": (entropies, mask)}
    if kl is not None:
        means["kl"] = (kl, mask)
    if trainer.loss_type == "cispo":
        means["cispo_clip_ratio"] = ((ratio > trainer.epsilon_high) & (advantages > 0), counted)
    if trainer.loss_type in PPO_LIKE:
        low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0)
        for name, clipped in (("low", low), ("high", high), ("region", low | high)):
            means[f"clip_ratio/{name}_mean"] = (clipped, counted)
        lengths = counted.sum(1)
        lowest, highest = (trainer.accelerator.gather((x & counted).sum(1) / lengths) for x in (low, high))
        logged["clip_ratio/low_min"].append(nanmin(lowest).item())
        logged["clip_ratio/high_max"].append(nanmax(highest).item())
    sums = torch.stack([torch.stack([(x * m).sum().float(), m.sum().float()]) for x, m in means.values()])
    sums = trainer.accelerator.reduce(sums, reduction="sum")
    for name, mean in zip(means, (sums[:, 0] / sums[:, 1].clamp(min=1.0)).tolist(), strict=True):
        logged[name].append(mean)


# ----------------------------------------------------------------------------------------------------------- reward


def _switch_reward(trainer: Any, plugin: Any) -> Switched:
    made = manager([plugin])
    require(made, ("rlhf_preference_loss",), by="switch_on(RewardTrainer)")
    if trainer.args.center_rewards_coefficient is not None:
        raise CannotSwitch(
            "switch_on(RewardTrainer): center_rewards_coefficient is not covered; give it to the preference loss "
            f"instead, such as BradleyTerry(center={trainer.args.center_rewards_coefficient})"
        )
    switched = Switched(f"RewardTrainer: loss ({type(plugin).__name__}); no kernel serves there")
    theirs, collate = trainer.compute_loss, trainer.data_collator

    def compute_loss(model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        if "margin" in inputs:
            raise CannotSwitch('switch_on(RewardTrainer): the column "margin" is not covered; take it out of the data')
        strength = inputs.pop("strength", None)
        _, outputs = theirs(model, inputs, return_outputs=True, **kwargs)  # the forward pass, and TRL's metrics
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        strength = torch.ones_like(chosen) if strength is None else strength.to(chosen)
        loss = ask_loss(made.hook.rlhf_preference_loss, chosen=chosen, rejected=rejected, strength=strength).value
        return (loss, outputs) if return_outputs else loss

    def with_strength(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        if "strength" in examples[0]:
            batch["strength"] = torch.tensor([example["strength"] for example in examples])
        return batch

    trainer._set_signature_columns_if_needed()
    switched.put(trainer, "_signature_columns", [*trainer._signature_columns, "strength"])
    switched.put(trainer, "data_collator", with_strength)
    switched.put(trainer, "compute_loss", compute_loss)
    return switched
