"""What the engine answers where no plugin does: an ordinary plugin, every answer of which gives way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from rlhf_engine.batch import Loss, Output, Prompt, Rollout, Scored
from rlhf_engine.heads import heads_of
from rlhf_engine.hookspecs import hookimpl
from rlhf_engine.models import Generates, Models, Policy
from rlhf_kernels import masked_mean

__all__ = ["Defaults"]


class Defaults:
    """The engine's own answers."""

    @hookimpl(trylast=True)
    def rlhf_lm_loss(self, output: Output, mask: Tensor) -> Loss:
        loss = -masked_mean(output.logp, mask)
        return Loss(value=loss, metrics={"loss": loss.detach()})

    @hookimpl(trylast=True)
    def rlhf_optimizer(self, parameters: Iterable[Any], learning_rate: float, stage: str) -> Optimizer:
        # In rl 1e-5 bounds the step where a gradient has been near zero for long (lm-human-preferences).
        eps = 1e-5 if stage == "rl" else 1e-8
        return AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), eps=eps, weight_decay=0.0, fused=True)

    @hookimpl(trylast=True)
    def rlhf_token_rewards(self, scored: Scored) -> Tensor:
        rewards = torch.zeros_like(scored.old_logp)
        return rewards.masked_scatter(last_counted(scored.mask), scored.scores[scored.mask.any(1)])

    @hookimpl(trylast=True)
    @torch.no_grad()
    def rlhf_generate(self, models: Models, prompts: list[Prompt], temperature: float, response_length: int) -> Rollout:
        policy, tokenizer = models.policy, models.tokenizer
        assert policy is not None, "rlhf_generate needs models.policy"
        prompt_tokens, prompt_mask = left_pad(
            tokenizer.encode([models.as_prompt(p.text) for p in prompts]), tokenizer.pad_id
        )
        prompt_tokens, prompt_mask = prompt_tokens.to(models.device), prompt_mask.to(models.device)
        sampler = policy.generate if isinstance(policy, Generates) else PlainSampler(policy).generate
        policy.train(False)
        tokens, logp = sampler(
            prompt_tokens,
            prompt_mask,
            length=response_length,
            temperature=temperature,
            end_id=tokenizer.end_id,
        )
        end = tokens == tokenizer.end_id
        mask = (end.cumsum(1) - end.long()) == 0  # everything up to the first end token, and that token too
        return Rollout(
            prompt_tokens=prompt_tokens,
            prompt_mask=prompt_mask,
            tokens=tokens.masked_fill(~mask, tokenizer.pad_id),
            mask=mask,
            group=torch.arange(len(prompts), device=models.device),
            logp=logp.masked_fill(~mask, 0.0),
            ended=(end & mask).any(1),
        )


def last_counted(mask: Tensor) -> Tensor:
    """`[B, T]` bool: True at each row's last counted token, nowhere in a row that has none."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def left_pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[B, P]`, every row's last token in the last column. An empty row is refused."""
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(
                f"prompt {number} of {len(rows)} has no tokens: there is nothing to continue. Leave empty prompts "
                "out of rlhf_prompts, or begin each with some text."
            )
    width = max(map(len, rows))
    tokens = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask


class PlainSampler:
    """Samples from any policy by running the whole sequence again for every token: right, and slow."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def generate(
        self, tokens: Tensor, mask: Tensor, *, length: int, temperature: float, end_id: int
    ) -> tuple[Tensor, Tensor]:
        start = tokens.shape[1]
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        logps = []
        for _ in range(length):
            logits = heads_of(self.policy, tokens, mask).next_logits() / temperature
            distribution = torch.log_softmax(logits, dim=-1)
            token = torch.multinomial(distribution.exp(), 1)
            logps.append(distribution.gather(1, token))
            tokens = torch.cat([tokens, token], dim=1)
            mask = torch.cat([mask, torch.ones_like(token, dtype=torch.bool)], dim=1)
            ended |= token[:, 0] == end_id
            if ended.all():
                break
        return tokens[:, start:], torch.cat(logps, dim=1)
