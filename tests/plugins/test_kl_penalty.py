"""The KL penalty: its estimators at every token, its adaptive coefficient per sequence, and its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_engine import Engine, Prompt, hookimpl
from rlhf_engine.config import ConfigError, build, read_run_file
from rlhf_engine.manager import manager
from rlhf_engine.run import Run
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.kl_penalty import KLPenalty
from tests.toys import Count, HiddenPolicy, run_file, toy_models, written

PROMPTS = [Prompt(text="a"), Prompt(text="bc")]
ROLLOUT = written(["a", "bc"], ["aba.", "c"])


def shaped(penalty: KLPenalty) -> Any:
    models = toy_models()
    models.reference = HiddenPolicy(seed=3)
    engine = Engine([GRPO(), Count(), penalty], models, samples_per_prompt=2)
    return engine.token_rewards(engine.score(ROLLOUT, PROMPTS))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_every_counted_token_pays_and_the_score_stands_at_the_last(kind: str) -> None:
    given = shaped(KLPenalty(beta=0.3, kind=kind))  # type: ignore[arg-type]
    difference = given.old_logp - given.ref_logp
    estimate = {"k1": difference, "k2": difference**2 / 2, "k3": torch.exp(-difference) - 1 + difference}[kind]
    expected = -0.3 * estimate * ROLLOUT.mask
    expected[0, 3] += 2.0  # "aba." has two a
    torch.testing.assert_close(given.rewards, expected, rtol=1e-4, atol=1e-5)
    assert (given.rewards[0, :3] != 0).all()
    assert given.rewards[1, 1:].tolist() == [0.0, 0.0, 0.0]


def test_what_it_needs() -> None:
    assert KLPenalty().rlhf_needs() == {"ref_logp", "old_logp"}


@pytest.mark.parametrize(("kl", "beta"), [(12.0, 0.151536), (3.0, 0.148464), (6.6, 0.150768)])
def test_an_adaptive_beta_follows_the_kl_of_sequences(kl: float, beta: float) -> None:
    penalty = KLPenalty(beta=0.15, target=6.0, horizon=1e4)
    metrics: dict[str, Any] = {"kl": kl, "episodes": 512}
    penalty.rlhf_step_end(stage="rl", metrics=metrics)
    assert penalty.beta == pytest.approx(beta, abs=1e-12)
    assert metrics["kl_penalty/beta"] == 0.15  # the one that was used in this step


def test_a_fixed_beta_stays_and_other_stages_do_not_matter() -> None:
    fixed, adaptive = KLPenalty(beta=0.15), KLPenalty(beta=0.15, target=6.0)
    fixed.rlhf_step_end(stage="rl", metrics={"kl": 60.0, "episodes": 512})
    metrics: dict[str, Any] = {"loss": 1.0}
    adaptive.rlhf_step_end(stage="pretrain", metrics=metrics)
    assert fixed.beta == adaptive.beta == 0.15
    assert metrics == {"loss": 1.0}


class Tracker:
    @hookimpl
    def rlhf_step_end(self, metrics: dict[str, Any]) -> None:
        self.metrics = dict(metrics)


def test_trackers_see_its_beta_whatever_the_order_of_the_plugins() -> None:
    for plugins in ([KLPenalty(), Tracker()], [Tracker(), KLPenalty()]):
        made = manager(plugins)
        made.hook.rlhf_step_end(run=None, stage="rl", step=1, steps=1, metrics={"kl": 1.0, "episodes": 4})
        assert next(p for p in plugins if isinstance(p, Tracker)).metrics["kl_penalty/beta"] == 0.05


def test_a_run_adapts_beta_once_a_step_by_the_kl_it_logs(tmp_path: Path) -> None:
    plugins = ["tests.toys:World", "tests.toys:Count", "grpo", "kl_penalty", f"{__name__}:History"]
    path = run_file(
        tmp_path,
        run={"stages": ["rl"], "plugins": plugins},
        rl={"steps": 4, "learning_rate": 0.1},
        kl_penalty={"beta": 0.2, "target": 0.5, "horizon": 20.0},
    )
    run = Run(read_run_file(path))
    run.execute()
    beta, episodes = 0.2, 6
    for metrics in run.plugins[f"{__name__}:History"].steps:
        assert metrics["episodes"] == episodes
        assert metrics["kl_penalty/beta"] == pytest.approx(beta, rel=1e-12)
        beta *= 1 + min(max(metrics["kl"] / 0.5 - 1, -0.2), 0.2) * episodes / 20.0
    assert run.plugins["kl_penalty"].beta == pytest.approx(beta, rel=1e-12)
    assert beta != 0.2


class History:
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    @hookimpl
    def rlhf_step_end(self, metrics: dict[str, Any]) -> None:
        self.steps.append(dict(metrics))


def test_its_state_is_saved_and_loaded_exactly(tmp_path: Path) -> None:
    adapted = KLPenalty(beta=0.1 + 0.2, target=6.0)
    adapted.adapt(7.123, 37)
    adapted.rlhf_save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kl_penalty.json"]
    fresh = KLPenalty(beta=0.3, target=6.0)
    fresh.rlhf_load(tmp_path)
    assert fresh.beta == adapted.beta


@pytest.mark.parametrize("table", [{"beta": -0.1}, {"target": 0.0}, {"horizon": 0}, {"kind": "k4"}])
def test_options_out_of_range_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"\[kl_penalty\]: {next(iter(table))} = "):
        build(KLPenalty, table, where="[kl_penalty]")
