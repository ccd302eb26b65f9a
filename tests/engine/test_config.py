"""A run file becomes validated objects, or one error that names the file, the table, the key and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from rlhf_engine.config import ConfigError, build, did_you_mean, read_run_file, table_name

SOUND = """
[run]
folder = "runs/x"
stages = ["rl"]
plugins = ["ppo", "my_package.rewards:Brevity"]

[ppo]
clip = 0.3
"""


def read(folder: Path, text: str, *overrides: str) -> Any:
    path = folder / "run.toml"
    path.write_text(text)
    return read_run_file(path, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------ the run file


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    file = read(tmp_path, SOUND)
    assert file.options.model_dump() == {
        "folder": "runs/x",
        "stages": ["rl"],
        "plugins": ["ppo", "my_package.rewards:Brevity"],
        "seed": 0,
        "threads": 0,
    }
    assert file.tables == {"ppo": {"clip": 0.3}}
    assert file.names == ["rl", "ppo", "my_package.rewards:Brevity"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[run", "not valid TOML"),
        ('[run]\nfolder = "x"\nstages = ["rl"]\nstages = ["rl"]', "not valid TOML"),
        ("seed = 1\n" + SOUND, "'seed' stands outside any table; did you mean [run]?"),
        ("", "[run]: the key 'folder' is missing (str); the key 'stages' is missing (list[str])"),
        (
            SOUND.replace("folder", "folde"),
            "unknown key 'folde'. Did you mean \"folder\"? Allowed: folder: str, stages:",
        ),
        (SOUND.replace('"runs/x"', '""'), "folder = '': String should have at least 1 character"),
        (SOUND.replace('["rl"]', "[]"), "stages = []: List should have at least 1 item"),
        (SOUND.replace('["rl"]', '"rl"'), "stages = 'rl': Input should be a valid array"),
        (SOUND.replace('["rl"]', "[3]"), "stages.0 = 3: Input should be a valid string"),
        (SOUND.replace("Brevity", 'Brevity", "ppo'), "'ppo']: \"ppo\" stands here twice; name it once"),
        (SOUND.replace('["rl"]', '["rl", "rl"]'), "stages = ['rl', 'rl']: \"rl\" stands here twice; name it once"),
        (SOUND.replace("[ppo]", "seed = -1\n[ppo]"), "seed = -1: Input should be greater than or equal to 0"),
        (SOUND.replace("[ppo]", "seed = 1.5\n[ppo]"), "seed = 1.5: Input should be a valid integer"),
        (SOUND.replace("[ppo]", "seed = true\n[ppo]"), "seed = True: Input should be a valid integer"),
    ],
)
def test_an_unusable_file_is_refused_by_name(tmp_path: Path, text: str, wanted: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(str(tmp_path / "run.toml"))
    assert wanted in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such run file"):
        read_run_file(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_run_file(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[run]\nfolder = "\xe9"')
    with pytest.raises(ConfigError, match="not valid TOML: 'utf-8' codec"):
        read_run_file(tmp_path / "latin.toml")


# ------------------------------------------------------------------------------------------ the command line's say


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("ppo.clip=0.5", "ppo", "clip", 0.5),
        ("ppo.clip = 0.5", "ppo", "clip", 0.5),
        ("rl.steps=3", "rl", "steps", 3),
        ("hf.policy=runs/other", "hf", "policy", "runs/other"),
        ('hf.policy="a=b"', "hf", "policy", "a=b"),
        ("x.flag=true", "x", "flag", True),
        ("x.sizes=[1, 2]", "x", "sizes", [1, 2]),
    ],
)
def test_an_override_is_toml_and_a_bare_word_a_string(
    tmp_path: Path, override: str, table: str, key: str, value: Any
) -> None:
    assert read(tmp_path, SOUND, override).tables[table][key] == value


def test_an_override_reaches_the_run_table_and_the_last_one_counts(tmp_path: Path) -> None:
    options = read(tmp_path, SOUND, "run.seed=1", "run.folder=elsewhere", 'run.stages=["report"]', "run.seed=2").options
    assert (options.seed, options.folder, options.stages) == (2, "elsewhere", ["report"])


@pytest.mark.parametrize("override", ["clip=0.3", "ppo.clip", "ppo.=3", ".clip=3", "=", ""])
def test_an_override_without_table_key_or_value_is_refused(tmp_path: Path, override: str) -> None:
    assert "write it as table.key=value, for example --set ppo.clip=0.3" in refusal(tmp_path, SOUND, override)


# -------------------------------------------------------------------------------------------- plugins from tables


@dataclass(eq=False)
class Options:
    """One of everything that an option can be."""

    count: Annotated[int, Field(ge=1)] = 3
    rate: float = 0.1
    bound: float | None = None
    mode: Literal["fast", "slow"] = "fast"
    flag: bool = False
    path: Path = Path("here")
    betas: tuple[float, float] = (0.9, 0.95)
    names: list[str] = field(default_factory=list)
    made: int = field(default=0, init=False)


@dataclass(eq=False)
class Needy:
    weight: float


@dataclass(eq=False)
class Particular:
    even: int = 2

    def __post_init__(self) -> None:
        if self.even % 2:
            raise ValueError(f"even = {self.even} is odd")


class Plain:
    """A plugin without options."""


def built(plugin: type, **table: Any) -> Any:
    return build(plugin, table, where="run.toml: [p]")


def test_a_table_becomes_the_plugins_fields() -> None:
    made = built(Options, count=5, rate=1, bound=2.5, mode="slow", flag=True, path="/x", betas=[0, 1], names=["a"])
    assert vars(made) == {
        "count": 5,
        "rate": 1.0,
        "bound": 2.5,
        "mode": "slow",
        "flag": True,
        "path": Path("/x"),
        "betas": (0.0, 1.0),
        "names": ["a"],
    }
    assert made.made == 0 and type(made.rate) is float


def test_what_a_table_leaves_out_keeps_the_plugins_own_default() -> None:
    made = built(Options)
    assert vars(made) == vars(Options())
    assert made.names is not built(Options).names


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (
            {"rat": 1.0},
            "unknown key 'rat'. Did you mean \"rate\"? Allowed: count: int, rate: float, bound: float | None",
        ),
        ({"zzz": 1}, "unknown key 'zzz'. Allowed: count: int"),
        ({"made": 1}, "unknown key 'made'"),
        ({"rate": "0.1"}, "rate = '0.1': Input should be a valid number"),
        ({"rate": True}, "rate = True: Input should be a valid number"),
        ({"count": 2.0}, "count = 2.0: Input should be a valid integer"),
        ({"count": "2"}, "count = '2': Input should be a valid integer"),
        ({"count": 0}, "count = 0: Input should be greater than or equal to 1"),
        ({"flag": 1}, "flag = 1: Input should be a valid boolean"),
        ({"bound": "none"}, "bound = 'none': Input should be a valid number"),
        ({"mode": "quick"}, "mode = 'quick': Input should be 'fast' or 'slow'"),
        ({"betas": [0.9]}, "betas.1"),
        ({"names": ["a", 1]}, "names.1 = 1: Input should be a valid string"),
        ({"rate": {"x": 1}}, "rate = {'x': 1}: Input should be a valid number"),
    ],
)
def test_a_wrong_key_or_type_is_refused_with_what_is_allowed(table: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(Options, **table)
    assert str(caught.value).startswith("run.toml: [p]: ")
    assert wanted in str(caught.value)


def test_all_faults_of_a_table_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"rate = 'x'.*; unknown key 'zzz'"):
        built(Options, rate="x", zzz=1)


def test_a_required_option_and_a_plugins_own_check_speak_for_themselves() -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: \[p\]: the key 'weight' is missing \(float\)"):
        built(Needy)
    with pytest.raises(ConfigError, match=r"run\.toml: \[p\]: even = 3 is odd"):
        built(Particular, even=3)


def test_a_plugin_without_options_takes_none() -> None:
    assert isinstance(built(Plain), Plain)
    with pytest.raises(ConfigError, match=r"Plain has no options \(it is not a dataclass\)"):
        built(Plain, weight=1)


def test_names() -> None:
    assert table_name("ppo") == "ppo"
    assert table_name("my_package.rewards:Brevity") == "Brevity"
    assert did_you_mean("plugin", ["plugins", "folder"]) == ' Did you mean "plugins"?'
    assert did_you_mean("xyz", ["plugins", "folder"]) == ""
