"""The decode loop: plain sampling with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from .backbone import context_of, positions

__all__ = ["sample"]


class _RoomyLayer(DynamicLayer):
    """A filled cache layer with room for `extra` tokens: a `DynamicLayer` copies everything at every token."""

    def __init__(self, filled: DynamicLayer, extra: int) -> None:
        super().__init__()
        assert filled.keys is not None
        assert filled.values is not None
        self.dtype, self.device, self.is_initialized = filled.dtype, filled.device, True
        self.keys, self.values = filled.keys, filled.values
        self.all_keys, self.all_values = pad(filled.keys, (0, 0, 0, extra)), pad(filled.values, (0, 0, 0, extra))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values


def _require_room(model: PreTrainedModel, mask: Tensor, length: int, temperature: float) -> None:
    if length < 1:
        raise ValueError(f"cannot sample responses of length {length}: it must be at least 1")
    if not temperature > 0:
        raise ValueError(f"cannot sample at temperature {temperature}: it must be above 0")
    if not mask.any(1).all():
        raise ValueError(
            f"prompt {int(mask.any(1).int().argmin())} is empty: the policy needs at least one token to continue"
        )
    if not mask[:, -1].all():
        raise ValueError(f"prompt {int(mask[:, -1].int().argmin())} is padded on the right: pad prompts on the left")
    prompts, context = mask.sum(1), context_of(model.config)
    if context is not None and prompts.max() + length > context:
        raise ValueError(
            f"prompt {int(prompts.argmax())} has {int(prompts.max())} tokens, and with a response of {length} it is "
            f"longer than the model's context of {context}: shorten the prompts or the response length"
        )


def sample(
    model: PreTrainedModel,
    logits_of: Callable[[Tensor], Tensor],
    tokens: Tensor,
    mask: Tensor,
    *,
    length: int,
    temperature: float,
    end_id: int,
) -> tuple[Tensor, Tensor]:
    """Sample up to `length` tokens after each prompt, from softmax(logits / temperature): never a beam.

    Args:
        model: a causal language model.
        logits_of: its head, from hidden states `[B, H]` to logits `[B, V]` fp32.
        tokens: `[B, P]` int64, the prompts, padded on the left.
        mask: `[B, P]` bool, False at the padding.
        length: the most tokens to sample.
        temperature: divides the logits.
        end_id: a response ends with this token.

    Returns:
        The sampled tokens `[B, T]` int64, and their log-probs `[B, T]` fp32 in nats at the temperature. T is
        `length`, or less once every row has its end token; what stands after a row's end token is junk.

    Raises:
        ValueError: an empty prompt, a prompt that leaves no room for the response, a length below 1, a
            temperature that is not above 0.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    _require_room(model, mask, length, temperature)
    with torch.inference_mode():
        chosen, logp = _decode(model, logits_of, tokens, mask, length, temperature, end_id)
        if not logp.isfinite().all():
            row, step = logp.isfinite().logical_not().nonzero()[0].tolist()
            raise FloatingPointError(
                f"the policy's logits for token {step} of response {row} are not finite: its weights have diverged "
                "(try a lower learning rate), or the folder it was read from is damaged"
            )
    # Tensors made in inference mode cannot take part in autograd; their copies can.
    return chosen.clone(), logp.clone()


def _decode(
    model: PreTrainedModel,
    logits_of: Callable[[Tensor], Tensor],
    tokens: Tensor,
    mask: Tensor,
    length: int,
    temperature: float,
    end_id: int,
) -> tuple[Tensor, Tensor]:
    rows, width = tokens.shape
    padded = not mask.all()
    place = mask.sum(1, keepdim=True)
    hidden, cache = _read_prompts(model, tokens, mask, padded, length)
    mask = pad(mask, (0, length), value=True)
    chosen = tokens.new_empty(rows, length)
    probability = torch.empty(rows, length, device=tokens.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=tokens.device)
    for step in range(length):
        token, probability[:, step] = _pick(logits_of(hidden) / temperature)
        chosen[:, step] = token[:, 0]
        ended |= chosen[:, step] == end_id
        if step + 1 == length or ended.all():
            break
        seen = {"attention_mask": mask[:, : width + step + 1], "position_ids": place + step} if padded else {}
        output = model.base_model(input_ids=token, past_key_values=cache, use_cache=True, **seen)
        hidden = output.last_hidden_state[:, -1]
    return chosen[:, : step + 1], probability[:, : step + 1].log()


def _read_prompts(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, padded: bool, extra: int
) -> tuple[Tensor, DynamicCache]:
    """The hidden states `[B, H]` after the prompts, and their keys and values with room for `extra` tokens.

    A prompt that stands in several rows, as in a group, is read once.
    """
    width = tokens.shape[1]
    distinct, which = torch.cat([tokens, mask], dim=1).unique(dim=0, return_inverse=True)
    tokens, mask = distinct[:, :width], distinct[:, width:].bool()
    cache = DynamicCache(config=model.config)
    seen = {"attention_mask": mask, "position_ids": positions(mask)} if padded else {}
    output = model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True, **seen)
    cache.reorder_cache(which)
    cache.layers = [
        _RoomyLayer(layer, extra) if type(layer) is DynamicLayer and layer.is_initialized else layer
        for layer in cache.layers
    ]
    return output.last_hidden_state[which, -1], cache


def _pick(logits: Tensor) -> tuple[Tensor, Tensor]:
    """One token `[B, 1]` drawn from each row's softmax, and its probability `[B]`.

    By inverting the cumulative distribution: one random number a row, where the exponential race that
    `torch.multinomial` runs draws one a token and takes as long as a small model. In fp64, since in fp32 the
    rounding of the sum would be the size of a rare token's probability.
    """
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    draw = 1 - torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device)  # in (0, 1]
    token = torch.searchsorted(cumulative, draw * cumulative[:, -1:])
    token.clamp_(max=logits.shape[-1] - 1)  # NaN is found behind the last token; the caller reports it
    return token, probabilities.gather(-1, token).squeeze(-1)
