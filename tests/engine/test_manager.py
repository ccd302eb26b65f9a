"""The rules of the contract: what a run names is what is active, one answer to a hook, and nothing goes wrong in
silence. The numbers are those of the README's list of rules."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_engine import Document, Engine, Loss, Reward, Scored, Stage, hookimpl
from rlhf_engine import manager as manager_module
from rlhf_engine.config import ConfigError, read_run_file
from rlhf_engine.manager import (
    PluginError,
    answers,
    candidates,
    distribution,
    faults,
    installed,
    load,
    load_plugins,
    manager,
    require,
    winners,
)
from rlhf_engine.manager import stages as stages_of
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.kl_penalty import KLPenalty
from rlhf_plugins.ppo import PPO
from rlhf_plugins.whiten import Whiten
from tests.toys import Count, World, run_file, toy_models

ROOT = Path(__file__).resolve().parents[2]


def refusal(*plugins: Any) -> str:
    with pytest.raises(PluginError) as caught:
        manager(plugins)
    return str(caught.value)


# ---------------------------------------------------------------------------- rule 1: named = loaded = active


def test_installed_plugins_do_nothing_until_a_run_names_them(tmp_path: Path) -> None:
    assert {"ppo", "grpo", "rloo", "whiten", "kl_penalty", "hf", "pretrain", "reward", "rl"} <= set(installed())
    plugins = load_plugins(read_run_file(run_file(tmp_path, run={"stages": ["rl"]})))
    assert list(plugins) == ["rl", "tests.toys:World", "tests.toys:Count", "grpo"]
    answering = {name for names in winners(manager(plugins)).values() for name in names}
    assert answering == {"rl", "tests.toys:World", "tests.toys:Count", "grpo", "engine defaults"}


def test_managers_share_nothing() -> None:
    one, other = manager([Count()]), manager([Count(), PPO()])
    assert winners(one)["rlhf_loss"] == []
    assert winners(other)["rlhf_loss"] == ["PPO"]


def test_a_name_that_is_not_installed_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(
        PluginError, match=r'no plugin named "pppo" is installed. Did you mean "ppo"\? Installed: .*rloo'
    ):
        load("pppo")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("no_such_module:Reward", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("tests.toys:Contu", "AttributeError: module 'tests.toys' has no attribute 'Contu'"),
        ("tests.toys:written", "the reward function written asks for 'responses'"),
        ("tests.toys:LETTERS", "is a str; it must be a class, or a reward function"),
        ("tests.engine.broken_plugin:Anything", "No module named 'tests.engine.broken_plugin'"),
    ],
)
def test_a_class_that_cannot_be_loaded_is_named(name: str, wanted: str) -> None:
    with pytest.raises(PluginError) as caught:
        load(name)
    assert f'the plugin "{name}"' in str(caught.value)
    assert wanted in str(caught.value)


def test_a_module_that_fails_while_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_done_plugin.py").write_text("weight = 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match='the plugin "half_done_plugin:X" cannot be loaded: ZeroDivisionError'):
        load("half_done_plugin:X")
    (tmp_path / "leaving_plugin.py").write_text("raise SystemExit('no GPU here')")
    with pytest.raises(PluginError, match='"leaving_plugin:X" cannot be loaded: SystemExit: no GPU here'):
        load("leaving_plugin:X")


def test_a_folder_that_hides_a_module_is_named(tmp_path, monkeypatch):
    """As the folder of an editable package does, for who works beside it."""
    (tmp_path / "hiding_plugin").mkdir()
    (tmp_path / "hiding_plugin" / "hiding_plugin.py").write_text("class X: ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        PluginError, match="has no attribute 'X'. What was imported is the folder .*hiding_plugin, which"
    ):
        load("hiding_plugin:X")


def test_two_packages_with_one_plugin_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("ppo", value, "rlhf_engine") for value in ("one.a:PPO", "one.a:PPO")]
    monkeypatch.setattr(manager_module, "entry_points", lambda group: entries)
    assert set(installed()) == {"ppo"}  # one package that is found twice is still one
    entries.append(EntryPoint("ppo", "two.b:PPO", "rlhf_engine"))
    with pytest.raises(PluginError, match=r'named "ppo": one\.a:PPO and two\.b:PPO\. Uninstall one'):
        installed()


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ("ppo", r'is of the plugin "ppo", which \[run\] names neither in stages nor in plugins'),
        ("world", r"is for no plugin that \[run\] names"),
        ("sft", r"is for no plugin that \[run\] names"),
    ],
)
def test_a_table_for_a_plugin_that_the_run_does_not_name_is_refused(tmp_path: Path, table: str, wanted: str) -> None:
    file = read_run_file(run_file(tmp_path, run={"stages": ["rl", "sft"]}, **{table: {"clip": 0.1}}))
    with pytest.raises(ConfigError, match=rf"run\.toml: the table \[{table}\] {wanted}"):
        load_plugins(file)


def test_a_misspelt_stage_is_told_where_its_table_is_refused(tmp_path: Path) -> None:
    file = read_run_file(run_file(tmp_path, run={"stages": ["reward", "rll"]}, rl={"steps": 1}))
    with pytest.raises(
        ConfigError, match=r'\[rl\] is of the plugin "rl", .* "rll" is no installed plugin. Did you mean "rl"'
    ):
        load_plugins(file)


def test_a_plugins_package_is_named_with_its_version() -> None:
    assert distribution("ppo") == f"rlhf-engine {version('rlhf-engine')}"
    assert distribution("transformers.models:Any") == f"transformers {version('transformers')}"
    assert [distribution(name) for name in ("json:X", "no_such_module:X", "pppo")] == [""] * 3


def test_a_module_that_only_bears_the_name_of_an_installed_one_is_not_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "installed" / "shadowed-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shadowed\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("shadowed")
    (tmp_path / "near").mkdir()
    for folder in ("installed", "near"):
        (tmp_path / folder / "shadowed.py").touch()
    manager_module._packages_by_module.cache_clear()
    monkeypatch.syspath_prepend(tmp_path / "installed")
    assert distribution("shadowed:X") == "shadowed 1.0"
    monkeypatch.syspath_prepend(tmp_path / "near")
    assert distribution("shadowed:X") == ""
    manager_module._packages_by_module.cache_clear()


def test_a_table_belongs_to_the_class_of_a_path(tmp_path: Path) -> None:
    plugins = load_plugins(read_run_file(run_file(tmp_path, Count={"letter": "b"}, grpo={"clip": 0.5})))
    assert plugins["tests.toys:Count"].letter == "b"
    assert plugins["grpo"].clip == 0.5


# ----------------------------------------------------------------------------------------- rule 2: one answer


def test_two_answers_to_a_one_answer_hook_are_refused_and_both_named() -> None:
    message = refusal(PPO(), Count(), GRPO())
    assert message.startswith("rlhf_advantages takes one answer, and PPO and GRPO both answer it.")


@dataclass(eq=False)
class Mine:
    """An answer that gives way to others, where `Mine` is not the only one."""

    @hookimpl(trylast=True)
    def rlhf_token_rewards(self, scored: Scored) -> Tensor:
        return torch.full_like(scored.old_logp, 7.0)


class Theirs:
    @hookimpl
    def rlhf_token_rewards(self, scored: Scored) -> Tensor:
        return torch.full_like(scored.old_logp, 8.0)


class Around:
    @hookimpl(wrapper=True)
    def rlhf_token_rewards(self, scored: Scored) -> Generator[None, Tensor, Tensor]:
        return (yield) + 100


class Nothing:
    @hookimpl
    def rlhf_token_rewards(self) -> None:
        """Forgets to return."""


def test_wrappers_and_answers_that_give_way_are_no_second_answer() -> None:
    assert winners(manager([Mine(), Theirs(), Around()]))["rlhf_token_rewards"] == ["Around (wraps)", "Theirs"]


def test_the_engines_own_answers_give_way_to_any_plugin() -> None:
    assert winners(manager([Count()]))["rlhf_token_rewards"] == ["engine defaults"]
    assert winners(manager([Mine()]))["rlhf_token_rewards"] == ["Mine"]
    assert winners(manager([Around()]))["rlhf_token_rewards"] == ["Around (wraps)", "engine defaults"]


def test_none_is_no_answer_and_nobody_else_answers_in_its_place() -> None:
    made = manager([Nothing()])
    with pytest.raises(PluginError, match="rlhf_token_rewards needs an answer, and Nothing gave None"):
        made.hook.rlhf_token_rewards(scored=None)
    with pytest.raises(PluginError, match="rlhf_prompts needs an answer, and no plugin of this run gave None"):
        made.hook.rlhf_prompts(run=None)


@pytest.fixture
def few_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only plugins that are quick to import."""
    few = {name: entry for name, entry in installed().items() if name in ("ppo", "grpo", "rloo", "whiten", "live")}
    few["broken"] = EntryPoint("broken", "no_such_module:X", "rlhf_engine")
    monkeypatch.setattr(manager_module, "installed", lambda: few)


