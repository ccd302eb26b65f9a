"""A folder is whole or not there, whatever fails or is killed; damage is found, named, survived."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_engine.checkpoint import (
    CheckpointNotSaved,
    Checkpoints,
    DamagedCheckpoint,
    folder_hash,
    text_hash,
    verify_folder,
    write_folder,
)


def filled(text: str = "new") -> Callable[[Path], None]:
    """A `write` that makes two small files, one of them in a folder of its own."""

    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_bytes(text.encode() * 3)
        (folder / "state.json").write_text(json.dumps(text))

    return write


def content(folder: Path) -> str:
    return json.loads((folder / "state.json").read_text())


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------ a folder and its faults


def test_a_folder_is_written_with_its_manifest(tmp_path: Path) -> None:
    assert write_folder(tmp_path / "runs" / "result", filled()) == tmp_path / "runs" / "result"
    assert entries(tmp_path / "runs") == ["result"]
    manifest = json.loads((tmp_path / "runs" / "result" / "manifest.json").read_text())
    assert manifest == {
        "model/weights.bin": {"size": 9, "sha256": hashlib.sha256(b"newnewnew").hexdigest()},
        "state.json": {"size": 5, "sha256": hashlib.sha256(b'"new"').hexdigest()},
    }
    verify_folder(tmp_path / "runs" / "result")


def replace_by_dead_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


WEIGHTS, STATE, MANIFEST = "model/weights.bin", "state.json", "manifest.json"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes(b"newne"), f"{WEIGHTS}: has 5 bytes instead of 9"),
    "longer": (lambda f: (f / STATE).write_text('"new" '), f"{STATE}: has 6 bytes instead of 5"),
    "altered": (lambda f: (f / STATE).write_text('"neW"'), f"{STATE}: has been altered"),
    "missing": (lambda f: (f / STATE).unlink(), f"{STATE}: is missing"),
    "folder missing": (lambda f: shutil.rmtree(f / "model"), f"{WEIGHTS}: is missing"),
    "extra": (lambda f: (f / "model" / "extra.bin").touch(), "model/extra.bin: is unexpected"),
    "unreadable": (lambda f: replace_by_dead_link(f / STATE), f"{STATE}: cannot be read"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST}: is missing"),
    "empty manifest": (lambda f: (f / MANIFEST).write_text(""), f"{MANIFEST}: is not a manifest"),
    "other manifest": (lambda f: (f / MANIFEST).write_text("[1]"), f"{MANIFEST}: is not a manifest"),
    "all missing": (lambda f: shutil.rmtree(f), f"{MANIFEST}: is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(tmp_path: Path, fault: str) -> None:
    folder = write_folder(tmp_path / "result", filled())
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(DamagedCheckpoint) as caught:
        verify_folder(folder)
    assert str(caught.value).startswith(str(folder))
    assert message in str(caught.value)


def test_a_flipped_bit_is_found_in_every_byte(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "result", filled())
    for file in (WEIGHTS, STATE, MANIFEST):
        whole = (folder / file).read_bytes()
        for position in range(len(whole)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            (folder / file).write_bytes(flipped)
            with pytest.raises(DamagedCheckpoint):
                verify_folder(folder)
        (folder / file).write_bytes(whole)
    verify_folder(folder)


def test_hashes(tmp_path: Path) -> None:
    assert text_hash({"b": 1, "a": [1.5, None]}) == hashlib.sha256(b'{"a":[1.5,null],"b":1}').hexdigest()
    with pytest.raises(TypeError):
        text_hash({"path": tmp_path})
    plain = tmp_path / "plain"
    plain.mkdir()
    filled()(plain)
    sealed = write_folder(tmp_path / "sealed", filled())
    before = folder_hash(sealed)
    assert before == folder_hash(plain), "the manifest is no part of the hash"
    (plain / "state.json").write_text('"neW"')
    assert folder_hash(plain) != before
    (sealed / "state.json").rename(sealed / "other.json")
    assert folder_hash(sealed) != before


# -------------------------------------------------------------------------------------- falling back, pruning


def test_the_newest_whole_one_is_latest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    assert checkpoints.latest() is None
    for name in ("step-000002", "step-000010", "step-000010-update-03"):
        checkpoints.save(name, filled(name))
    with caplog.at_level(logging.WARNING, logger="rlhf_engine"):
        assert checkpoints.latest() == tmp_path / "c" / "step-000010-update-03"
    assert not caplog.records


def test_damaged_ones_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for name in "abc":
        checkpoints.save(name, filled(name))
    (tmp_path / "c" / "model" / "weights.bin").write_bytes(b"c")
    (tmp_path / "b" / "state.json").unlink()
    with caplog.at_level(logging.WARNING, logger="rlhf_engine"):
        assert Checkpoints(tmp_path).latest() == tmp_path / "a"
    assert [record.getMessage() for record in caplog.records] == [
        f"a checkpoint is damaged: {tmp_path}/c/model/weights.bin: has 1 bytes instead of 3; "
        f"falling back to {tmp_path}/a",
        f"a checkpoint is damaged: {tmp_path}/b/state.json: is missing; falling back to {tmp_path}/a",
    ]
    (tmp_path / "a" / "extra").touch()
    with pytest.raises(DamagedCheckpoint, match=r"no whole checkpoint .*c/model.*b/state.*a/extra.*delete"):
        Checkpoints(tmp_path).latest()


def test_what_is_known_to_be_damaged_does_not_count_as_kept(tmp_path: Path) -> None:
    for name in "ac":
        Checkpoints(tmp_path).save(name, filled(name))
    (tmp_path / "c" / "state.json").unlink()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == tmp_path / "a"
    checkpoints.save("b", filled("b"))  # the run takes the way from a to c again
    assert entries(tmp_path) == ["a", "b", "c"]
    checkpoints.save("c", filled("c"))
    assert entries(tmp_path) == ["b", "c"]
    assert content(checkpoints.latest() or tmp_path) == "c"
    checkpoints.save("d", filled("d"))
    assert entries(tmp_path) == ["c", "d"], "c is whole again"


def test_a_save_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    filled("half")(write_folder(tmp_path / "old", lambda folder: None).rename(tmp_path / ".b.staging"))
    Checkpoints(tmp_path).save("c", filled("c"))
    assert entries(tmp_path) == ["c"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for name in "abcd":
        Checkpoints(tmp_path).save(name, filled(name))
    assert entries(tmp_path) == ["c", "d"]
    Checkpoints(tmp_path, keep=4).save("e", filled("e"))
    assert entries(tmp_path) == ["c", "d", "e"]
    with pytest.raises(ValueError, match="keep=1: at least 2"):
        Checkpoints(tmp_path, keep=1)
    with pytest.raises(ValueError, match="'d2' sorts before 'e'"):
        Checkpoints(tmp_path).save("d2", filled())
    assert entries(tmp_path) == ["c", "d", "e"]


# ------------------------------------------------------------------------------ the order of events, failures


class Events:
    """Records what is done to the disk, in order, and fails at one event (with `for_good`: ever after)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root, self.log, self.fail_at, self.for_good = root, [], -1, False
        self.real = {"rename": os.rename, "fsync": os.fsync, "rmtree": shutil.rmtree}
        monkeypatch.setattr(os, "rename", self.rename)
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)
        self.log: list[str]

    def add(self, event: str) -> None:
        self.log.append(event)
        position = len(self.log) - 1
        if position == self.fail_at or (self.for_good and position > self.fail_at >= 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def name(self, path: Path | str) -> str:
        return Path(path).relative_to(self.root).as_posix()

    def rename(self, old: Path, new: Path) -> None:
        self.add(f"rename {self.name(old)} {self.name(new)}")
        self.real["rename"](old, new)

    def fsync(self, descriptor: int) -> None:
        self.add(f"fsync {self.name(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        self.real["fsync"](descriptor)

    def rmtree(self, path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            self.log.append(f"rmtree {self.name(path)}")
        self.real["rmtree"](path, ignore_errors=ignore_errors)


def test_nothing_is_deleted_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        Checkpoints(tmp_path).save(name, filled(name))
    events = Events(monkeypatch, tmp_path)
    Checkpoints(tmp_path).save("c", filled("c"))
    assert events.log == [
        "fsync .c.staging/model/weights.bin",
        "fsync .c.staging/state.json",
        "fsync .c.staging/manifest.json",
        "fsync .c.staging/model",
        "fsync .c.staging",
        "rename .c.staging c",
        "fsync .",
        "rmtree a",
    ]
    events.log.clear()
    Checkpoints(tmp_path).save("c", filled("again"))
    assert events.log[-4:] == ["rename c .c.replaced", "rename .c.staging c", "fsync .", "rmtree .c.replaced"]
    assert content(tmp_path / "c") == "again"


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("name", ["b", "c"], ids=["replaced", "new"])
def test_a_failure_at_any_event_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, for_good: bool
) -> None:
    events = Events(monkeypatch, tmp_path)
    count = 8 if name == "b" else 7  # as many as a save has events
    for failing in range(count + 1):
        folder = tmp_path / str(failing)
        for old in "ab":
            Checkpoints(folder).save(old, filled(old))
        events.log.clear()
        events.fail_at, events.for_good = failing, for_good
        if failing == count:
            Checkpoints(folder).save(name, filled("new"))
            break
        with pytest.raises(CheckpointNotSaved) as caught:
            Checkpoints(folder).save(name, filled("new"))
        events.fail_at = -1
        message = str(caught.value)
        assert f"could not save {folder / name}: OSError: [Errno 28] No space left on device" in message
        assert f"the previous one, {folder / 'b'}, is untouched" in message
        assert "MiB are free on that disk. Make room" in message
        verify_folder(folder / "a")
        assert not (folder / f".{name}.staging").exists()
        found = Checkpoints(folder).latest()
        assert found is not None
        # Only the very last event, the parent's fsync, comes after the new one has its name.
        assert content(found) == "b" or (name == "c" and failing == count - 1)
        Checkpoints(folder).save(name, filled("later"))
        assert content(Checkpoints(folder).latest() or folder) == "later"
        assert entries(folder) == sorted({"a", "b", name})[-2:]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("a plugin's fault")], ids=repr)
