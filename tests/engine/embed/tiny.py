"""A tiny random Llama, its tokenizer and TRL's trainers on them: all local, all on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

trl = pytest.importorskip("trl", reason="TRL is the extra [trl]")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import WhitespaceSplit  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every trainer that is made; a test sends nothing

VOCABULARY, PROMPT, RESPONSE, ROWS = 40, 3, 6, 8
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
WORDS = ["<pad>", "<end>", "user", "assistant", *(f"w{i}" for i in range(VOCABULARY - 4))]


def make_folder(folder: Path) -> Path:
    """A causal language model and its tokenizer, as TRL loads them by path."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder)
    return folder


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,  # far from uniform, so that log-probs say something
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 0.05,
        "seed": 3,
    }


def lengths(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


def grpo(folder: Path, **options: Any) -> Any:
    """A GRPOTrainer; `peft_config`, `reward_funcs`, `data` and `kind` apart, all options are GRPOConfig's."""
    rows = options.pop("data", {"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(16)]})
    kind = options.pop("kind", trl.GRPOTrainer)
    reward_funcs = options.pop("reward_funcs", lengths)
    peft_config = options.pop("peft_config", None)
    settings = {"num_generations": 4, "max_completion_length": RESPONSE, "max_steps": 2, **common(folder), **options}
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return kind(
        model=model,
        reward_funcs=reward_funcs,
        args=trl.GRPOConfig(**settings),
        train_dataset=Dataset.from_dict(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        peft_config=peft_config,
    )


def reward(folder: Path, *, kind: type | None = None, columns: dict[str, Any] | None = None, **options: Any) -> Any:
    rows: dict[str, Any] = {
        "chosen": [f"w{i} w{i + 1} w{i + 2}" for i in range(16)],
        "rejected": [f"w{i + 3} w{i}" for i in range(16)],
        **(columns or {}),
    }
    torch.manual_seed(1)
    return (kind or trl.RewardTrainer)(
        model=LlamaForSequenceClassification(config_with_one_label()),
        args=trl.RewardConfig(**{"max_steps": 2, **common(folder), **options}),
        train_dataset=Dataset.from_dict(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )


def config_with_one_label() -> LlamaConfig:
    made = config()
    made.num_labels = 1
    return made


def batch() -> dict[str, Any]:
    """What GRPOTrainer's loss reads: left-padded prompts, responses of every length, old log-probs that are off."""
    draw = torch.Generator().manual_seed(7)
    length = torch.tensor([6, 1, 4, 6, 3, 2, 5, 6])
    mask = torch.arange(RESPONSE) < length[:, None]
    prompt_mask = torch.ones(ROWS, PROMPT, dtype=torch.long)
    prompt_mask[::3, 0] = 0
    return {
        "prompt_ids": torch.randint(4, VOCABULARY, (ROWS, PROMPT), generator=draw),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(4, VOCABULARY, (ROWS, RESPONSE), generator=draw).masked_fill(~mask, 0),
        "completion_mask": mask.long(),
        "advantages": torch.randn(ROWS, generator=draw),
        "num_items_in_batch": mask.sum() + 11,
    }