@pytest.mark.usefixtures("few_installed")
def test_a_hook_that_nobody_answers_is_refused_with_those_who_could() -> None:
    assert candidates("rlhf_advantages") == ["grpo", "ppo", "rloo"]  # not whiten: a wrapper alone is no answer
    made = manager([Count(), Whiten()])
    with pytest.raises(PluginError, match=r"rl needs an answer to rlhf_advantages, .* Could: grpo, ppo, rloo"):
        require(made, ["rlhf_reward", "rlhf_advantages"], by="rl")
    require(made, ["rlhf_reward", "rlhf_generate"], by="rl")


# --------------------------------------------------------------------------------- rule 3: nothing is misspelt


class Wrong:
    @hookimpl
    def rlhf_rewards(self) -> None:
        """Should be rlhf_reward."""


class WrongArgument:
    @hookimpl
    def rlhf_reward(self, text: list[str]) -> Reward:
        raise NotImplementedError


class Unmarked:
    @hookimpl
    def rlhf_needs(self) -> set[str]:
        return set()

    def rlhf_reward(self, texts: list[str]) -> Reward:
        raise NotImplementedError


class Idle:
    """Answers nothing."""


class NotAGenerator:
    @hookimpl(wrapper=True)
    def rlhf_token_rewards(self) -> None:
        """A wrapper has to yield."""


