"""The engine inside the Trainer of transformers: the steps are the Trainer's, experience and loss the engine's.

python examples/trainer_loop.py [Hugging Face folder of a causal language model]
"""

import sys
import tempfile

import torch
from transformers import Trainer, TrainingArguments

from rlhf_engine import Engine, FunctionReward, Prompt
from rlhf_engine.embed.trainer import EngineLoop
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.hf import load_models


def brevity(texts: list[str]) -> list[float]:
    """Prefer short answers."""
    return [-len(text) / 100 for text in texts]


def main(folder: str = "runs/movies/pretrain/result", steps: int = 5, learning_rate: float = 3e-4) -> list[float]:
    torch.manual_seed(0)
    engine = Engine([GRPO(), FunctionReward(brevity)], load_models(folder), samples_per_prompt=8, response_length=16)
    prompts = [Prompt(text="This film was"), Prompt(text="I thought the plot")]
    loop = EngineLoop(engine, prompts, prompts_per_step=2)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=learning_rate,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    )
    trainer = Trainer(model=loop.model, args=arguments, train_dataset=loop.rows, callbacks=[loop])
    trainer.train()
    return [metrics["score"] for metrics in loop.history]


if __name__ == "__main__":
    print("mean rewards:", main(*sys.argv[1:]))
