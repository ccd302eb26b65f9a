"""Load the plugins that a run names, and refuse what would otherwise go wrong in silence.

One manager per run, no global one. Refused at load: a name that is not installed, two plugins that answer one
one-answer hook, a misspelt hook or argument, a method that lacks its mark, an object that answers nothing, a
stage that two plugins bring. While the run goes on, an exception in a hook gets a note with the names of the
plugin and the hook.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points, packages_distributions
from importlib.metadata import distribution as package
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from types import ModuleType, SimpleNamespace
from typing import Any

import pluggy

from rlhf_engine import hookspecs
from rlhf_engine.config import ConfigError, RunFile, build, did_you_mean, table_name
from rlhf_engine.defaults import Defaults
from rlhf_engine.hookspecs import Stage
from rlhf_engine.rewards import FunctionReward

__all__ = [
    "PluginError",
    "answers",
    "candidates",
    "conflicts",
    "distribution",
    "faults",
    "implementations",
    "installed",
    "load",
    "load_plugins",
    "make",
    "manager",
    "register",
    "replaced",
    "require",
    "stages",
    "unknown_stage",
    "unused_tables",
    "winners",
]

GROUP = "rlhf_engine"
HOOKS = [name for name in vars(hookspecs) if name.startswith("rlhf_")]


class PluginError(ConfigError):
    """Plugins that cannot work together, or one that is wrong in itself."""


def installed() -> dict[str, EntryPoint]:
    """The plugins that are installed, by entry-point name. Installed is not active: a run must name them."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise PluginError(
                f'two installed packages bring a plugin named "{entry.name}": {_origin(other)} and '
                f"{_origin(entry)}. Uninstall one, or name the class by its path, as {entry.value!r}."
            )
        found[entry.name] = entry
    return found


def _origin(entry: EntryPoint) -> str:
    return f"{entry.value} ({entry.dist.name} {entry.dist.version})" if entry.dist else entry.value


def distribution(name: str) -> str:
    """The installed package that brings a plugin, with its version: "rlhf-engine 0.1.0"; "" for a loose module."""
    entry = installed().get(name)
    if entry is not None:
        return f"{entry.dist.name} {entry.dist.version}" if entry.dist else ""
    module = name.partition(":")[0].partition(".")[0]
    packages = _packages_by_module().get(module, ())
    spec = find_spec(module) if packages else None
    if spec is not None and spec.origin is not None:
        for found in map(package, packages):
            # A module of that name that lies elsewhere, such as the folder tests/ of a project, is not the package's.
            if Path(spec.origin).is_relative_to(str(found.locate_file(""))):
                return f"{found.name} {found.version}"
    return ""


@cache
def _packages_by_module() -> Mapping[str, list[str]]:
    return packages_distributions()


