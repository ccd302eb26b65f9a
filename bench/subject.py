"""What the step benches work on: one small Llama-like model, its tokenizer and its texts, made here, offline.

Nobody stops early: the tokenizer's end token has the id one past the policy's vocabulary, so it cannot be sampled.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)


@dataclass(frozen=True)
class Setting:
    """The shape of the bench; as it stands the Llama-like model has 1.2 million parameters."""

    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 448
    layers: int = 4
    heads: int = 4
    prompts: int = 8
    group: int = 4
    prompt_length: int = 16
    response_length: int = 32
    block_length: int = 128
    """of the texts in pretraining"""

    @property
    def batch(self) -> int:
        return self.prompts * self.group


def words(setting: Setting) -> list[str]:
    """One made-up lower-case word for each token that the model knows, but for the padding (id 0)."""
    syllables = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
    made = ("".join(parts) for length in (1, 2, 3) for parts in itertools.product(syllables, repeat=length))
    return list(itertools.islice(made, setting.vocabulary - 1))


def make_tokenizer(setting: Setting) -> PreTrainedTokenizerFast:
    """A word a token; `<pad>` is 0 and `<end>` is one past the model's vocabulary, so that no model can end early."""
    vocabulary = {word: token for token, word in enumerate(["<pad>", *words(setting), "<end>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def make_prompts(setting: Setting, count: int, seed: int = 0) -> list[str]:
    """`count` random prompts of `prompt_length` tokens each: no padding for anyone."""
    return _texts(setting, count, setting.prompt_length, seed)


def make_blocks(setting: Setting, count: int, seed: int = 0) -> torch.Tensor:
    """Random tokens to pretrain on, `[count, block_length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, setting.vocabulary, (count, setting.block_length), generator=generator)


def make_preferences(setting: Setting, count: int, seed: int = 0) -> dict[str, list[str]]:
    """Columns `chosen` and `rejected`: random texts of `prompt_length + response_length` tokens."""
    length = setting.prompt_length + setting.response_length
    return {
        "chosen": _texts(setting, count, length, 2 * seed + 1),
        "rejected": _texts(setting, count, length, 2 * seed + 2),
    }


def _texts(setting: Setting, count: int, length: int, seed: int) -> list[str]:
    known = words(setting)
    choices = torch.randint(len(known), (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(known[index] for index in row) for row in choices]


def letter_share(texts: list[str]) -> list[float]:
    """The reward: the share of the letter a in each text."""
    return [text.count("a") / max(len(text), 1) for text in texts]


def _config(setting: Setting, vocabulary: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        max_position_embeddings=4 * (setting.prompt_length + setting.response_length),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )


def make_policy(setting: Setting, seed: int = 0) -> LlamaForCausalLM:
    """A randomly initialised causal language model, fp32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(_config(setting, setting.vocabulary))


def make_scorer(setting: Setting, seed: int = 0) -> LlamaForSequenceClassification:
    """The same network with a scalar head (reward model or critic); it knows the end token, which TRL appends."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config(setting, setting.vocabulary + 1, num_labels=1))
