"""Gradient checkpointing: a layer's inner activations are computed again in the backward pass, not kept for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["recompute_layers"]


def recompute_layers(model: PreTrainedModel) -> None:
    """From now on keep only each layer's input wherever a forward pass is differentiated.

    Transformers' own switch acts in training mode alone, and without a word in evaluation mode does nothing; here
    models are differentiated in that mode. Sampling is never differentiated, and its cache stays. No random numbers
    are kept for the second pass: dropout is off.

    Raises ValueError for an architecture whose layers are not marked as fit for it.
    """
    layers = _outermost(model)
    if not layers:
        raise ValueError(
            f"gradient_checkpointing = true: transformers marks no layer of {type(model).__name__} as fit for it, so "
            "nothing would be saved. Leave it out"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _outermost(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if isinstance(child, GradientCheckpointingLayer) else _outermost(child)
    return found


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