def load(name: str) -> type | FunctionReward:
    """The plugin class of an entry-point name or a "package.module:Class" path; of a function, the reward it is."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        return _loaded(lambda: getattr(importlib.import_module(module), attribute), f'"{name}"')
    known = installed()
    if name not in known:
        raise PluginError(
            f'no plugin named "{name}" is installed.{did_you_mean(name, known)} Installed: '
            f"{', '.join(sorted(known))}. One that is not an entry point is named as package.module:Class."
        )
    return _loaded(known[name].load, f'"{name}" ({_origin(known[name])})')


def _loaded(find: Callable[[], Any], which: str) -> type | FunctionReward:
    try:
        plugin = find()
        if inspect.isfunction(plugin):
            plugin = FunctionReward(plugin)
    except (Exception, SystemExit) as error:  # whatever a foreign module does while it is imported
        text = f"the plugin {which} cannot be loaded: {type(error).__name__}: {error}{_hidden_by(error)}"
        raise PluginError(text) from error
    if not isinstance(plugin, type | FunctionReward):
        raise PluginError(f"the plugin {which} is a {type(plugin).__name__}; it must be a class, or a reward function")
    return plugin


def _hidden_by(error: BaseException) -> str:
    """Whether a mere folder was imported in a module's place: that of the module's own package, say."""
    module = error.obj if isinstance(error, AttributeError) else None
    if not isinstance(module, ModuleType) or getattr(module, "__file__", None) or not hasattr(module, "__path__"):
        return ""
    folder = next(iter(module.__path__), module.__name__)
    return f". What was imported is the folder {folder}, which hides the module: rename it, or start elsewhere"


@dataclass
class _FunctionOptions:
    weight: float | None = None


def make(plugin: type | FunctionReward, table: dict[str, Any], *, where: str) -> Any:
    """A plugin with the options of its table (of a reward function: `weight`)."""
    if isinstance(plugin, type):
        return build(plugin, table, where=where)
    weight = build(_FunctionOptions, table, where=where).weight
    return plugin if weight is None else plugin.weighted(weight)


def load_plugins(file: RunFile) -> dict[str, Any]:
    """Make every plugin that a run file names, by name, with the options of its table.

    A stage is a plugin of the same name, unless a plugin of another name brings it.
    """
    known = installed()
    plugins = {name: load(name) for name in file.names if name in known or name in file.options.plugins}
    for fault in unused_tables(file, known):
        raise ConfigError(fault)
    return {
        name: make(plugin, file.tables.get(table_name(name), {}), where=f"{file.path}: [{table_name(name)}]")
        for name, plugin in plugins.items()
    }


def unused_tables(file: RunFile, known: Iterable[str]) -> Iterator[str]:
    """What is wrong with the tables that belong to no plugin of the run; `known` are the installed plugins."""
    tables = [table_name(name) for name in file.names if name in known or name in file.options.plugins]
    # A plugin of another name may bring such a stage; but if its name is misspelt, that is why its table is left over.
    strange = "".join(
        f' The stage "{stage}" is no installed plugin.{did_you_mean(stage, known)}'
        for stage in file.options.stages
        if stage not in known and stage not in file.options.plugins
    )
    for table in file.tables:
        if table in tables:
            continue
        if table in known:
            yield (
                f'{file.path}: the table [{table}] is of the plugin "{table}", which [run] names neither in stages nor '
                f"in plugins: name it there, or take the table out.{strange}"
            )
        else:
            yield (
                f"{file.path}: the table [{table}] is for no plugin that [run] names "
                f"({', '.join(sorted(tables))}).{did_you_mean(table, tables)}{strange}"
            )


def manager(plugins: Iterable[Any] | Mapping[str, Any]) -> pluggy.PluginManager:
    """A plugin manager with exactly these plugins (objects, or objects by name) and the engine's defaults, checked."""
    named: dict[str, Any] = {}
    given = plugins.items() if isinstance(plugins, Mapping) else ((None, plugin) for plugin in plugins)
    for label, plugin in given:
        name = label or _name(named, plugin)
        for fault in faults(plugin, name):
            raise PluginError(fault)
        named[name] = plugin
    made = register(named)
    for fault in conflicts(made):
        raise PluginError(fault)
    _watch(made)
    return made


def register(plugins: Mapping[str, Any]) -> pluggy.PluginManager:
    """A plugin manager with these plugins and the engine's defaults; each must be without `faults` of its own."""
    made = _empty()
    for name, plugin in plugins.items():
        made.register(plugin, name=name)
    defaults = Defaults()
    for hook in HOOKS:
        if _answering(getattr(made.hook, hook)):
            # It gives way altogether: pluggy would ask it, in silence, wherever the plugin answers None.
            setattr(defaults, hook, None)
    made.register(defaults, name="engine defaults")
    return made


def _empty() -> pluggy.PluginManager:
    made = pluggy.PluginManager(GROUP)
    made.add_hookspecs(hookspecs)
    return made


def _name(taken: Mapping[str, Any], plugin: Any) -> str:
    """The class's (or reward function's) name, numbered where a run has several of one."""
    if isinstance(plugin, type):
        raise PluginError(f"{plugin.__name__} is a class; give the engine an object: {plugin.__name__}()")
    kind = plugin.name if isinstance(plugin, FunctionReward) else type(plugin).__name__
    name, count = kind, 2
    while name in taken:
        name, count = f"{kind} {count}", count + 1
    return name