@pytest.mark.parametrize(
    ("plugin", "wanted"),
    [
        (Wrong(), 'Wrong.rlhf_rewards: there is no such hook. Did you mean "rlhf_reward"? The hooks: rlhf_stages, '),
        (WrongArgument(), "WrongArgument.rlhf_reward(text): the hook has no argument 'text'. Did you mean \"texts\"?"),
        (WrongArgument(), "It has: rollout, prompts, texts, models"),
        (Unmarked(), "Unmarked.rlhf_reward would never be called: put @hookimpl before it"),
        (Idle(), "the plugin Idle answers no hook. Mark its methods with @hookimpl"),
        (NotAGenerator(), "NotAGenerator"),
        (Count, "Count is a class; give the engine an object: Count()"),
    ],
)
def test_a_plugin_that_would_do_nothing_or_something_else_is_refused(plugin: Any, wanted: str) -> None:
    assert wanted in refusal(plugin)


class Sloppy:
    """All of it in one plugin, and a right answer under another name, beside what must not be run to be looked at."""

    rlhf_reward = WrongArgument.rlhf_reward
    rlhf_rewards = Wrong.rlhf_rewards
    rlhf_token_rewards = NotAGenerator.rlhf_token_rewards

    @hookimpl(specname="rlhf_save")
    def keep(self, folder: Path) -> None: ...

    @hookimpl(specname="rlhf_lode")
    def bring_back(self, folder: Path) -> None: ...

    def rlhf_advantages(self) -> None: ...

    @property
    def trap(self) -> None:
        raise RuntimeError("looked at")


def test_all_faults_of_a_plugin_are_told_at_once() -> None:
    beginnings = {fault.partition(": ")[0].partition("(")[0] for fault in faults(Sloppy(), "sloppy")}
    assert beginnings == {
        "sloppy.rlhf_advantages would never be called",
        "sloppy.rlhf_reward",
        "sloppy.rlhf_rewards",
        "sloppy.bring_back",
        "sloppy",  # NotAGenerator's, in pluggy's words
    }
    assert list(faults(Count(), "count")) == []


