"""The contract is what this table says, each hook has its page in the manual, and a run calls every one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from rlhf_engine import hookimpl, hookspecs
from rlhf_engine.config import read_run_file
from rlhf_engine.manager import manager
from rlhf_engine.run import Run
from tests.toys import run_file

ONE, ALL = "One answer", "All answers"
CONTRACT = {
    "rlhf_stages": (ALL, ()),
    "rlhf_documents": (ONE, ("run",)),
    "rlhf_preferences": (ONE, ("run", "split", "epoch")),
    "rlhf_prompts": (ONE, ("run",)),
    "rlhf_models": (ONE, ("run", "stage", "needs")),
    "rlhf_optimizer": (ONE, ("parameters", "learning_rate", "stage")),
    "rlhf_lm_loss": (ONE, ("output", "mask")),
    "rlhf_preference_loss": (ONE, ("chosen", "rejected", "strength")),
    "rlhf_generate": (ONE, ("models", "prompts", "temperature", "response_length")),
    "rlhf_reward": (ALL, ("rollout", "prompts", "texts", "models")),
    "rlhf_needs": (ALL, ()),
    "rlhf_token_rewards": (ONE, ("scored",)),
    "rlhf_advantages": (ONE, ("rewarded",)),
    "rlhf_loss": (ONE, ("output", "batch")),
    "rlhf_run_started": (ALL, ("run",)),
    "rlhf_step_end": (ALL, ("run", "stage", "step", "steps", "metrics")),
    "rlhf_save": (ALL, ("folder",)),
    "rlhf_load": (ALL, ("folder",)),
}
SPECS: dict[str, Callable[..., Any]] = {
    name: value for name, value in vars(hookspecs).items() if name.startswith("rlhf_") and inspect.isfunction(value)
}


def test_these_are_the_hooks() -> None:
    assert set(SPECS) == set(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_a_hook_is_as_the_contract_says(name: str) -> None:
    kind, arguments = CONTRACT[name]
    spec = getattr(manager([]).hook, name).spec
    assert spec.argnames == arguments
    assert spec.opts["firstresult"] == (kind == ONE)
    assert spec.opts["historic"] == (name == "rlhf_run_started")


@pytest.mark.parametrize("name", CONTRACT)
def test_a_hook_has_its_page_in_the_manual(name: str) -> None:
    page = inspect.getdoc(SPECS[name]) or ""
    kind, arguments = CONTRACT[name]
    assert page.startswith(kind)
    assert len(page) > 60
    annotations = inspect.signature(SPECS[name]).parameters
    assert all(annotations[argument].annotation is not inspect.Parameter.empty for argument in arguments)
    assert inspect.signature(SPECS[name]).return_annotation is not inspect.Parameter.empty


def test_a_run_that_is_interrupted_and_resumed_calls_every_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()

    class AroundRewards:  # the engine asks these one by one, inside their wrappers
        @hookimpl(wrapper=True)
        def rlhf_reward(self) -> Generator[None, Any, Any]:
            called.add("rlhf_reward")
            return (yield)

    def watched() -> Run:
        run = Run(read_run_file(run_file(tmp_path)))
        run.manager.register(AroundRewards())
        run.manager.add_hookcall_monitoring(lambda name, *_: called.add(name), lambda *_: None)
        return run

    called.add("rlhf_stages")  # answered while the run is loaded
    assert set(watched().stages) == {"pretrain", "reward", "rl"}
    step_end = Run.step_end

    def interrupted(run: Run, stage: str, step: int, *rest: Any) -> None:
        step_end(run, stage, step, *rest)
        if (stage, step) == ("reward", 2):
            raise KeyboardInterrupt

    run = watched()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.execute()
    assert "rlhf_load" not in called
    watched().execute()
    assert called == set(CONTRACT)
