"""The run file: TOML in, validated objects out.

    [run]                       # RunOptions, below
    folder = "runs/movies"
    stages = ["pretrain", "reward", "rl"]
    plugins = ["hf", "movie_reviews", "ppo", "my_package.rewards:Brevity"]

    [ppo]                       # one table a plugin: the fields of its dataclass
    clip = 0.2

Every stage and plugin that the run uses is named in `[run]`; nothing else is active. A table for something
that is not named, an unknown key, a wrong type and an unknown name are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

__all__ = [
    "ConfigError",
    "RunFile",
    "RunOptions",
    "build",
    "did_you_mean",
    "nearest",
    "read_run_file",
    "read_tables",
    "table_name",
    "validate",
]


class ConfigError(Exception):
    """The run file, or what it names, cannot be used as it stands. Raised before any work starts."""


def _once(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PydanticCustomError("twice", '"{name}" stands here twice; name it once', {"name": twice[0]})
    return names


class RunOptions(BaseModel):
    """The `[run]` table."""

    model_config = ConfigDict(extra="forbid", strict=True)

    folder: str = Field(min_length=1)
    """where everything that the run makes goes; the same command again resumes what stands there"""
    stages: Annotated[list[str], Field(min_length=1), AfterValidator(_once)]
    """in the order in which they run"""
    plugins: Annotated[list[str], AfterValidator(_once)] = []
    """entry-point names, or "package.module:Class" for one that is not installed as an entry point"""
    seed: int = Field(default=0, ge=0)
    threads: int = Field(default=0, ge=0)
    """CPU threads for torch; 0: torch's own choice. Part of the run: other counts may round otherwise"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFile:
    """A parsed run file: `[run]`, and the raw table of every plugin by the name the run gives it."""

    path: Path
    options: RunOptions
    tables: dict[str, dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Every stage and plugin that the run names, once each, in order."""
        return list(dict.fromkeys([*self.options.stages, *self.options.plugins]))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like this one, or ""."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean "ppo"?`, or nothing if no known name is near."""
    near = nearest(name, known)
    return f' Did you mean "{near}"?' if near else ""


def table_name(name: str) -> str:
    """The TOML table that configures a plugin: its entry-point name, or the class name of a dotted path."""
    return name.rpartition(":")[2]


def read_run_file(path: Path, overrides: Iterable[str] = ()) -> RunFile:
    """Parse a run file and the `table.key=value` overrides of the command line (values are TOML)."""
    tables = read_tables(path, overrides)
    options = validate(RunOptions, tables.pop("run", {}), where=f"{path}: [run]")
    return RunFile(path=path, options=options, tables=tables)


def read_tables(path: Path, overrides: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The tables of a run file, `[run]` among them, as they stand."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file. Examples stand in the folder examples/.") from None
    except OSError as error:
        raise ConfigError(f"{path}: this run file cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this is not valid TOML: {error}") from None
    not_tables = [key for key, value in tables.items() if not isinstance(value, dict)]
    if not_tables:
        raise ConfigError(f"{path}: the key {not_tables[0]!r} stands outside any table; did you mean [run]?")
    for override in overrides:
        _apply(tables, override)
    return tables


def _apply(tables: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    table, dot, name = key.strip().partition(".")
    if not (equals and dot and table and name):
        raise ConfigError(f"--set {override}: write it as table.key=value, for example --set ppo.clip=0.3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string: --set run.folder=runs/other
    tables.setdefault(table, {})[name] = parsed


def build(plugin: type, table: dict[str, Any], *, where: str) -> Any:
    """Make a plugin of its table: the fields of its dataclass are the keys that are allowed."""
    if not dataclasses.is_dataclass(plugin):
        if table:
            raise ConfigError(f"{where}: {plugin.__name__} has no options (it is not a dataclass)")
        return plugin()
    hints = get_type_hints(plugin, include_extras=True)
    allowed: dict[str, Any] = {}
    for option in dataclasses.fields(plugin):
        if option.init:
            required = option.default is option.default_factory is dataclasses.MISSING
            allowed[option.name] = (hints[option.name], ... if required else None)
    model = create_model(plugin.__name__, __config__=ConfigDict(extra="forbid", strict=True), **allowed)
    values = validate(model, table, where=where)
    given = {name: getattr(values, name) for name in values.model_fields_set}
    try:
        return plugin(**given)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def validate(model: type[BaseModel], table: dict[str, Any], *, where: str) -> Any:
    """Validate a table; on a fault say which key, what stood there, and what is allowed."""
    try:
        # As JSON, because there pydantic takes a list for a tuple and a string for a path, and is strict otherwise.
        return model.model_validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        faults = []
        hints = get_type_hints(model)  # without the constraints, which only the faults speak of
        known = {name: inspect.formatannotation(hints[name]) for name in model.model_fields}
        for fault in error.errors():
            key = ".".join(str(part) for part in fault["loc"])
            if fault["type"] == "extra_forbidden":
                allowed = ", ".join(f"{name}: {kind}" for name, kind in known.items()) or "no options"
                faults.append(f"unknown key {key!r}.{did_you_mean(key, known)} Allowed: {allowed}")
            elif fault["type"] == "missing":
                faults.append(f"the key {key!r} is missing ({known.get(key, '')})")
            else:
                faults.append(f"{key} = {fault['input']!r}: {fault['msg']}")
        raise ConfigError(f"{where}: " + "; ".join(faults)) from None