def test_the_engine_refuses_all_this_at_construction() -> None:
    for plugin in (Wrong(), WrongArgument(), Unmarked(), Idle(), PPO()):
        with pytest.raises(PluginError, match=type(plugin).__name__):
            Engine([GRPO(), Count(), plugin], toy_models())


# ------------------------------------------------------------------- rule 4: the plugin is its own configuration


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (
            {"clp": 0.1},
            "[grpo]: unknown key 'clp'. Did you mean \"clip\"? Allowed: clip: float, clip_high: ",
        ),
        ({"clip": "wide"}, "[grpo]: clip = 'wide': Input should be a valid number"),
        ({"scale": "variance"}, "[grpo]: scale = 'variance': Input should be 'std' or 'none'"),
        ({"reduce": "constant"}, '[grpo]: reduce = "constant" and max_length (at least 1) go together'),
    ],
)
def test_options_are_checked_against_the_plugin(tmp_path: Path, table: dict[str, Any], wanted: str) -> None:
    file = read_run_file(run_file(tmp_path, grpo=table))
    with pytest.raises(ConfigError) as caught:
        load_plugins(file)
    assert wanted in str(caught.value)


# ---------------------------------------------------------------- rule 5: an algorithm is a plugin like anyone's


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo"])
def test_an_algorithm_is_advantages_and_a_loss(name: str) -> None:
    assert set(answers(load(name))) - {"rlhf_needs"} == {"rlhf_advantages", "rlhf_loss"}


# ------------------------------------------------------------------------------ rule 6: around-advice is a wrapper


def test_whitening_stands_outside_the_kl_penalty_in_whatever_order_they_are_named() -> None:
    assert "rlhf_token_rewards (wraps)" in answers(KLPenalty)
    for plugins in ([Whiten(), KLPenalty()], [KLPenalty(), Whiten()]):
        names = winners(manager(plugins))["rlhf_token_rewards"]
        assert names == ["Whiten (wraps)", "KLPenalty (wraps)", "engine defaults"]


# -------------------------------------------- rule 7: in another process a plugin is loaded again by its name