def test_a_failing_write_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise error

    with pytest.raises(CheckpointNotSaved, match=f"{type(error).__name__}.*no earlier one") as caught:
        write_folder(tmp_path / "result", write)
    assert caught.value.__cause__ is error
    assert entries(tmp_path) == []
    write_folder(tmp_path / "result", filled("old"))
    with pytest.raises(CheckpointNotSaved, match=f"previous one, {tmp_path}/result, is untouched"):
        write_folder(tmp_path / "result", write)
    verify_folder(tmp_path / "result")
    assert entries(tmp_path) == ["result"]


def test_an_interrupt_is_no_failure_to_save(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "result", write)
    assert entries(tmp_path) == []


# ------------------------------------------------------------------------------------ full disks, killed runs

FULL_DISK = """
import json, resource, sys
from pathlib import Path
import torch
from rlhf_engine.checkpoint import CheckpointNotSaved, Checkpoints, save_tree, verify_folder

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
checkpoints = Checkpoints(folder)

def state(numbers):
    return lambda staging: save_tree(staging, "state", torch.arange(numbers))

checkpoints.save("1", state(100))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    checkpoints.save("2", state(100_000))
except CheckpointNotSaved as error:
    message = str(error)
verify_folder(folder / "1")
left = sorted(path.name for path in folder.iterdir())
checkpoints.save("3", state(200))
print(json.dumps([message, left, str(checkpoints.latest())]))
"""