def faults(plugin: Any, name: str) -> Iterator[str]:
    """What is wrong with a plugin in itself: a method without its mark, a misspelt hook or argument, no answer at all.

    `name` is what the messages call it.
    """
    found = list(implementations(plugin, name))
    marked = {attribute for attribute, _, _ in found}
    for attribute in dir(plugin):
        if attribute.startswith("rlhf_") and attribute not in marked and inspect.isroutine(getattr(plugin, attribute)):
            yield f"{name}.{attribute} would never be called: put @hookimpl before it, or rename it"
    yield from (fault for _, _, fault in found if fault)
    if not found:
        yield (
            f"the plugin {name} answers no hook. Mark its methods with @hookimpl and name them like a hook: "
            f"{', '.join(HOOKS)}"
        )


def implementations(plugin: Any, name: str) -> Iterator[tuple[str, str, str]]:
    """The marked methods of a plugin: attribute, the hook it answers, and what is wrong with it or ""."""
    bare = _empty()
    for attribute in dir(plugin):
        options = bare.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            continue
        hook = options.get("specname") or attribute
        fault = ""
        if hook not in HOOKS:
            fault = (
                f"{name}.{attribute}: there is no such hook.{did_you_mean(hook, HOOKS)} The hooks: {', '.join(HOOKS)}"
            )
        else:
            method = getattr(plugin, attribute)
            try:
                bare.register(SimpleNamespace(**{attribute: method}))
            except pluggy.PluginValidationError as error:
                fault = _misspelt_argument(method, hook, name) or f"{name}: {error}"
        yield attribute, hook, fault


def _misspelt_argument(method: Callable[..., Any], hook: str, name: str) -> str:
    wanted = list(inspect.signature(method).parameters)
    offered = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    for argument in wanted:
        if argument not in offered:
            return (
                f"{name}.{hook}({', '.join(wanted)}): the hook has no argument {argument!r}."
                f"{did_you_mean(argument, offered)} It has: {', '.join(offered)}"
            )
    return ""


def _plain(caller: pluggy.HookCaller) -> list[Any]:
    """The implementations that answer on their own: neither wrappers nor the engine's own last resort."""
    return [i for i in caller.get_hookimpls() if not (i.wrapper or i.hookwrapper or i.trylast)]


def conflicts(made: pluggy.PluginManager) -> Iterator[str]:
    """The one-answer hooks that two plugins answer, each as a sentence."""
    for hook in HOOKS:
        caller = getattr(made.hook, hook)
        names = [impl.plugin_name for impl in _plain(caller)]
        if caller.spec.opts["firstresult"] and len(names) > 1:
            yield (
                f"{hook} takes one answer, and {' and '.join(names)} both answer it. Name only one of them in "
                f"this run; to change what another plugin answers, write a wrapper (@hookimpl(wrapper=True))."
            )


def stages(made: pluggy.PluginManager) -> dict[str, Stage]:
    """The stages that the plugins bring, by name."""
    found: dict[str, tuple[str, Stage]] = {}
    for impl in made.hook.rlhf_stages.get_hookimpls():
        try:
            brought: dict[str, Stage] = impl.function()  # type: ignore[assignment]
        except Exception as error:
            _name_the_place(error, "rlhf_stages", [impl])
            raise
        for name, stage in brought.items():
            if name in found:
                raise PluginError(f'{found[name][0]} and {impl.plugin_name} both bring a stage named "{name}"')
            found[name] = (impl.plugin_name, stage)
    return {name: stage for name, (_, stage) in found.items()}


def unknown_stage(name: str, found: Iterable[str]) -> str:
    """What to say of a stage of the run that none of its plugins brings; `found` are those that they bring."""
    known = sorted({*found, *candidates("rlhf_stages")})
    return (
        f'no plugin of this run brings a stage named "{name}".{did_you_mean(name, known)} '
        f"Known stages: {', '.join(known)}. The plugin that brings another one must stand in [run] plugins."
    )


def require(made: pluggy.PluginManager, hooks: Sequence[str], *, by: str) -> None:
    """Refuse if nobody answers one of these hooks, and name the installed plugins that could."""
    for hook in hooks:
        if hook not in HOOKS:
            raise PluginError(f"{by} needs {hook}, which is no hook.{did_you_mean(hook, HOOKS)}")
        if not _answering(getattr(made.hook, hook)):
            could = ", ".join(candidates(hook)) or "none that is installed"
            raise PluginError(f"{by} needs an answer to {hook}, and no plugin of this run gives one. Could: {could}")