def test_another_process_loads_the_same_plugins_from_the_run_file(tmp_path: Path) -> None:
    path = run_file(tmp_path, Count={"letter": "c"})
    code = (
        "import sys; from pathlib import Path; from rlhf_engine.config import read_run_file\n"
        "from rlhf_engine.manager import load_plugins\n"
        "for name, plugin in load_plugins(read_run_file(Path(sys.argv[1]))).items(): print(name, vars(plugin))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    here = load_plugins(read_run_file(path))
    assert done.stdout.splitlines() == [f"{name} {vars(plugin)}" for name, plugin in here.items()], done.stderr


# ------------------------------------------------------------------- an exception names the plugin and the hook


class Fails:
    @hookimpl
    def rlhf_reward(self) -> Reward:
        return self.judge()

    def judge(self) -> Reward:
        raise KeyError("no such word")


@dataclass(eq=False)
class FailsIf:
    fails: bool

    @hookimpl
    def rlhf_needs(self) -> set[str]:
        if self.fails:
            raise RuntimeError("as asked")
        return set()


def decorated(function: Any) -> Any:
    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class FailsInDisguise:
    @hookimpl
    @torch.no_grad()
    @decorated
    def rlhf_lm_loss(self, output: Any, mask: Any) -> Loss:
        raise RuntimeError("as asked")


class DisguisedToo:
    @hookimpl
    @torch.no_grad()
    def rlhf_load(self, folder: Path) -> None:
        if str(folder) == type(self).__name__:
            raise RuntimeError("as asked")


class DisguisedAlike(DisguisedToo):
    @hookimpl
    @torch.no_grad()
    def rlhf_load(self, folder: Path) -> None:
        super().rlhf_load(folder)


class FailsLate:
    @hookimpl
    def rlhf_documents(self) -> Iterator[Document]:
        yield Document(text="a")
        raise OSError("the file is cut off")


class FailsAround:
    @hookimpl(wrapper=True)
    def rlhf_lm_loss(self) -> Generator[None, Loss, Loss]:
        yield
        raise RuntimeError("as asked")


class Answers:
    @hookimpl
    def rlhf_lm_loss(self) -> Loss:
        return Loss(value=torch.tensor(1.0))


class Passes:
    """A wrapper that an exception passes through: it is not to blame."""

    @hookimpl(wrapper=True, tryfirst=True)
    def rlhf_lm_loss(self) -> Generator[None, Loss, Loss]:
        return (yield)


class FailsAsAStage:
    @hookimpl
    def rlhf_stages(self) -> dict[str, Stage]:
        raise RuntimeError("as asked")


def notes(*plugins: Any, call: str, **arguments: Any) -> list[str]:
    with pytest.raises((KeyError, RuntimeError, OSError)) as caught:
        for _ in getattr(manager(plugins).hook, call)(**arguments):
            pass
    return [note.partition(" (")[0] for note in caught.value.__notes__]


LM_LOSS: dict[str, Any] = {"call": "rlhf_lm_loss", "output": None, "mask": None}
REWARD: dict[str, Any] = {"call": "rlhf_reward", "rollout": None, "prompts": [], "texts": [], "models": None}


def test_an_exception_names_plugin_hook_file_and_line() -> None:
    with pytest.raises(KeyError, match="no such word") as caught:
        manager([Fails()]).hook.rlhf_reward(rollout=None, prompts=[], texts=[], models=None)
    line = Fails.rlhf_reward.__code__.co_firstlineno + 2
    assert caught.value.__notes__ == [f"raised in Fails.rlhf_reward (test_manager.py, line {line})"]


def test_the_plugin_that_raised_is_named_and_no_other() -> None:
    assert notes(FailsIf(False), FailsIf(True), FailsIf(False), call="rlhf_needs") == ["raised in FailsIf 2.rlhf_needs"]
    assert notes(FailsInDisguise(), Passes(), **LM_LOSS) == ["raised in FailsInDisguise.rlhf_lm_loss"]
    for plugins in ([DisguisedToo(), DisguisedAlike()], [DisguisedAlike(), DisguisedToo()]):  # one decorator for both
        for name in ("DisguisedToo", "DisguisedAlike"):
            assert notes(*plugins, call="rlhf_load", folder=Path(name)) == [f"raised in {name}.rlhf_load"]
    assert notes(FailsAround(), Answers(), Passes(), **LM_LOSS) == ["raised in FailsAround.rlhf_lm_loss"]
    assert notes(Fails(), Count(), **REWARD) == ["raised in Fails.rlhf_reward"]


def test_a_generator_that_fails_while_it_is_read_is_named_too() -> None:
    assert notes(FailsLate(), call="rlhf_documents", run=None) == ["raised in FailsLate.rlhf_documents"]


def test_hooks_that_call_hooks_are_named_from_the_inside_out() -> None:
    made = manager([])

    class Outer:
        @hookimpl
        def rlhf_prompts(self) -> list[Any]:
            return list(made.hook.rlhf_documents(run=None))

    made = manager([Outer(), FailsLate()])
    with pytest.raises(OSError, match="cut off") as caught:
        made.hook.rlhf_prompts(run=None)
    places = [note.partition(" (")[0] for note in caught.value.__notes__]
    assert places == ["raised in FailsLate.rlhf_documents", "raised in Outer.rlhf_prompts"]


def test_in_a_run_plugins_bear_the_names_of_the_run_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        stages_of(manager({"mine": FailsAsAStage()}))
    assert "raised in mine.rlhf_stages" in caught.value.__notes__[0]


# -------------------------------------------------------------------------------------------------------- stages


class Brings:
    def __init__(self, *names: str) -> None:
        self.names = names

    @hookimpl
    def rlhf_stages(self) -> dict[str, Stage]:
        return {name: Stage(work=lambda run: run.folder) for name in self.names}


def test_stages_are_found_by_name_and_one_name_is_brought_once() -> None:
    assert set(stages_of(manager([Brings("sft", "dpo"), Brings("distil"), World()]))) == {"sft", "dpo", "distil"}
    with pytest.raises(PluginError, match=r"Brings 2 and Brings both bring a stage|Brings and Brings 2 both"):
        stages_of(manager([Brings("sft", "dpo"), Brings("dpo")]))
