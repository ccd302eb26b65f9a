"""A run: its stages in order, what is kept and what is refused, before work starts wherever that can be."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_engine import Loss, Preference, Prompt, Reward, Stage, hookimpl
from rlhf_engine.checkpoint import DamagedCheckpoint, write_folder
from rlhf_engine.config import ConfigError, read_run_file
from rlhf_engine.manager import PluginError
from rlhf_engine.run import Run
from tests.toys import World, run_file, toy_models

RL_ONLY = {"stages": ["rl"]}


def load(folder: Path, **tables: dict[str, Any]) -> Run:
    return Run(read_run_file(run_file(folder, **tables)))


def with_plugins(*names: str, stages: tuple[str, ...] = ("rl",)) -> dict[str, Any]:
    return {
        "stages": list(stages),
        "plugins": [name if ":" in name or name.islower() else here(name) for name in names],
    }


def here(name: str) -> str:
    return f"{__name__}:{name}"


@dataclass(eq=False)
class Diary:
    """Writes down everything that a run tells its plugins."""

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        self.said: list[Any] = [("started", run.folder.name)]

    @hookimpl
    def rlhf_step_end(self, stage: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
        self.said.append((stage, step, steps))
        self.metrics = metrics


# ----------------------------------------------------------------------------------------- the course of a run


def test_the_stages_run_in_order_and_leave_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = load(tmp_path, run={"plugins": ["tests.toys:World", "tests.toys:Count", "grpo", here("Diary")]})
    run.execute()
    steps = [("pretrain", n, 4) for n in (1, 2, 3, 4)] + [("reward", n, 3) for n in (1, 2, 3)]
    assert run.plugins[here("Diary")].said == [("started", "out"), *steps, ("rl", 1, 2), ("rl", 2, 2)]
    begins = [message for message in caplog.messages if message.endswith("begins")]
    assert begins == ["pretrain: begins", "reward: begins", "rl: begins"]

    assert set(run.results("pretrain")) == {"heldout_perplexity", "unigram_perplexity"}
    assert 1 < run.results("pretrain")["heldout_perplexity"] < 100
    assert run.results("reward")["heldout_pairs"] == 12
    assert run.results("reward")["single_rater_ceiling"] == pytest.approx(0.9)
    before, after = run.results("rl")["before"], run.results("rl")["after"]
    assert set(before) == set(after) == {"score", "rewards", "length", "truncated", "entropy", "samples"}
    assert before["rewards"]["count_a"]["weight"] == 1.0
    assert [sample["prompt"] for sample in after["samples"]] == ["a", "bc", "de"]
    for stage in ("pretrain", "reward", "rl"):
        assert run.result(stage) == run.folder / stage / "result"
    document = json.loads((run.folder / "run.json").read_text())
    assert document["config"]["rl"]["epochs"] == 2
    assert document["config_hash"] == run.config_hash
    assert document["versions"]["torch"] == torch.__version__
    engine = f"rlhf-engine {version('rlhf-engine')}"
    assert document["versions"]["plugins"] == dict.fromkeys(["pretrain", "reward", "rl", "grpo"], engine)


def bits(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("result/*") if path.is_file()}


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    made = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / name).mkdir()
        random.seed(name)
        np.random.seed(len(made))
        torch.manual_seed(len(made))
        run = load(tmp_path / name, run={"seed": seed})
        run.execute()
        made.append(bits(run.folder))
    one, two, three = made
    assert one == two
    assert one["rl/result/model.safetensors"] != three["rl/result/model.safetensors"]


def test_a_finished_stage_is_kept_and_a_missing_one_is_done_again_to_the_same_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = load(tmp_path, run={"plugins": ["tests.toys:World", "tests.toys:Count", "grpo", here("Diary")]})
    run.execute()
    before = bits(run.folder)
    shutil.rmtree(run.folder / "rl")
    caplog.set_level(logging.INFO)
    again = Run(run.file)
    again.execute()
    assert {stage for stage, *_ in again.plugins[here("Diary")].said[1:]} == {"rl"}
    assert f"pretrain: done before, kept in {run.folder / 'pretrain' / 'result'}" in caplog.messages
    assert bits(run.folder) == before


def test_a_damaged_result_is_named_with_the_remedy(tmp_path: Path) -> None:
    run = load(tmp_path, run={"stages": ["pretrain"]})
    run.execute()
    weights = run.folder / "pretrain" / "result" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"pretrain/result/model\.safetensors: has \d+ bytes") as caught:
        Run(run.file).execute()
    assert f"or delete {weights.parent} to do that stage again" in caught.value.__notes__[0]


def test_threads_are_set(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        load(tmp_path, run={"stages": ["pretrain"], "threads": before + 1}).execute()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------- the run's folder


def test_another_configuration_in_the_same_folder_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    run = load(tmp_path, run={"stages": ["pretrain"]})
    run.execute()
    for change, named in [
        ({"pretrain": {"steps": 9}}, r"changed: pretrain\.steps"),
        ({"Count": {"letter": "b"}}, r"changed: Count\.letter"),
        ({"run": {"stages": ["pretrain"], "seed": 3}}, r"changed: run\.seed"),
    ]:
        other = load(tmp_path, **{"run": {"stages": ["pretrain"]}, **change})
        with pytest.raises(ConfigError, match=rf"out holds a run with another configuration \({named}\)\. Give this"):
            other.execute()
    (tmp_path / "moved").mkdir()
    shutil.move(run.folder, tmp_path / "moved" / "out")  # where it stands is no part of the configuration
    load(tmp_path / "moved", run={"stages": ["pretrain"]}).execute()


def test_a_run_that_failed_before_its_first_stage_can_be_configured_anew(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="samples_per_prompt"):
        load(tmp_path, rl={"samples_per_prompt": 1}).execute()
    load(tmp_path, run={"stages": ["pretrain"]}).execute()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    one, other = load(tmp_path, run=RL_ONLY), load(tmp_path, run=RL_ONLY)
    with one._alone(), pytest.raises(ConfigError, match="out is in use by another process"):
        other.execute()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    run = load(tmp_path, run=RL_ONLY)
    run.folder.write_text("a file")
    with pytest.raises(ConfigError, match="out cannot be the run's folder: File exists"):
        run.execute()


# --------------------------------------------------------------------------------------------- stages of one's own


@dataclass(eq=False)
class Distil:
    """A stage from a module that is not installed; it leaves what random numbers it saw."""

    forgets: bool = False

    @hookimpl
    def rlhf_stages(self) -> dict[str, Stage]:
        return {"distil": Stage(work=self.work, requires=("rlhf_prompts",))}

    def work(self, run: Run) -> Path:
        drawn = {"torch": float(torch.rand(())), "numpy": float(np.random.rand()), "python": random.random()}
        text = json.dumps({**drawn, "prompts": len(list(run.hook.rlhf_prompts(run=run)))})
        name = "elsewhere" if self.forgets else "result"
        return write_folder(run.folder / "distil" / name, lambda f: (f / "results.json").write_text(text) and None)


def test_a_stage_of_ones_own_is_named_by_the_stage_and_its_plugin_by_path(tmp_path: Path) -> None:
    results = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        run = load(tmp_path / folder, run=with_plugins("tests.toys:World", "Distil", stages=("distil",)))
        run.execute()
        results.append(run.results("distil"))
        torch.rand(3), np.random.rand(3), random.random()
    assert results[0] == results[1]  # every generator starts from the run's seed
    assert results[0]["prompts"] == 8


def test_a_stage_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    run = load(tmp_path, run=with_plugins("tests.toys:World", "Distil", stages=("distil",)), Distil={"forgets": True})
    with pytest.raises(PluginError, match=r"the stage distil left no folder .*out/distil/result; it must"):
        run.execute()


@pytest.fixture
def few_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the test the import of every installed plugin."""
    stages = ["pretrain", "reward", "rl"]
    monkeypatch.setattr(
        "rlhf_engine.manager.candidates", lambda hook: stages if hook == "rlhf_stages" else ["somebody"]
    )


