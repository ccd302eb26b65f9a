"""The policy: a causal language model that answers with hidden states and a head instead of logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf_engine.models import Heads

from .backbone import context_of, hidden_states
from .folders import quiet, read_config, read_model, restore
from .generate import sample

__all__ = ["HFPolicy", "read_causal"]

VALUE_HEAD = "value_head.safetensors"
# By how much two right ways to the same logits may differ, of the largest one.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def read_causal(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal language model in `folder`, its dropout off."""
    return read_model(AutoModelForCausalLM, folder, read_config(folder), dtype=dtype)


class HFPolicy(nn.Module):
    """A causal language model of transformers as the engine's `Policy`, with a sampler of its own."""

    value_head: nn.Parameter | None

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.register_parameter("value_head", None)
        self.context = context_of(model.config)
        self._require_known_behaviour()

    @classmethod
    def fresh(
        cls,
        *,
        vocabulary: int,
        hidden: int,
        layers: int,
        heads: int,
        intermediate: int,
        context: int,
        pad_id: int,
        end_id: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> HFPolicy:
        """A Llama with tied embeddings and random weights, the same for the same seed."""
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=None,
            pad_token_id=pad_id,
            eos_token_id=end_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # not the buffers: rotations by rounded angles would not be those reloaded
            parameter.data = parameter.data.to(dtype)
        return cls(model)

    @classmethod
    def load_folder(cls, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> HFPolicy:
        """The causal language model in `folder`, its dropout off."""
        return cls(read_causal(folder, dtype))

    @property
    def has_values(self) -> bool:
        """Whether it has a value head, and so is its own critic."""
        return self.value_head is not None

    @property
    def rough_sampler(self) -> bool:
        """Whether the sampler, token by token, rounds otherwise than a forward of the whole sequence."""
        return self.model.dtype != torch.float32

    def add_value_head(self) -> None:
        """Put a linear value head, at 0, on the trunk, which language model and values then share."""
        size = self.model.config.get_text_config().hidden_size
        self.value_head = nn.Parameter(torch.zeros(size, device=self.model.device))

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        """What the model says of the next token at every position, the logits not yet written out."""
        heads = self.language_heads(tokens, mask)
        if self.value_head is None:
            return heads
        assert heads.hidden is not None
        return dataclasses.replace(heads, values=heads.hidden.float() @ self.value_head)

    def language_heads(self, tokens: Tensor, mask: Tensor) -> Heads:
        """The same without values."""
        weight, bias, softcap = self._head()
        return Heads(hidden=hidden_states(self.model, tokens, mask), weight=weight, bias=bias, softcap=softcap)

    def generate(
        self, tokens: Tensor, mask: Tensor, *, length: int, temperature: float, end_id: int
    ) -> tuple[Tensor, Tensor]:
        """Sample after each left-padded prompt; see `rlhf_plugins.hf.generate.sample`."""
        return sample(self.model, self._logits, tokens, mask, length=length, temperature=temperature, end_id=end_id)

    def save(self, folder: Path) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` opens; a value head has a file of its own."""
        with quiet():
            self.model.save_pretrained(folder)
        self._save_value_head(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into this model, in place and bit for bit.

        Raises ValueError if the folder holds another kind or size of model, or one of the two has a value head.
        """
        restore(self.model, folder)
        self._load_value_head(folder)

    def _save_value_head(self, folder: Path) -> None:
        if self.value_head is not None:
            save_file({"value_head": self.value_head.detach()}, folder / VALUE_HEAD)

    def _load_value_head(self, folder: Path) -> None:
        file = folder / VALUE_HEAD
        if file.exists() != self.has_values:
            raise ValueError(
                f"{folder} has {'a' if file.exists() else 'no'} {VALUE_HEAD}, but this policy has "
                f"{'a' if self.has_values else 'no'} value head: load it into one made with the same `shared_critic`"
            )
        if self.value_head is not None:
            with torch.no_grad():
                self.value_head.copy_(load_file(file)["value_head"])

    def _head(self) -> tuple[Tensor, Tensor | None, float | None]:
        """Weight, bias and soft cap of the output layer."""
        head = self.model.get_output_embeddings()
        return head.weight, head.bias, getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight, bias, softcap = self._head()
        logits = linear(hidden.to(weight.dtype), weight, bias).float()
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    @torch.no_grad()
    def _require_known_behaviour(self) -> None:
        """Compare two short sequences with the architecture's own answers: head, left padding and cache."""
        device = self.model.device
        tokens = torch.tensor([[0, 1], [1, 0]], device=device)
        mask = torch.tensor([[True, True], [False, True]], device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            sampled, logp = self.generate(tokens, mask, length=2, temperature=1.0, end_id=-1)
        tokens, mask = torch.cat([tokens, sampled], 1), pad(mask, (0, 2), value=True)
        ours = self._logits(hidden_states(self.model, tokens, mask))
        for row, start in ((0, 0), (1, 1)):
            theirs = self.model(input_ids=tokens[row : row + 1, start:], use_cache=False).logits[0].float()
            expected = theirs[-3:-1].log_softmax(-1).gather(-1, sampled[row, :, None])[:, 0]
            error = max((ours[row, start:] - theirs).abs().max(), (logp[row] - expected).abs().max())
            if not error <= ROUNDING[self.model.dtype] * theirs.abs().max():
                raise ValueError(
                    f"{type(self.model).__name__} differs from what this policy assumes by {float(error):.3g} nats: "
                    "logits = softcap(hidden @ weight.T + bias), no dropout, no effect of left padding, a key-value "
                    "cache. The architecture needs a policy of its own (see rlhf_engine.models.Policy)"
                )
