"""Stage 1: a language model on documents.   documents --tokenizer--> token blocks --lm loss--> policy folder"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from math import exp
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from rlhf_engine.batch import Document, Output, Split
from rlhf_engine.engine import ask_loss, combine, step_optimizer
from rlhf_engine.heads import heads_of
from rlhf_engine.hookspecs import Stage, hookimpl
from rlhf_engine.models import Models, Policy, Tokenizer
from rlhf_engine.run import Run
from rlhf_engine.stages.resumable import Resumable, linear_to_zero

__all__ = ["Pretrain"]


@dataclass(eq=False)
class Pretrain:
    """Pretrain a language model on the `train` documents, and report its perplexity on `heldout` ones."""

    steps: PositiveInt = 300
    """optimizer steps"""
    batch_size: PositiveInt = 32
    """blocks in a step"""
    block_length: Annotated[int, Field(ge=2)] = 128
    """tokens in a block; documents are joined by the end token and cut into blocks"""
    learning_rate: PositiveFloat = 1e-3
    """at its highest; it falls linearly to 0"""
    warmup: NonNegativeInt = 20
    """steps over which the learning rate rises to its highest"""
    max_grad_norm: PositiveFloat = 1.0
    """gradients are scaled down to this norm"""
    heldout_blocks: PositiveInt = 64
    """blocks of held-out text that perplexity is measured on"""
    checkpoint_every: PositiveInt = 100
    """steps between checkpoints"""

    @hookimpl
    def rlhf_stages(self) -> dict[str, Stage]:
        return {"pretrain": Stage(work=self.work, requires=("rlhf_documents", "rlhf_models", "rlhf_lm_loss"))}

    def work(self, run: Run) -> Path:
        models = run.hook.rlhf_models(run=run, stage="pretrain", needs=set())
        policy: Any = models.policy
        optimizer = run.hook.rlhf_optimizer(
            parameters=policy.parameters(), learning_rate=self.learning_rate, stage="pretrain"
        )
        state = Resumable(
            run,
            "pretrain",
            models={"policy": policy},
            optimizer=optimizer,
            position={"step": 0, "cursor": 0},
            every=self.checkpoint_every,
        )
        at = state.position
        run.say(f"pretrain: turning documents into {self.steps * self.batch_size} blocks of tokens")
        blocks = self._blocks(run, models.tokenizer, "train", self.steps * self.batch_size)
        policy.train(True)
        while at["step"] < self.steps:
            linear_to_zero(optimizer, at["step"], self.steps, warmup=self.warmup)
            tokens = blocks[at["cursor"] : at["cursor"] + self.batch_size].to(models.device)
            everything = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
            loss = ask_loss(run.hook.rlhf_lm_loss, output=next_token_output(policy, tokens), mask=everything)
            loss.value.backward()
            norm = step_optimizer(optimizer, policy.parameters(), self.max_grad_norm)
            at["step"] += 1
            at["cursor"] += self.batch_size
            metrics = combine([(1, {"loss": loss.value.detach(), **loss.metrics, "grad_norm": norm})])
            run.step_end("pretrain", at["step"], self.steps, metrics)
            state.tick()
        results = self._report(run, models, blocks)
        return state.finish(lambda folder: save_result(folder, policy, models.tokenizer, results))

    def _blocks(self, run: Run, tokenizer: Tokenizer, split: Split, count: int) -> Tensor:
        """`[count, block_length]` tokens of one split's documents, from the start again if they run out."""
        wanted = count * self.block_length
        stream = token_stream(run, tokenizer, split)
        return torch.tensor(list(islice(stream, wanted))).view(count, self.block_length)

    def _report(self, run: Run, models: Models, blocks: Tensor) -> dict[str, float]:
        heldout = self._blocks(run, models.tokenizer, "heldout", self.heldout_blocks)
        policy: Any = models.policy
        policy.train(False)
        with torch.no_grad():
            logp = torch.cat([next_token_output(policy, b.to(models.device)).logp for b in heldout.split(16)])
        # The unigram's answer to the same tokens: counts of the training blocks, one added to each.
        counts = torch.bincount(blocks.flatten(), minlength=int(max(blocks.max(), heldout.max())) + 1) + 1.0
        unigram = (counts / counts.sum()).log()[heldout[:, 1:]].mean()
        results = {"heldout_perplexity": exp(-logp.mean()), "unigram_perplexity": exp(-unigram)}
        run.say(
            "pretrain: held-out perplexity {heldout_perplexity:.0f}, unigram {unigram_perplexity:.0f}".format(**results)
        )
        return results


def token_stream(run: Run, tokenizer: Tokenizer, split: Split) -> Iterator[int]:
    """The tokens of a split's documents, an end token after each, for ever."""

    def documents() -> Iterator[Document]:
        return (d for d in run.hook.rlhf_documents(run=run) if d.split == split)

    if next(documents(), None) is None:
        raise ValueError(f'rlhf_documents gave no document of the split "{split}"; this stage needs some')
    while True:
        source = documents()
        while texts := [document.text for document in islice(source, 1000)]:
            yield from chain.from_iterable([*row, tokenizer.end_id] for row in tokenizer.encode(texts))


def next_token_output(policy: Policy, tokens: Tensor) -> Output:
    """What the policy says of every token of `[B, L]` blocks but the first: columns `[B, L - 1]`."""
    everything = torch.ones_like(tokens, dtype=torch.bool)
    heads = heads_of(policy, tokens, everything)
    return Output(logp=heads.logprobs(tokens[:, 1:], everything[:, 1:], start=0).logp)


def save_result(folder: Path, model: Any, tokenizer: Tokenizer, results: dict[str, Any]) -> None:
    """A stage's result: the model and tokenizer as one folder, and the figures."""
    getattr(model, "export", model.save)(folder)
    tokenizer.save(folder)
    (folder / "results.json").write_text(json.dumps(results, indent=1), "utf-8")
