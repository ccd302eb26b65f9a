"""The engine in a loop with accelerate: two micro-batches a step, whose gradients add up to those of the whole.

python examples/accelerate_loop.py [Hugging Face folder of a causal language model]
"""

import sys

import torch
from accelerate import Accelerator

from rlhf_engine import Engine, FunctionReward, Prompt
from rlhf_engine.embed import micro_batches
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.hf import load_models


def brevity(texts: list[str]) -> list[float]:
    """Prefer short answers."""
    return [-len(text) / 100 for text in texts]


def main(folder: str = "runs/movies/pretrain/result", steps: int = 5, learning_rate: float = 3e-4) -> list[float]:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)  # in one process, and without mixed precision
    models = load_models(folder, device=accelerator.device)
    engine = Engine([GRPO(), FunctionReward(brevity)], models, samples_per_prompt=8, response_length=16)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=learning_rate)
    models.policy, optimizer = accelerator.prepare(models.policy, optimizer)
    prompts = [Prompt(text="This film was"), Prompt(text="I thought the plot")]
    means = []
    for step in range(steps):
        batch = engine.experience(engine.generate(prompts), prompts)
        for piece in micro_batches(batch, accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(models.policy):
                loss = engine.loss(piece)
                accelerator.backward(loss.value)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(engine.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        means.append(float(batch.scores.mean()))
        accelerator.print(f"step {step + 1}: mean reward {means[-1]:.3f}")
    return means


if __name__ == "__main__":
    main(*sys.argv[1:])