@pytest.mark.usefixtures("few_stages")
def test_an_unknown_stage_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        load(tmp_path, run={"stages": ["pretrian"], "plugins": [here("Distil")]})
    assert 'no plugin of this run brings a stage named "pretrian". Did you mean "pretrain"?' in str(caught.value)
    assert "Known stages: distil, pretrain, reward, rl." in str(caught.value)


@pytest.mark.usefixtures("few_stages")
@pytest.mark.parametrize(
    ("stage", "plugins", "hook"),
    [
        ("pretrain", ["tests.toys:Count"], "rlhf_documents"),
        ("reward", ["tests.toys:Count"], "rlhf_preferences"),
        ("rl", ["tests.toys:World", "tests.toys:Count"], "rlhf_advantages"),
        ("rl", ["tests.toys:World", "ppo"], "rlhf_reward"),
        ("distil", [f"{__name__}:Distil"], "rlhf_prompts"),
    ],
)
def test_a_hook_that_a_stage_needs_and_nobody_answers_is_refused_at_load(
    tmp_path: Path, stage: str, plugins: list[str], hook: str
) -> None:
    wanted = rf"the stage {stage} needs an answer to {hook}, and no plugin of this run gives one\. Could: somebody"
    with pytest.raises(PluginError, match=wanted):
        load(tmp_path, run={"stages": [stage], "plugins": plugins})


