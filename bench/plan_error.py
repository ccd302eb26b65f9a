"""The cost model of `rlhf plan` against whole steps that are really taken, in the same process as its ceilings.

    python -m bench.plan_error [rounds] [threads]

A small model on a CPU is far from what the model is of, large ones on GPUs: there is no other step that can be measured
everywhere. The error is printed, part by part, whatever it is.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf_engine import Engine
from rlhf_engine.plan import Architecture, Job, Operation, Setup, measure_cpu, operations, seconds

from . import ours
from .subject import Setting, make_policy, make_prompts, make_scorer, make_tokenizer

SETTINGS = {"small": Setting(), "wide": Setting(hidden=384, intermediate=1024, vocabulary=4096, prompts=4)}
PARTS = ("generate", "experience", "update")
PPO_EPOCHS = 4  # as bench/ours.py has it


def part_of(operation: Operation) -> str:
    """The method of the engine in which an operation happens."""
    if operation.name.startswith("generate"):
        return "generate"
    learns = "learn" in operation.name or "loss" in operation.name or operation.name == "optimizer"
    return "update" if learns else "experience"


def setup(which: str, setting: Setting, machine: Any) -> Setup:
    """What the step of that name in bench/ours.py does."""
    model = Architecture(
        name="bench", vocabulary=setting.vocabulary, hidden=setting.hidden, intermediate=setting.intermediate,
        layers=setting.layers, heads=setting.heads, kv_heads=setting.heads, head_size=setting.hidden // setting.heads,
        tied=True,
    )  # fmt: skip
    lengths = {"prompt_tokens": setting.prompt_length, "response_tokens": setting.response_length}
    rows: dict[str, Any] = {"minibatch": setting.batch, "piece": setting.batch, **lengths}
    if which == "grpo":
        job = Job(prompts=setting.prompts, samples=setting.group, **rows)
    else:
        job = Job(
            prompts=setting.batch, epochs=PPO_EPOCHS, old_logp=True, reference=True, values=True, own_critic=True,
            reward_model=True, **rows,
        )  # fmt: skip
    return Setup(job=job, model=model, machine=machine, dtype="float32")


def predicted(plan: Setup) -> dict[str, float]:
    """Seconds of each part."""
    times = dict.fromkeys(PARTS, 0.0)
    for operation in operations(plan):
        times[part_of(operation)] += seconds(operation, plan)[0]
    return times


def real_step(which: str, setting: Setting) -> Callable[[], object]:
    policy, tokenizer = make_policy(setting), make_tokenizer(setting)
    if which == "grpo":
        return ours.grpo(policy, tokenizer, make_prompts(setting, 8 * setting.prompts), setting)
    critic, judge = make_scorer(setting, seed=1), make_scorer(setting, seed=2)
    return ours.ppo(policy, critic, judge, tokenizer, make_prompts(setting, 8 * setting.batch), setting)


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Seconds that the engine spends in each part, added up."""
    spent = dict.fromkeys(PARTS, 0.0)
    methods = {name: getattr(Engine, name) for name in PARTS}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return methods[name](*arguments, **named)
            finally:
                spent[name] += time.perf_counter() - begun

        return call

    try:
        for name in PARTS:
            setattr(Engine, name, timed(name))
        yield spent
    finally:
        for name, method in methods.items():
            setattr(Engine, name, method)


def measured(which: str, setting: Setting, rounds: int) -> dict[str, float]:
    """The median of each part after one step that does not count."""
    take, taken = real_step(which, setting), []
    for _ in range(rounds + 1):
        with clocked() as spent:
            take()
        taken.append(spent)
    return {name: statistics.median(one[name] for one in taken[1:]) for name in PARTS}


def errors(which: str, setting: Setting, machine: Any, rounds: int) -> dict[str, tuple[float, float]]:
    """Predicted and measured seconds of each part and of the whole step."""
    expected, found = predicted(setup(which, setting, machine)), measured(which, setting, rounds)
    parts = {name: (expected[name], found[name]) for name in PARTS}
    return {**parts, "the step": (sum(expected.values()), sum(found.values()))}


def main() -> None:
    """Print the table."""
    rounds, threads = (*map(int, sys.argv[1:]), *(5, 2)[len(sys.argv) - 1 :])
    torch.set_num_threads(threads)
    machine = measure_cpu()
    print(
        f"{machine.name}: {machine.bandwidth / 1e9:.1f} GB/s, {machine.flops['float32'] / 1e12:.3f} TFLOP/s, "
        f"{machine.launch * 1e6:.1f} us a launch\n\n"
        "| step | part | predicted ms | measured ms | error |\n|---|---|---|---|---|"
    )
    for name, setting in SETTINGS.items():
        for which in ("grpo", "ppo"):
            for part, (expected, found) in errors(which, setting, machine, rounds).items():
                times = f"{1e3 * expected:.1f} | {1e3 * found:.1f} | {expected / found - 1:+.0%}"
                print(f"| {which}, {name} | {part} | {times} |", flush=True)


if __name__ == "__main__":
    main()
