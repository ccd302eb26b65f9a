"""`rlhf plugins doctor FILE`: everything that is wrong with the plugins of a run, in one go, and what to do about it.

A run stops at the first fault; here nothing is run, a plugin that is broken does not keep the others from being
looked at, and what only follows from a fault is not told as another.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_engine.config import ConfigError, RunFile, RunOptions, nearest, read_tables, table_name, validate
from rlhf_engine.engine import needs, refuse_single_samples
from rlhf_engine.hookspecs import Stage
from rlhf_engine.manager import (
    HOOKS,
    PluginError,
    answers,
    conflicts,
    distribution,
    faults,
    implementations,
    installed,
    load,
    make,
    register,
    require,
    stages,
    unknown_stage,
    unused_tables,
    winners,
)
from rlhf_engine.rewards import FunctionReward, RewardOptions, Rewards

__all__ = ["Report", "examine", "installed_table"]

BROKEN = (Exception, SystemExit)  # whatever a foreign module does


@dataclass
class Named:
    """A plugin that the run names, as far as it could be loaded."""

    name: str
    package: str = ""
    """its distribution and version, here and now"""
    began_with: str = ""
    """the same when the run's folder was begun, if it was"""
    plugin: Any = None
    """the object, made with the options of its table"""
    bare: bool = False
    """its options are at fault: the object has none, and none of its methods may be called"""
    usable: dict[str, Any] = field(default_factory=dict)
    """its sound hook methods by attribute"""
    meant: set[str] = field(default_factory=set)
    """the hooks that its other ones mean to answer"""

    @property
    def changed(self) -> str:
        """What became of its package since the run began, or ""."""
        if not self.began_with or self.began_with == self.package:
            return ""
        name, _, version = self.began_with.rpartition(" ")
        return (
            f"The run's folder was begun with {self.began_with}, and here is {self.package or 'none'}: "
            f"pip install '{name}=={version}' brings that back."
        )


@dataclass
class Report:
    """What `examine` found."""

    path: Path
    named: list[Named] = field(default_factory=list)
    hooks: list[tuple[str, str, str]] = field(default_factory=list)
    """hook, who answers it, which stages need it"""
    rewards: list[tuple[str, str]] = field(default_factory=list)
    """plugin, weight"""
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def tables(self) -> Iterator[RenderableType]:
        """The report, for a terminal."""
        with suppress(PluginError):  # it stands among the faults
            yield installed_table()
        if self.named:
            table = Table("plugin", "from", "answers", title=Text(f"named by {self.path}"))
            for one in self.named:
                origin = one.package + (f" (the run began with {one.began_with})" if one.changed else "")
                hooks = ", ".join(answers(type(one.plugin)) or answers(one.plugin)) if one.plugin is not None else "-"
                table.add_row(*map(Text, (one.name, origin, hooks)))
            yield table
        if self.hooks:
            table = Table("hook", "answered by", "needed by", title="who answers each hook of this run")
            for row in self.hooks:
                table.add_row(*map(Text, row))
            yield table
        if self.rewards:
            table = Table("reward", "weight", title="rewards")
            for reward in self.rewards:
                table.add_row(*map(Text, reward))
            yield table
        yield from (Text(remark) for remark in self.remarks)
        yield from (Text(f"{number}. {fault}") for number, fault in enumerate(self.faults, start=1))
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}" if self.faults else "well"
        yield Text(f"{self.path}: {count}")


def installed_table() -> Table:
    """Every installed plugin: its package, and what it answers or why it does not load."""
    table = Table("plugin", "from", "answers", title="installed plugins (a run uses only those it names)")
    for name in sorted(installed()):
        try:
            hooks = ", ".join(answers(load(name)))
        except BROKEN as error:
            cause = error.__cause__ or error
            hooks = f"does not load: {type(cause).__name__}: {cause}"
        table.add_row(*map(Text, (name, distribution(name), hooks)))
    return table