@pytest.mark.parametrize("names", [["ppo", "grpo"], ["tests.toys:World", here("Elsewhere")]])
def test_two_answers_are_refused_at_load_under_the_names_of_the_run_file(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(PluginError, match=f"takes one answer, and {names[0]} and {names[1]} both answer it"):
        load(tmp_path, run={"stages": ["rl"], "plugins": names})


# ------------------------------------------------------------------------------- bad input, as the stages meet it


class Elsewhere(World):
    """Another world, with faults by option."""


@dataclass(eq=False)
class Faulty(World):
    no: str = ""
    """leave out the documents, prompts or preferences of this split"""

    @hookimpl
    def rlhf_documents(self, run: Run) -> Any:
        return [document for document in super().rlhf_documents(run) if document.split != self.no]

    @hookimpl
    def rlhf_prompts(self, run: Run) -> list[Prompt]:
        return [prompt for prompt in super().rlhf_prompts(run) if prompt.split != self.no]

    @hookimpl
    def rlhf_preferences(self, run: Run, split: str, epoch: int) -> list[Preference]:
        return [] if split == self.no else list(super().rlhf_preferences(run, split, epoch))

    @hookimpl
    def rlhf_models(self, run: Run, stage: str, needs: set[str]) -> Any:
        models = toy_models()
        models.policy.context = 7  # type: ignore[union-attr]
        return models


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(("stage", "what"), [("pretrain", "document"), ("reward", "preference"), ("rl", "prompt")])
def test_a_stage_without_data_of_a_split_says_so(tmp_path: Path, stage: str, what: str, split: str) -> None:
    plugins = with_plugins("Faulty", "tests.toys:Count", "grpo", stages=(stage,))
    with pytest.raises(ValueError, match=f'rlhf_{what}s gave no {what} of the split "{split}"'):
        load(tmp_path, run=plugins, Faulty={"no": split}).execute()


@pytest.mark.parametrize(
    ("prompts", "wanted"),
    [
        (["ab", "", "c"], "rlhf_prompts gave a prompt without tokens, '': there is nothing to continue. Leave empty"),
        (
            ["ab", "abcd"],
            "a prompt of 4 tokens, and with response_length = 4 it is longer than the policy's context of 7",
        ),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_before_any_step(
    tmp_path: Path, prompts: list[str], wanted: str
) -> None:
    plugins = with_plugins("Faulty", "tests.toys:Count", "grpo", "Diary")
    run = load(tmp_path, run=plugins, Faulty={"prompts": prompts})
    with pytest.raises(ValueError, match=wanted):
        run.execute()
    assert run.plugins[here("Diary")].said == [("started", "out")]
    assert not (run.folder / "rl").exists()


@dataclass(eq=False)
class Gold:
    """A metric that abstains on some samples."""

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        values = torch.arange(len(texts)).float()
        values[0] = math.nan
        return Reward(name="gold", values=values, weight=0.0)


def test_a_metric_that_abstains_is_averaged_over_what_it_judged(tmp_path: Path) -> None:
    run = load(tmp_path, run=with_plugins("tests.toys:World", "tests.toys:Count", "grpo", "Gold", "Diary"))
    run.execute()
    assert run.plugins[here("Diary")].metrics["score/gold"] == 3.0  # 1 to 5 of six samples
    assert run.results("rl")["before"]["rewards"]["gold"] == {"mean": 1.5, "std": pytest.approx(0.5**0.5), "weight": 0}


@dataclass(eq=False)
class Picky:
    """A reward that abstains on every second sample."""

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        values = torch.ones(len(texts))
        values[1::2] = math.nan
        return Reward(name="picky", values=values)


def test_a_report_shows_every_answer_and_steps_learn_from_the_judged_ones(tmp_path: Path) -> None:
    run = load(tmp_path, run=with_plugins("tests.toys:World", "grpo", "Picky", "Diary"))
    run.execute()
    results = run.results("rl")
    assert [sample["prompt"] for sample in results["before"]["samples"]] == ["a", "bc", "de"]
    assert [sample["prompt"] for sample in results["after"]["samples"]] == ["a", "bc", "de"]
    assert run.plugins[here("Diary")].metrics["episodes"] == 3


class Diverging(World):
    """A reward model that learns nothing but NaN."""

    @hookimpl
    def rlhf_preference_loss(self, chosen: torch.Tensor) -> Loss:
        return Loss(value=chosen.sum() * math.nan)


def test_a_stage_that_diverges_stops_at_once(tmp_path: Path) -> None:
    run = load(tmp_path, run=with_plugins("Diverging", "Diary", stages=("reward",)))
    with pytest.raises(FloatingPointError, match="the gradients' norm is nan, so this step was not taken"):
        run.execute()
    assert run.plugins[here("Diary")].said == [("started", "out")]


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("pretrain", "steps", 0),
        ("pretrain", "block_length", 1),
        ("reward", "learning_rate", 0.0),
        ("reward", "texts_per_step", 0),
        ("rl", "minibatch_size", 0),
        ("rl", "epochs", -1),
        ("rl", "temperature", 0.0),
        ("rl", "evaluation_prompts", 1),
        ("rl", "rows_per_forward", -1),
    ],
)
def test_a_stages_options_are_checked_at_load(tmp_path: Path, stage: str, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"\[{stage}\]: {key} = {value}: Input should be greater than"):
        load(tmp_path, **{stage: {key: value}})
