"""`rlhf new KIND NAME`: a plugin in a package of its own, which installs and passes its tests as written.

The files of `rlhf_engine/templates` are such packages already; they are copied with their names replaced.
"""

from __future__ import annotations

import re
import shutil
from enum import StrEnum
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path

from rlhf_engine.config import ConfigError
from rlhf_engine.manager import installed

__all__ = ["Kind", "new_package"]

TEMPLATES = Path(__file__).with_name("templates")


class Kind(StrEnum):
    """What a new plugin can be."""

    reward = "reward"
    policy = "policy"
    algorithm = "algorithm"
    tracker = "tracker"


def new_package(kind: Kind, name: str, folder: Path) -> Path:
    """Write the package `folder/rlhf-name`, whole or not at all, and return its path.

    The folder is not named as the module is: it would hide that from who works beside it.

    Raises ConfigError, before anything is written, for a name that cannot be used and a folder that exists.
    """
    _refuse(name)
    target = folder / f"rlhf-{name.replace('_', '-')}"
    if target.exists():
        raise ConfigError(f"{target} exists: take another name, or another place with --folder")
    staged = folder / f".{name}.staged"
    try:
        staged.mkdir(parents=True)
        for template in sorted((TEMPLATES / kind).glob("[!.]*.*")):  # tools leave hidden files
            text = _renamed(template.read_text("utf-8"), kind, name)
            (staged / _renamed(template.name, kind, name)).write_text(text, "utf-8")
        staged.rename(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def _refuse(name: str) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or iskeyword(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a plugin: it names a Python module and a table of run files, so it begins "
            "with a small letter and goes on with small letters, digits and _, as my_reward does"
        )
    if name == "run":
        raise ConfigError("a plugin named run could not be configured: [run] is the run's own table. Take another name")
    known = installed()
    if name in known:
        raise ConfigError(f'a plugin named "{name}" is installed ({known[name].value}): take another name')
    spec = find_spec(name)
    if spec is not None and spec.origin is not None:
        raise ConfigError(f"a module named {name} is importable here ({spec.origin}): take another name")


def _renamed(text: str, kind: Kind, name: str) -> str:
    for placeholder, written in (
        (f"my_{kind}", name),
        (f"my-{kind}", name.replace("_", "-")),
        (f"My{kind.capitalize()}", class_name(kind, name)),
    ):
        text = text.replace(placeholder, written)
    return text


def class_name(kind: Kind, name: str) -> str:
    """The name in capitals, with the kind at its end: no class of the engine is named so."""
    words = name.removesuffix(f"_{kind}").split("_")
    return "".join(word.capitalize() for word in words) + kind.capitalize()