def examine(path: Path, overrides: Iterable[str] = ()) -> Report:
    """Look at everything that a run file names, without running anything."""
    report = Report(path)
    try:
        known = installed()
        file = _run_file(report, read_tables(path, overrides))
    except ConfigError as error:  # without the file or the list of plugins there is nothing to look at
        report.faults.append(str(error))
        return report
    _versions(report, file)
    report.faults += _tables(file, known)
    sound = {one.name: one for one in report.named if one.plugin is not None}
    made = register({name: _sound_part(one) for name, one in sound.items()})
    report.faults += conflicts(made)
    found = _stages(report, file, sound)
    _hooks(report, made, {name: stage for name, stage in found.items() if name in file.options.stages})
    _rewards(report, made, found.keys() & set(file.options.stages))
    whole = {name: one for name, one in sound.items() if not one.bare}
    if "rl" in sound:  # also where their values are at fault, the names may be
        _reward_options(report, made, file.tables.get("rl", {}).get("rewards", {}))
    _needs(report, whole)
    return report


# ------------------------------------------------------------------------------------------- the file and its names


def _run_file(report: Report, tables: dict[str, dict[str, Any]]) -> RunFile:
    """The run file, with whatever of `[run]` can be used if not all can."""
    raw = tables.pop("run", {})
    try:
        options = validate(RunOptions, raw, where=f"{report.path}: [run]")
    except ConfigError as error:
        report.faults.append(str(error))
        options = RunOptions.model_construct(
            folder=str(raw.get("folder", "")), stages=_names(raw.get("stages")), plugins=_names(raw.get("plugins"))
        )
    file = RunFile(path=report.path, options=options, tables=tables)
    began_with = _begun(file).get("plugins", {})
    for name in file.names:
        if name in installed() or name in options.plugins:  # else a stage that another plugin may bring
            report.named.append(_look_at(report, file, Named(name, began_with=began_with.get(name, ""))))
    return file


def _names(value: Any) -> list[str]:
    found = value if isinstance(value, list) else []
    return list(dict.fromkeys(name for name in found if isinstance(name, str)))


def _look_at(report: Report, file: RunFile, one: Named) -> Named:
    try:
        one.package = distribution(one.name)
        plugin = load(one.name)
    except BROKEN as error:
        report.faults.append(" ".join(filter(None, (str(error), one.changed))))
        return one
    where = f"{file.path}: [{table_name(one.name)}]"
    try:
        one.plugin = make(plugin, file.tables.get(table_name(one.name), {}), where=where)
    except ConfigError as error:
        report.faults.append(str(error))
    except BROKEN as error:
        text = f"{where}: {one.name} cannot be made with these options: {type(error).__name__}: {error}"
        report.faults.append(" ".join(filter(None, (text, one.changed))))
    try:
        if one.plugin is None:
            one.plugin, one.bare = object.__new__(plugin) if isinstance(plugin, type) else plugin, True
        report.faults += [" ".join(filter(None, (fault, one.changed))) for fault in faults(one.plugin, one.name)]
        for attribute, hook, fault in implementations(one.plugin, one.name):
            if fault:
                one.meant.add(hook if hook in HOOKS else nearest(hook, HOOKS))
            else:
                one.usable[attribute] = getattr(one.plugin, attribute)
    except BROKEN as error:
        report.faults.append(f"{one.name} cannot be looked at: {type(error).__name__}: {error}. {one.changed}".strip())
        one.plugin = None
    return one


def _sound_part(one: Named) -> Any:
    if isinstance(one.plugin, FunctionReward) and one.usable:
        return one.plugin  # it is asked with what its function names, not with what the hook has
    return SimpleNamespace(**one.usable, weight=getattr(one.plugin, "weight", None))


def _tables(file: RunFile, known: Iterable[str]) -> Iterator[str]:
    """The tables of no plugin; one whose plugin is misspelt in `[run]` is a fault of that name alone."""
    meant = {nearest(name, known) for name in file.names if name not in known and ":" not in name}
    kept = {table: content for table, content in file.tables.items() if table not in meant}
    return unused_tables(RunFile(path=file.path, options=file.options, tables=kept), known)


