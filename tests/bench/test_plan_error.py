"""The cost model beside steps that are really taken: the parts add up, and the clock leaves the engine as it was."""

from dataclasses import replace

import pytest

from bench.plan_error import PARTS, clocked, errors, measured, part_of, predicted, setup
from bench.request import load
from bench.request import operations as operations_with_a_bench
from bench.subject import Setting
from rlhf_engine import Engine
from rlhf_engine.plan import Machine, operations, seconds
from rlhf_engine.plan.kernels import KERNELS, kernel_work
from rlhf_engine.plan.machine import ON_CPU

TINY = Setting(
    vocabulary=64, hidden=16, intermediate=32, layers=1, heads=2, prompts=2, group=2, prompt_length=4, response_length=4
)
MACHINE = Machine(
    name="toy", flops={"float32": 1e11, "bfloat16": 1e11}, bandwidth=1e10, memory=1e10, is_cpu=True, efficiency=ON_CPU
)


@pytest.mark.parametrize(
    ("which", "there"),
    [
        ("grpo", {"generate: tokens", "policy: learn", "optimizer"}),
        ("ppo", {"generate: tokens", "policy: forward", "reward model: forward", "critic: learn", "value loss"}),
    ],
)
def test_every_operation_belongs_to_a_part(which: str, there: set[str]) -> None:
    plan = setup(which, TINY, MACHINE)
    found = operations(plan)
    assert there <= {operation.name for operation in found}
    times = predicted(plan)
    assert sum(times.values()) == pytest.approx(sum(seconds(operation, plan)[0] for operation in found))
    parts = {operation.name: part_of(operation) for operation in found}
    assert parts["generate: prompts"] == "generate" and parts["optimizer"] == parts["policy loss"] == "update"
    assert parts["advantages"] == "experience"
    assert {name for name, part in parts.items() if part == "experience" and "forward" not in name} <= {
        "advantages", "policy: log-probs", "reference: log-probs",
    }  # fmt: skip


def test_a_step_of_the_bench_is_planned_as_it_is() -> None:
    plan = setup("ppo", TINY, MACHINE)
    assert (plan.job.updates, plan.responses, plan.piece) == (4, 4, 4)
    grpo = setup("grpo", TINY, MACHINE)
    assert (grpo.job.prompts, grpo.job.responses, grpo.job.updates) == (2, 4, 1)
    assert replace(grpo.model, name="").parameters == 64 * 16 + 16 + 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16


def test_a_real_step_is_clocked_part_by_part() -> None:
    before = {name: getattr(Engine, name) for name in PARTS}
    found = errors("grpo", TINY, MACHINE, rounds=1)
    assert {name: getattr(Engine, name) for name in PARTS} == before
    assert set(found) == {*PARTS, "the step"}
    assert all(expected > 0 and taken > 0 for expected, taken in found.values())
    assert measured("ppo", TINY, rounds=1)["experience"] > found["experience"][1]  # four networks are asked, not none


def test_the_clock_is_taken_off_when_a_step_fails() -> None:
    before = Engine.update
    with pytest.raises(ZeroDivisionError), clocked():
        assert Engine.update is not before
        raise ZeroDivisionError
    assert Engine.update is before


# shaped_gae hands out rewards and KL too, which the plan counts; its bench counts what its rivals give as well.
@pytest.mark.parametrize("name", sorted(({*operations_with_a_bench()} & {*KERNELS}) - {"shaped_gae"}))
def test_bench_and_plan_count_the_same_least_bytes(name: str) -> None:
    bench = load(name)
    for case in bench.cases(bench.shapes):
        if case.form in ("k1", "PPO with k3"):
            continue  # the plan knows no forms: the one needs no inputs for its gradient, the other one more
        work = kernel_work(name, case.shape, case.dtype.itemsize, backward=case.backward)
        assert work is not None
        assert work.bytes == bench.bytes_moved(case), case
