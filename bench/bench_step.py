"""Whole training steps beside other trainers', interleaved in one process.

    make bench                                      pretrain, reward and GRPO steps against transformers and TRL 1.16
    python -m bench.bench_step pretrain|reward|grpo|ppo [rounds] [threads]
                                                    one of them; ppo needs TRL 1.10, in an environment of its own

One thread unless told otherwise: CPU seconds are then work. With more, a thread that waits for the others counts too,
and models this small keep them waiting.

PPO stands there twice: with a critic of its own, as TRL has it, and with a value head on the policy's trunk, which
trains one network instead of TRL's two. That is less work, so its ratio is not one of like with like.

A rival that is not installed is skipped with the reason; ours and the plain-PyTorch floor still run.
"""

import sys
from collections.abc import Callable

import pytest
import torch

from . import ours, peers
from .subject import Setting, make_policy, make_prompts, make_scorer, make_tokenizer
from .timing import Timing, compare, interleave, ratios

ONE_NETWORK = "ours, value head on the policy's trunk (less work)"
SETTING = Setting()
TOKENIZER = make_tokenizer(SETTING)

Steps = dict[str, Callable[[], object]]


def pretrain_steps() -> Steps:
    model = make_policy(SETTING)
    return {
        "ours": ours.pretrain(model, SETTING),
        "plain PyTorch loop": peers.minimal_pretrain(model, SETTING),
        "transformers' Trainer": peers.hf_pretrain(model, SETTING),
    }


def grpo_steps() -> Steps:
    model, prompts = make_policy(SETTING), make_prompts(SETTING, 64 * SETTING.prompts)
    return {
        "ours": ours.grpo(model, TOKENIZER, prompts, SETTING),
        "plain PyTorch loop": peers.minimal_grpo(model, TOKENIZER, prompts, SETTING),
        "TRL 1.16 GRPOTrainer": peers.trl_grpo(model, TOKENIZER, prompts, SETTING),
        "the same, activations computed again, its default": peers.trl_grpo(
            model, TOKENIZER, prompts, SETTING, gradient_checkpointing=True
        ),
    }


def reward_steps() -> Steps:
    scorer = make_scorer(SETTING)
    return {
        "ours": ours.reward(scorer, TOKENIZER, SETTING),
        "TRL 1.16 RewardTrainer": peers.trl_reward(scorer, TOKENIZER, SETTING),
    }


def ppo_steps() -> Steps:
    policy, prompts = make_policy(SETTING), make_prompts(SETTING, 64 * SETTING.batch)
    critic, judge = make_scorer(SETTING, seed=1), make_scorer(SETTING, seed=2)
    return {
        "ours": ours.ppo(policy, critic, judge, TOKENIZER, prompts, SETTING),
        ONE_NETWORK: ours.ppo(policy, None, judge, TOKENIZER, prompts, SETTING),
        "TRL 1.10 PPOTrainer": peers.trl_ppo(policy, critic, judge, TOKENIZER, prompts, SETTING),
    }


STEPS = {"pretrain": pretrain_steps, "reward": reward_steps, "grpo": grpo_steps, "ppo": ppo_steps}
# What we mean to reach: the CPU seconds of the rival over ours, paired round by round.
WANTED = {"pretrain": 1.0, "reward": 1.0, "grpo": 1.6, "ppo": 2.0}


@pytest.mark.parametrize("which", STEPS)
def test_step(which: str, benchmark: object) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = STEPS[which]()
        beside_rival = against_rival(interleave(steps, rounds=5))
        benchmark.extra_info["rival"] = beside_rival  # type: ignore[attr-defined]
        benchmark.pedantic(steps["ours"], rounds=3, warmup_rounds=0)  # type: ignore[attr-defined]
    except ImportError as error:
        pytest.skip(str(error))
    finally:
        torch.set_num_threads(threads)
    print(f"\n{which}: {beside_rival}\nwanted {WANTED[which]}")


def against_rival(timings: dict[str, Timing]) -> str:
    """Everybody's CPU seconds over those of each of ours, a line each."""
    lines = []
    for name in (name for name in timings if name.startswith("ours")):
        for rival in (rival for rival in timings if not rival.startswith("ours")):
            median, lowest, highest = ratios(timings[name].cpu, timings[rival].cpu)
            lines.append(f"{rival}: {median:.2f} ({lowest:.2f}-{highest:.2f}) times the CPU seconds of {name}")
    if ONE_NETWORK in timings:
        lines.append(f"{ONE_NETWORK} trains one network where TRL trains two: not like with like")
    return "\n".join(lines)


def main() -> None:
    """Print the table of one step."""
    which, *numbers = sys.argv[1:]
    rounds, threads = (*map(int, numbers), *(10, 1)[len(numbers) :])
    torch.set_num_threads(threads)
    print(against_rival(compare(STEPS[which](), rounds=rounds)))


if __name__ == "__main__":
    main()
