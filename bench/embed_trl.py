"""What `rlhf_engine.embed.trl.switch_on` changes for TRL 1.16's GRPOTrainer: one loss and its backward pass.

    python -m bench.embed_trl [--rows 8 --prompt 64 --response 128 --vocabulary 32000 --rounds 9] [--bf16]

One trainer, the same inputs, ours off and on in turns; wall time, and the most memory that is added. The responses are
of every length up to `--response`. Both losses are compared before anything is timed.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from . import peak_memory, subject, timing


def make_trainer(setting: subject.Setting, bf16: bool) -> Any:
    """A GRPOTrainer at TRL's defaults on a Llama of two layers with random weights."""
    from datasets import Dataset
    from huggingface_hub import constants
    from trl import GRPOConfig, GRPOTrainer

    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every trainer that is made; a bench sends nothing
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        per_device_train_batch_size=setting.batch,
        num_generations=setting.group,
        max_completion_length=setting.response_length,
    )

    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        return [0.0] * len(completions)

    return GRPOTrainer(
        model=subject.make_policy(setting),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": subject.make_prompts(setting, setting.prompts)}),
        processing_class=copy.deepcopy(subject.make_tokenizer(setting)),
    )


def make_inputs(setting: subject.Setting, device: torch.device) -> dict[str, torch.Tensor]:
    """A micro-batch as the trainer's loss reads it; a response is as long as a uniform draw says."""
    draw = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.response_length)
    lengths = torch.randint(1, setting.response_length + 1, (setting.batch, 1), generator=draw)
    mask = torch.arange(setting.response_length) < lengths
    prompts = torch.randint(1, setting.vocabulary, (setting.batch, setting.prompt_length), generator=draw)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.randint(1, setting.vocabulary, shape, generator=draw),
        "completion_mask": mask.long(),
        "advantages": torch.randn(setting.batch, generator=draw),
        "num_items_in_batch": mask.sum(),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.embed_trl", description=__doc__)
    for name, default in (("rows", 8), ("prompt", 64), ("response", 128), ("vocabulary", 32000), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true", help="TRL's default: autocast")
    parser.add_argument("--memory", choices=("TRL", "ours"), help="print the MiB that one call of this one adds")
    asked = parser.parse_args()
    from rlhf_engine.embed.trl import switch_on

    setting = subject.Setting(
        vocabulary=asked.vocabulary, hidden=256, intermediate=688, layers=2, heads=4, prompts=asked.rows // 4, group=4,
        prompt_length=asked.prompt, response_length=asked.response,
    )  # fmt: skip
    trainer = make_trainer(setting, asked.bf16)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = make_inputs(setting, trainer.accelerator.device)

    def theirs() -> torch.Tensor:
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        return loss.detach()

    def ours() -> torch.Tensor:
        with switch_on(trainer):
            return theirs()

    calls: dict[str, Callable[[], object]] = {"TRL": theirs, "ours": ours}
    if asked.memory:
        calls[asked.memory]()  # what is set up once is not the call's
        trainer.model.zero_grad()
        peak = peak_memory.peak_on_gpu if torch.cuda.is_available() else peak_memory.peak
        print(peak(calls[asked.memory]) / 2**20)
        return
    first, second = theirs(), ours()
    torch.testing.assert_close(second, first, rtol=2e-2 if asked.bf16 else 1e-4, atol=1e-5)
    times = {name: measured.wall for name, measured in timing.interleave(calls, rounds=asked.rounds, warmup=1).items()}
    print(timing.header())
    print(
        f"[{asked.rows}, {asked.prompt} + {asked.response}], V {asked.vocabulary}, {'bf16' if asked.bf16 else 'fp32'}"
    )
    for name in calls:
        print(f"{name:<6}{1e3 * statistics.median(times[name]):>8.1f} ms {_added(name):>8.0f} MiB added at most")
    median, lowest, highest = timing.ratios(times["ours"], times["TRL"])
    print(f"time, TRL over ours, round by round: {median:.2f} ({lowest:.2f}-{highest:.2f})")


def _added(name: str) -> float:
    """MiB that one call adds, in a process of its own, which gives back what it frees."""
    command = [sys.executable, "-m", f"{__package__}.embed_trl", *sys.argv[1:], "--memory", name]
    environment = {**os.environ, **peak_memory.ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