def _answering(caller: pluggy.HookCaller) -> list[Any]:
    return [i for i in caller.get_hookimpls() if not (i.wrapper or i.hookwrapper)]


def candidates(hook: str) -> list[str]:
    """The installed plugins that answer a hook and do not only wrap it. One that does not import here is left out."""
    found = []
    for name in installed():
        try:
            plugin = load(name)
        except PluginError:
            continue
        if hook in answers(plugin):
            found.append(name)
    return sorted(found)


def answers(plugin: Any) -> list[str]:
    """The hooks that a plugin class answers, with the way it does."""
    found = []
    for name in HOOKS:
        options = getattr(getattr(plugin, name, None), "rlhf_engine_impl", None)
        if options is not None:
            found.append(f"{name} (wraps)" if options["wrapper"] or options["hookwrapper"] else name)
    return found


def winners(made: pluggy.PluginManager) -> dict[str, list[str]]:
    """Who answers each hook of this run, in the order in which they are called; wrappers are marked."""
    result: dict[str, list[str]] = {}
    for hook in HOOKS:
        caller = getattr(made.hook, hook)
        called = list(reversed(caller.get_hookimpls()))
        wrappers = [f"{i.plugin_name} (wraps)" for i in called if i.wrapper or i.hookwrapper]
        plain = [i.plugin_name for i in called if not (i.wrapper or i.hookwrapper)]
        result[hook] = [*wrappers, *(plain[:1] if caller.spec.opts["firstresult"] else plain)]
    return result


def replaced(made: pluggy.PluginManager, hook: str, answers: Mapping[str, Callable[..., Any]]) -> pluggy.HookCaller:
    """A hook of the run with other implementations: these, by plugin, and its wrappers as they are around them."""
    other = pluggy.PluginManager(GROUP)
    other.add_hookspecs(hookspecs)
    implementations = getattr(made.hook, hook).get_hookimpls()
    for impl in implementations:
        answer = impl.function
        if impl.plugin_name in answers:
            answer = hookspecs.hookimpl(tryfirst=impl.tryfirst, trylast=impl.trylast)(answers[impl.plugin_name])
        other.register(SimpleNamespace(**{hook: answer}), name=impl.plugin_name)
    _watch(other, [impl for impl in implementations if impl.plugin_name not in answers])
    return getattr(other.hook, hook)


# ------------------------------------------------------------------------------------- while the run goes on


def _watch(made: pluggy.PluginManager, originals: Sequence[Any] | None = None) -> None:
    """Name the plugin and the hook in whatever goes wrong inside one, and refuse None as the one answer.

    `originals` are the implementations to be named, if those of `made` only stand for them.
    """

    def before(hook: str, impls: Sequence[Any], arguments: Any) -> None:
        pass

    def after(outcome: pluggy.Result[Any], hook: str, impls: Sequence[Any], arguments: Any) -> None:
        if outcome.exception is not None:
            _name_the_place(outcome.exception, hook, impls if originals is None else originals)
            return
        answer = outcome.get_result()
        if isinstance(answer, Iterator):
            outcome.force_result(_watched(answer, hook, impls))
        elif answer is None and getattr(made.hook, hook).spec.opts["firstresult"]:
            asked = " and ".join(impl.plugin_name for impl in reversed(impls)) or "no plugin of this run"
            outcome.force_exception(PluginError(f"{hook} needs an answer, and {asked} gave None. A missing `return`?"))

    made.add_hookcall_monitoring(before, after)


def _watched(items: Iterator[Any], hook: str, impls: Sequence[Any]) -> Iterator[Any]:
    """The same items; a generator of a plugin raises only when it is read."""
    try:
        yield from items
    except Exception as error:
        _name_the_place(error, hook, impls)
        raise


def _name_the_place(error: BaseException, hook: str, impls: Sequence[Any]) -> None:
    """Add a note with the plugin whose implementation of this hook stands deepest in the traceback."""
    places = [
        f"{impl.plugin_name}.{hook} ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in walk_tb(error.__traceback__)
        for impl in impls
        if inspect.unwrap(impl.function).__code__ is frame.f_code
        and frame.f_locals.get("self", impl.plugin) is impl.plugin  # a run may have two plugins of one class
    ]
    if places:
        error.add_note(f"raised in {places[-1]}")