def check_full_disk(command: list[str], folder: Path, cause: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    message, left, latest = json.loads(done.stdout)
    assert f"could not save {folder / '2'}: " in message
    assert cause in message
    assert f"the previous one, {folder / '1'}, is untouched" in message
    assert left == ["1"]
    assert latest == str(folder / "3")


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), "100000"]
    check_full_disk(command, tmp_path, cause=os.strerror(errno.EFBIG))


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs the command unshare")
def test_a_full_disk(tmp_path: Path) -> None:
    # A mount name space of the child's own: nobody else sees the file system; it goes with the child.
    mount = 'mount -t tmpfs -o size=256k tmpfs "$1" || exit 77; shift; exec "$@"'
    child = [sys.executable, "-c", FULL_DISK, str(tmp_path), "0"]
    for namespace in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        probe = subprocess.run([*namespace, "true"], capture_output=True, text=True, check=False)
        if probe.returncode == 0:
            command = [*namespace, "sh", "-c", mount, "sh", str(tmp_path), *child]
            check_full_disk(command, tmp_path, cause=os.strerror(errno.ENOSPC))
            return
    pytest.skip(f"no mount name space can be made here: {probe.stderr.strip()}")


def stop_in(moment: str, ready: Path) -> Callable[[Path], None]:
    """In the child: a `write` that comes to rest at the given moment of a save."""

    def rest() -> None:
        ready.touch()
        time.sleep(60)

    def write(folder: Path) -> None:
        filled("new")(folder)
        if moment == "inside write":
            rest()

    def fsync(descriptor: int) -> None:
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        if moment == "before the manifest is durable" and file.endswith("manifest.json"):
            rest()

    def rename(old: Path, new: Path, real: Callable[..., None] = os.rename) -> None:
        real(old, new)
        if moment == "after " + ("moving aside" if str(new).endswith(".replaced") else "the rename"):
            rest()

    os.fsync, os.rename = fsync, rename
    return write


@pytest.mark.parametrize(
    ("moment", "survivor", "left"),
    [
        ("inside write", "old", ["a", "b"]),
        ("before the manifest is durable", "old", ["a", "b"]),
        ("after moving aside", "old", ["a", "b"]),
        ("after the rename", "new", ["a", "b"]),
    ],
)
def test_a_kill_in_the_middle_of_a_save(tmp_path: Path, moment: str, survivor: str, left: list[str]) -> None:
    folder, ready = tmp_path / "c", tmp_path / "ready"
    for name in "ab":
        Checkpoints(folder).save(name, filled("old"))
    child = os.fork()
    if not child:
        try:
            Checkpoints(folder).save("b", stop_in(moment, ready))
        finally:
            os._exit(1)
    try:
        patience = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < patience, "the child never came to that moment"
            time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert any(name.startswith(".") for name in entries(folder)), "nothing is left over: the kill came late"

    latest = Checkpoints(folder).latest()
    assert latest == folder / "b"
    assert content(latest) == survivor
    assert entries(folder) == left
    Checkpoints(folder).save("c", filled("next"))
    assert entries(folder) == ["b", "c"]
