"""The engine inside a loop of your own: the optimizer and the loop are yours, the reward is a plain function.

python examples/own_loop.py [Hugging Face folder of a causal language model]
"""

import sys

import torch

from rlhf_engine import Engine, Prompt
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.hf import load_models


def brevity(texts: list[str]) -> list[float]:
    """Prefer short answers."""
    return [-len(text) / 100 for text in texts]


def main(folder: str = "runs/movies/pretrain/result", steps: int = 5, learning_rate: float = 3e-4) -> list[float]:
    torch.manual_seed(0)
    models = load_models(folder)
    engine = Engine([GRPO()], models, rewards=[brevity], samples_per_prompt=8, response_length=16)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=learning_rate)
    prompts = [Prompt(text="This film was"), Prompt(text="I thought the plot")]
    means = []
    for step in range(steps):
        batch = engine.experience(engine.generate(prompts), prompts)
        for minibatch in batch.split(8):
            loss = engine.loss(minibatch)
            loss.value.backward()
            optimizer.step()
            optimizer.zero_grad()
        means.append(float(batch.scores.mean()))
        print(f"step {step + 1}: mean reward {means[-1]:.3f}, shortest answer {min(engine.texts(batch), key=len)!r}")
    return means


if __name__ == "__main__":
    main(*sys.argv[1:])
