"""The policy: a causal language model that answers with hidden states and a head instead of logits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
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
        self._require_plain_head()

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
        logits = nn.functional.linear(hidden, heads.weight, heads.bias).float()
        return logits if heads.softcap is None else torch.tanh(logits / heads.softcap) * heads.softcap

    @torch.no_grad()
    def _require_plain_head(self) -> None:
        """Some architectures scale their logits, project them further or look at padding: refuse these."""
        tokens = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1]], device=self.model.device)
        mask = torch.tensor([[True] * 4, [False] * 2 + [True] * 2], device=self.model.device)
        expected = self.model(input_ids=tokens[:1], use_cache=False).logits[0].float()
        actual = self._logits(hidden_states(self.model, tokens, mask))
        allowed = 1e-3 * expected.abs().max()
        if not ((actual[0] - expected).abs().max() <= allowed and (actual[1, 2:] - expected[:2]).abs().max() <= allowed):
            raise ValueError(
                f"{type(self.model).__name__}: its logits are not softcap(hidden @ weight.T + bias), or they change "
                "when the prompt is padded on the left; this architecture needs a policy of its own (see "
                "rlhf_engine.models.Policy)"
            )
