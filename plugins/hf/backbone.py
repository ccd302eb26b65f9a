"""The forward pass that policies and value models share: tokens and a mask to hidden states."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["context_of", "hidden_states", "positions"]


def context_of(config: PreTrainedConfig) -> int | None:
    """The most tokens that a sequence may have, None if the architecture sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def positions(mask: Tensor) -> Tensor:
    """`[B, L]` int64: the place of each counted token among the counted ones of its row, from 0."""
    return (mask.cumsum(1) - 1).clamp_(min=0)


def hidden_states(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """The last hidden states `[B, L, H]` of a causal model without its head.

    Padding changes no answer at a counted token. Raises ValueError if a row has more tokens than the context.
    """
    context = context_of(model.config)
    fits = context is None or tokens.shape[1] <= context
    padded_only_on_the_right = not (mask[:, 1:] > mask[:, :-1]).any()
    if fits and padded_only_on_the_right:
        # A causal model never looks at what stands further right: no mask, so the fastest attention.
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    lengths = mask.sum(1)
    if context is not None and lengths.max() > context:
        raise ValueError(
            f"row {int(lengths.argmax())} has {int(lengths.max())} tokens, but the model's context is {context}: "
            "shorten the texts, or use a model with a longer context"
        )
    output = model.base_model(input_ids=tokens, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return output.last_hidden_state
