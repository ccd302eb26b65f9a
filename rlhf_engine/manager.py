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
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from traceback import walk_tb
from types import SimpleNamespace
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
    "installed",
    "load",
    "load_plugins",
    "make",
    "manager",
    "replaced",
    "require",
    "stages",
    "winners",
]

GROUP = "rlhf_engine"


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
    except Exception as error:  # whatever a foreign module does while it is imported
        raise PluginError(f"the plugin {which} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(plugin, type | FunctionReward):
        raise PluginError(f"the plugin {which} is a {type(plugin).__name__}; it must be a class, or a reward function")
    return plugin


@dataclass
class _FunctionOptions:
    weight: float | None = None


def make(name: str, table: dict[str, Any], *, where: str) -> Any:
    """The plugin of an entry-point name or path, with the options of its table (of a function: `weight`)."""
    plugin = load(name)
    if isinstance(plugin, type):
        return build(plugin, table, where=where)
    weight = build(_FunctionOptions, table, where=where).weight
    return plugin if weight is None else plugin.weighted(weight)


def load_plugins(file: RunFile) -> dict[str, Any]:
    """Make every plugin that a run file names, by name, with the options of its table.

    A stage is a plugin of the same name, unless a plugin of another name brings it.
    """
    known = installed()
    names = [name for name in file.names if name in known or name in file.options.plugins]
    tables = {table_name(name) for name in names}
    for table in file.tables:
        if table not in tables:
            raise ConfigError(
                f"{file.path}: the table [{table}] is for no plugin that [run] names "
                f"({', '.join(sorted(tables))}).{did_you_mean(table, tables)}"
            )
    return {
        name: make(name, file.tables.get(table_name(name), {}), where=f"{file.path}: [{table_name(name)}]")
        for name in names
    }


def manager(plugins: Iterable[Any] | Mapping[str, Any]) -> pluggy.PluginManager:
    """A plugin manager with exactly these plugins (objects, or objects by name) and the engine's defaults, checked."""
    made = pluggy.PluginManager(GROUP)
    made.add_hookspecs(hookspecs)
    given = plugins.items() if isinstance(plugins, Mapping) else ((None, plugin) for plugin in plugins)
    for label, plugin in given:
        name = label or _name(made, plugin)
        _refuse_unmarked(plugin, name)
        try:
            made.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            raise PluginError(_misspelt_argument(made, plugin, name, error)) from None
        if not made.get_hookcallers(plugin):
            raise PluginError(
                f"the plugin {name} answers no hook. Mark its methods with @hookimpl and name them like a hook: "
                f"{', '.join(_hooks(made))}"
            )
    _refuse_misspelt_hooks(made)
    _refuse_two_answers(made)
    defaults = Defaults()
    for hook in _hooks(made):
        if _answering(getattr(made.hook, hook)):
            # It gives way altogether: pluggy would ask it, in silence, wherever the plugin answers None.
            setattr(defaults, hook, None)
    made.register(defaults, name="engine defaults")
    _watch(made)
    return made


def _name(made: pluggy.PluginManager, plugin: Any) -> str:
    """The class's (or reward function's) name, numbered where a run has several of one."""
    if isinstance(plugin, type):
        raise PluginError(f"{plugin.__name__} is a class; give the engine an object: {plugin.__name__}()")
    kind = plugin.name if isinstance(plugin, FunctionReward) else type(plugin).__name__
    name, count = kind, 2
    while made.has_plugin(name):
        name, count = f"{kind} {count}", count + 1
    return name


def _refuse_unmarked(plugin: Any, name: str) -> None:
    for attribute in dir(plugin):
        method = getattr(plugin, attribute) if attribute.startswith("rlhf_") else None
        if inspect.isroutine(method) and not hasattr(method, f"{GROUP}_impl"):
            raise PluginError(f"{name}.{attribute} would never be called: put @hookimpl before it, or rename it")


def _hooks(made: pluggy.PluginManager) -> list[str]:
    return [name for name in vars(hookspecs) if name.startswith("rlhf_") and hasattr(made.hook, name)]


def _refuse_misspelt_hooks(made: pluggy.PluginManager) -> None:
    known = _hooks(made)
    for hook, caller in vars(made.hook).items():
        if getattr(caller, "spec", None) is None and isinstance(caller, pluggy.HookCaller):
            impl = caller.get_hookimpls()[0]
            raise PluginError(
                f"{impl.plugin_name}.{hook}: there is no such hook.{did_you_mean(hook, known)} "
                f"The hooks: {', '.join(known)}"
            )


def _misspelt_argument(made: pluggy.PluginManager, plugin: Any, name: str, error: Exception) -> str:
    for hook in _hooks(made):
        method = getattr(plugin, hook, None)
        spec = getattr(made.hook, hook).spec
        wanted = list(inspect.signature(method).parameters) if method else []
        for argument in wanted:
            if argument not in spec.argnames:
                return (
                    f"{name}.{hook}({', '.join(wanted)}): the hook has no argument {argument!r}."
                    f"{did_you_mean(argument, spec.argnames)} It has: {', '.join(spec.argnames)}"
                )
    return f"{name}: {error}"


def _plain(caller: pluggy.HookCaller) -> list[Any]:
    """The implementations that answer on their own: neither wrappers nor the engine's own last resort."""
    return [i for i in caller.get_hookimpls() if not (i.wrapper or i.hookwrapper or i.trylast)]


def _refuse_two_answers(made: pluggy.PluginManager) -> None:
    for hook in _hooks(made):
        caller = getattr(made.hook, hook)
        names = [impl.plugin_name for impl in _plain(caller)]
        if caller.spec.opts["firstresult"] and len(names) > 1:
            raise PluginError(
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


def require(made: pluggy.PluginManager, hooks: Sequence[str], *, by: str) -> None:
    """Refuse if nobody answers one of these hooks, and name the installed plugins that could."""
    for hook in hooks:
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
    for name in vars(hookspecs):
        options = getattr(getattr(plugin, name, None), "rlhf_engine_impl", None)
        if name.startswith("rlhf_") and options is not None:
            found.append(f"{name} (wraps)" if options["wrapper"] or options["hookwrapper"] else name)
    return found


def winners(made: pluggy.PluginManager) -> dict[str, list[str]]:
    """Who answers each hook of this run, in the order in which they are called; wrappers are marked."""
    result: dict[str, list[str]] = {}
    for hook in _hooks(made):
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
