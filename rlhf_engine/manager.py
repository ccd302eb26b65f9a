"""Load the plugins that a run names, and refuse what would otherwise go wrong in silence.

One manager per run, no global one. Refused at load: a name that is not installed, two plugins that answer one
one-answer hook, a misspelt hook or argument, an object that answers nothing, a stage that two plugins bring.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from rlhf_engine import hookspecs
from rlhf_engine.config import ConfigError, RunFile, build, did_you_mean, table_name
from rlhf_engine.defaults import Defaults
from rlhf_engine.hookspecs import Stage

__all__ = ["PluginError", "answers", "installed", "load", "load_plugins", "manager", "require", "stages", "winners"]

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


def load(name: str) -> type:
    """The plugin class of an entry-point name or a "package.module:Class" path."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise PluginError(f'the plugin "{name}" cannot be loaded: {error}') from error
    known = installed()
    if name not in known:
        raise PluginError(
            f'no plugin named "{name}" is installed.{did_you_mean(name, known)} Installed: '
            f"{', '.join(sorted(known))}. One that is not an entry point is named as package.module:Class."
        )
    try:
        return known[name].load()
    except (ImportError, AttributeError) as error:
        raise PluginError(f'the plugin "{name}" ({_origin(known[name])}) cannot be loaded: {error}') from error


def load_plugins(file: RunFile) -> dict[str, Any]:
    """Make every plugin that a run file names, by name, with the options of its table."""
    return {
        name: build(load(name), file.tables.get(table_name(name), {}), where=f"{file.path}: [{table_name(name)}]")
        for name in file.names
    }


def manager(plugins: Iterable[Any]) -> pluggy.PluginManager:
    """A plugin manager with exactly these plugins (objects) and the engine's defaults, checked."""
    made = pluggy.PluginManager(GROUP)
    made.add_hookspecs(hookspecs)
    made.register(Defaults(), name="engine defaults")
    for plugin in plugins:
        name = _name(made, plugin)
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
    return made


def _name(made: pluggy.PluginManager, plugin: Any) -> str:
    """The class's name, numbered where a run has several of one class."""
    if isinstance(plugin, type):
        raise PluginError(f"{plugin.__name__} is a class; give the engine an object: {plugin.__name__}()")
    name, count = type(plugin).__name__, 2
    while made.has_plugin(name):
        name, count = f"{type(plugin).__name__} {count}", count + 1
    return name


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
        wanted = pluggy._hooks.varnames(method)[0] if method else ()
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
        for name, stage in impl.function().items():
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
    """The installed plugins that answer a hook. A plugin that does not import here is left out."""
    found = []
    for name in installed():
        try:
            plugin = load(name)
        except PluginError:
            continue
        if hasattr(plugin, hook):
            found.append(name)
    return sorted(found)


def answers(plugin: type) -> list[str]:
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
