"""Folders that are either whole or not there: checkpoints, and the results of stages.

A folder is filled under a hidden name beside its own, every file is forced to the disk, `manifest.json` (size
and sha256 of every file) is written last, and only then does the folder get its name. Whenever a run is
killed or a disk is full, the folders that stood there before stay as they were.

What a checkpoint holds (`rlhf_engine/state.py`) is safetensors and JSON, never pickle.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_engine.state import (
    columns_state,
    load_columns,
    load_optimizer,
    load_rng,
    load_tree,
    optimizer_state,
    rng_state,
    save_tree,
)

__all__ = [
    "CheckpointNotSaved",
    "Checkpoints",
    "DamagedCheckpoint",
    "columns_state",
    "folder_hash",
    "load_columns",
    "load_optimizer",
    "load_rng",
    "load_tree",
    "optimizer_state",
    "rng_state",
    "save_tree",
    "text_hash",
    "verify_folder",
    "write_folder",
]

MANIFEST = "manifest.json"
logger = logging.getLogger("rlhf_engine")


class DamagedCheckpoint(Exception):
    """A folder is not what its manifest says; the message names the file and what is wrong with it."""


class CheckpointNotSaved(OSError):
    """A folder could not be written, for a full disk above all; what stood there before is untouched."""


def write_folder(final: Path, write: Callable[[Path], None]) -> Path:
    """Let `write(staging)` fill a folder that then becomes `final`, whole and durable, or not at all.

    A `final` that exists is replaced: it is moved aside, and deleted only when the new one is durable. If the
    process is killed between the two, the next `write_folder` or `Checkpoints.latest` puts it back.

    Raises CheckpointNotSaved if anything in here or in `write` fails; what stood there before then stays.
    """
    return _write_folder(final, write, previous=final if final.exists() else None)


def _write_folder(final: Path, write: Callable[[Path], None], previous: Path | None) -> Path:
    _clear_leftovers(final.parent, final.name)
    staging, aside = final.with_name(f".{final.name}.staging"), final.with_name(f".{final.name}.replaced")
    try:
        staging.mkdir(parents=True)
        write(staging)
        _seal(staging)
        if final.exists():
            os.rename(final, aside)
        os.rename(staging, final)
        _sync(final.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if aside.exists():
            with contextlib.suppress(OSError):
                shutil.rmtree(final, ignore_errors=True)
                os.rename(aside, final)
        if not isinstance(error, Exception):
            raise
        kept = f"the previous one, {previous}, is untouched" if previous else "no earlier one is there"
        not_saved = CheckpointNotSaved(
            f"could not save {final}: {type(error).__name__}: {error}; {kept}. {_room(final.parent)}. "
            "Make room or remove the cause, then run the same command again: it goes on from there."
        )
        for note in getattr(error, "__notes__", ()):  # which plugin it was, if one
            not_saved.add_note(note)
        raise not_saved from error
    shutil.rmtree(aside, ignore_errors=True)
    return final


def verify_folder(folder: Path) -> None:
    """Compare every file with the manifest. Raises DamagedCheckpoint naming the file and what is wrong."""

    def damaged(file: str, fault: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{folder / file}: {fault}")

    if not (folder / MANIFEST).is_file():
        raise damaged(MANIFEST, "is missing, so the folder was never finished or has been damaged")
    try:
        manifest = {
            file: (entry["size"], entry["sha256"])
            for file, entry in json.loads((folder / MANIFEST).read_text("ascii")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(MANIFEST, f"is not a manifest ({type(error).__name__}: {error})") from error
    files = _files(folder)
    for file, (size, sha256) in manifest.items():
        if file not in files:
            raise damaged(file, "is missing")
        try:
            found_size, found_sha256 = files[file].stat().st_size, _sha256(files[file])
        except OSError as error:
            raise damaged(file, f"cannot be read ({error})") from error
        if found_size != size:
            raise damaged(file, f"has {found_size} bytes instead of {size}")
        if found_sha256 != sha256:
            raise damaged(file, "has been altered: its sha256 is not the one in the manifest")
    for file in files:
        if file not in manifest:
            raise damaged(file, "is unexpected: the manifest does not list it")


def folder_hash(folder: Path) -> str:
    """The sha256 of a folder's file names and contents, its manifest left out."""
    return text_hash({file: _sha256(path) for file, path in _files(folder).items()})


def text_hash(value: Any) -> str:
    """The sha256 of a value's canonical JSON. Raises TypeError for what JSON cannot say."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _seal(folder: Path) -> None:
    files = _files(folder)
    for path in files.values():
        _sync(path)
    manifest = {file: {"size": path.stat().st_size, "sha256": _sha256(path)} for file, path in files.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "ascii")
    for path in (folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(path)


def _files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` except its manifest, by its name relative to it, in order."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return {name: paths[name] for name in sorted(paths) if name != MANIFEST}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _room(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free on that disk"


def _clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what a killed process left half written, and put back what it had moved aside."""
    pattern = glob.escape(name) if name else "*"
    for staging in folder.glob(f".{pattern}.staging"):
        shutil.rmtree(staging)
    for aside in folder.glob(f".{pattern}.replaced"):
        final = aside.with_name(aside.name.removeprefix(".").removesuffix(".replaced"))
        try:
            verify_folder(final)
        except DamagedCheckpoint:
            shutil.rmtree(final, ignore_errors=True)
            os.rename(aside, final)
        else:
            _sync(folder)
            shutil.rmtree(aside)


class Checkpoints:
    """The checkpoints of one stage, the newest `keep` of which stay. Names must sort in the order of time.

    One process at a time may use a folder.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep}: at least 2 checkpoints must be kept, as one may turn out damaged")
        self.folder = folder
        self.keep = keep
        self._damaged: set[str] = set()

    def save(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint as `write_folder` does, then delete all but the `keep` newest whole ones.

        Raises CheckpointNotSaved, and ValueError for a name that sorts before a whole checkpoint's.
        """
        _clear_leftovers(self.folder)
        whole = [other for other in self._names() if other not in self._damaged]
        if whole and name < whole[-1]:
            raise ValueError(f"checkpoint {name!r} sorts before {whole[-1]!r}, which is in {self.folder}")
        saved = _write_folder(self.folder / name, write, self.folder / whole[-1] if whole else None)
        self._damaged.discard(name)
        kept = sorted({*whole, name})[-self.keep :]
        for older in self._names():
            if older < kept[0]:
                shutil.rmtree(self.folder / older)
        return saved

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None if there is no checkpoint at all.

        Damaged ones are skipped with a warning. Raises DamagedCheckpoint if all are damaged.
        """
        _clear_leftovers(self.folder)
        faults = []
        for name in reversed(self._names()):
            try:
                verify_folder(self.folder / name)
            except DamagedCheckpoint as fault:
                faults.append(str(fault))
                self._damaged.add(name)
                continue
            for fault_text in faults:
                logger.warning("a checkpoint is damaged: %s; falling back to %s", fault_text, self.folder / name)
            return self.folder / name
        if faults:
            raise DamagedCheckpoint(
                f"no whole checkpoint is left in {self.folder}: {'; '.join(faults)}. Put back a copy of "
                "one of them, or delete them all to begin this stage again."
            )
        return None

    def _names(self) -> list[str]:
        if not self.folder.exists():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith("."))
