"""The policy: a causal language model that answers with hidden states and a head instead of logits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf_engine.models import Heads

from .backbone import context_of, hidden_states
from .folders import quiet, read_config, read_model, restore
from .generate import sample

__all__ = ["HFPolicy"]


class HFPolicy(nn.Module):
    """A causal language model of transformers as the engine's `Policy`, with a sampler of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
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
            return cls(LlamaForCausalLM(config))

    @classmethod
    def load_folder(cls, folder: Path | str) -> HFPolicy:
        """The causal language model in `folder`, in fp32, its dropout off."""
        return cls(read_model(AutoModelForCausalLM, folder, read_config(folder)))

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        """What the model says of the next token at every position, the logits not yet written out."""
        return self._heads(hidden_states(self.model, tokens, mask))

    def generate(
        self, tokens: Tensor, mask: Tensor, *, length: int, temperature: float, end_id: int
    ) -> tuple[Tensor, Tensor]:
        """Sample after each left-padded prompt; see `rlhf_plugins.hf.generate.sample`."""
        return sample(self.model, self._logits, tokens, mask, length=length, temperature=temperature, end_id=end_id)

    def save(self, folder: Path) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` opens."""
        with quiet():
            self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into this model, in place and bit for bit."""
        restore(self.model, folder)

    def _heads(self, hidden: Tensor) -> Heads:
        head = self.model.get_output_embeddings()
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return Heads(hidden=hidden, weight=head.weight, bias=head.bias, softcap=softcap)

    def _logits(self, hidden: Tensor) -> Tensor:
        heads = self._heads(hidden)
        assert heads.weight is not None
        logits = linear(hidden, heads.weight, heads.bias).float()
        return logits if heads.softcap is None else torch.tanh(logits / heads.softcap) * heads.softcap

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
            if not error <= 1e-3 * theirs.abs().max():
                raise ValueError(
                    f"{type(self.model).__name__} differs from what this policy assumes by {float(error):.3g} nats: "
                    "logits = softcap(hidden @ weight.T + bias), no dropout, no effect of left padding, a key-value "
                    "cache. The architecture needs a policy of its own (see rlhf_engine.models.Policy)"
                )