def _begun(file: RunFile) -> dict[str, Any]:
    """The versions that the run's folder was begun with."""
    try:
        return json.loads((Path(file.options.folder) / "run.json").read_text("utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _versions(report: Report, file: RunFile) -> None:
    begun = _begun(file)
    for name, now in (("python", platform.python_version()), ("torch", torch.__version__)):
        if begun.get(name, now) != now:
            report.remarks.append(f"{file.options.folder} was begun with {name} {begun[name]}; here is {now}.")
    report.remarks += [f"{one.name}: {one.changed}" for one in report.named if one.changed]


# ------------------------------------------------------------------------------------- the plugins beside each other


def _stages(report: Report, file: RunFile, sound: dict[str, Named]) -> dict[str, Stage]:
    """The stages that the plugins bring, by name."""
    found: dict[str, Stage] = {}
    unsure = {one.name for one in report.named if one.plugin is None}
    for name, one in sound.items():
        try:
            brought = stages(register({name: _sound_part(one)}))
        except BROKEN as error:
            unsure.add(name)
            if not one.bare:
                report.faults.append(
                    f"{name}.rlhf_stages raised {type(error).__name__}: {error}. {one.changed}".strip()
                )
            continue
        for stage in brought.keys() & found.keys():
            report.faults.append(f'{name} and another plugin both bring a stage named "{stage}": name only one of them')
        found |= brought
    for stage in file.options.stages:
        if stage not in found and stage not in unsure:
            report.faults.append(f"{file.path}: {unknown_stage(stage, found)}")
    return found


def _hooks(report: Report, made: pluggy.PluginManager, run_stages: dict[str, Stage]) -> None:
    meant = {hook for one in report.named for hook in one.meant}
    lost = [one.name for one in report.named if one.plugin is None]
    perhaps = f". Or one that could not be loaded: {', '.join(lost)}" if lost else ""
    for name, stage in run_stages.items():
        for hook in stage.requires:
            try:
                require(made, [hook], by=f"the stage {name}")
            except PluginError as error:
                if hook not in meant:
                    report.faults.append(f"{error}{perhaps}")
    rivals = {fault.partition(" ")[0]: fault for fault in conflicts(made)}
    for hook, names in winners(made).items():
        wrappers = [name.removesuffix(" (wraps)") for name in names if name.endswith(" (wraps)")]
        inner = ", ".join(names[len(wrappers) :]) or "-"
        if hook in rivals:
            inner = rivals[hook].partition(", and ")[2].partition(" both answer")[0] + " (conflict)"
        needed = ", ".join(name for name, stage in run_stages.items() if hook in stage.requires)
        if wrappers or inner != "-" or needed:
            report.hooks.append((hook, " around ".join([*wrappers, inner]), needed))


def _rewards(report: Report, made: pluggy.PluginManager, run_stages: set[str]) -> None:
    weights = {}
    for impl in made.hook.rlhf_reward.get_hookimpls():
        if not (impl.wrapper or impl.hookwrapper):
            weights[impl.plugin_name] = getattr(impl.plugin, "weight", None)
    for name, weight in weights.items():
        told = "as each answer says" if weight is None else "0: a metric only" if weight == 0 else str(weight)
        report.rewards.append((name, told))
    if "rl" in run_stages and weights and not any(weight is None or weight for weight in weights.values()):
        names = ", ".join(weights)
        report.faults.append(
            f"no reward has a weight other than 0 ({names}): give one a weight, or nothing is optimised"
        )


def _reward_options(report: Report, made: pluggy.PluginManager, tables: Any) -> None:
    for name, table in (tables if isinstance(tables, dict) else {}).items():
        try:
            Rewards(made.hook.rlhf_reward, {name: _options(table)})
        except ConfigError as error:
            report.faults.append(f"{report.path}: [rl.rewards.{name}]: {error}")


def _options(table: Any) -> RewardOptions:
    with suppress(TypeError, ValueError):
        return RewardOptions(**table)
    return RewardOptions()  # the fault of its values stands in the report already


def _needs(report: Report, sound: dict[str, Named]) -> None:
    """That what the plugins need of the engine exists, and groups where they are needed."""
    samples = getattr(sound["rl"].plugin, "samples_per_prompt", 2) if "rl" in sound else 2
    for name, one in sound.items():
        made = register({name: _sound_part(one)})
        try:
            needs(made)
            refuse_single_samples(made, samples)
        except PluginError as error:
            report.faults.append(str(error))
        except BROKEN as error:
            report.faults.append(f"{name}.rlhf_needs raised {type(error).__name__}: {error}. {one.changed}".strip())
