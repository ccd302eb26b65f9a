"""One of two data-parallel processes: a training of TRL's with ours off, then on; the first prints both as JSON."""

import json
import sys
from pathlib import Path

import torch

from rlhf_engine.embed.trl import switch_on
from tests.engine.embed import tiny

LOGGED = ("loss", "kl", "entropy", "grad_norm", "clip_ratio/region_mean", "clip_ratio/low_min", "clip_ratio/high_max")


def main(folder: Path) -> None:
    found = []
    for on in (False, True):
        trainer = tiny.grpo(
            folder,
            gradient_accumulation_steps=2,
            num_iterations=2,
            beta=0.05,
            max_steps=4,
            learning_rate=0.01,
            per_device_train_batch_size=4,
            ddp_backend="gloo",
        )
        if on:
            switch_on(trainer)
        torch.manual_seed(11 + trainer.accelerator.process_index)
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        logs = [{name: log[name] for name in LOGGED} for log in trainer.state.log_history[:4]]
        found.append({"logs": logs, "weights": weights.tolist(), "model": type(trainer.model_wrapped).__name__})
    if trainer.accelerator.is_main_process:
        print("FOUND", json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
