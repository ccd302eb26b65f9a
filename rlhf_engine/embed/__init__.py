"""The engine, its rewards and its kernels inside other programs.

    embed.trl        TRL 1.16: its GRPOTrainer and RewardTrainer on our kernels and losses; rewards both ways
    embed.trainer    the `Trainer` of transformers makes the steps, the engine its experience and its loss
    embed.verl       our estimators and losses with verl's signatures
    embed.openrlhf   the same with OpenRLHF's

Nothing here imports, or patches, another library before you call for it by name. A loop with plain `accelerate` needs
no module of its own (`examples/accelerate_loop.py` is the whole of it), nor does a loop of yours
(`examples/own_loop.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from rlhf_engine.batch import Batch

__all__ = ["micro_batches"]


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """The rows of one optimizer step in `count` pieces, for a trainer that averages the losses of its micro-batches
    (accelerate, the `Trainer` of transformers, DeepSpeed).

    The pieces are as equal as can be. Each carries the step's totals, divided by `count`: the average of the losses,
    and of their gradients, is then the loss of the whole batch however long the responses in each piece are.

    Raises ValueError for a count under 1 or above the number of rows.
    """
    if not 1 <= count <= len(batch):
        raise ValueError(
            f"micro_batches(count={count}): the batch has {len(batch)} rows; each piece needs at least one"
        )
    whole = dataclasses.replace(
        batch,
        total_tokens=batch.mask.sum() / count,
        total_sequences=torch.tensor(len(batch) / count, device=batch.mask.device),
    )
    for rows in torch.arange(len(batch)).tensor_split(count):
        yield whole[rows]
