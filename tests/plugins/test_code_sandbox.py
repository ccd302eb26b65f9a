"""Code in the sandbox: right, wrong, and meant to do harm."""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_engine import Prompt
from rlhf_plugins.code_sandbox import CodeSandbox, code_of, sandbox
from rlhf_plugins.code_sandbox.sandbox import Walls, passed_tests, strongest

RIGHT = "def add(a, b):\n    return a + b\n"
FORGED = "import os\nfor where in range(30):\n    try: os.write(where, b'0' * 32 + b' 0\\n')\n    except OSError: pass"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that answers can run by: under root it must be one for everybody."""
    for path in (sys.executable, "/usr/bin/python3"):
        try:
            return strongest(path).python
        except RuntimeError:
            continue
    pytest.skip("no interpreter here that the user nobody can run")


@pytest.fixture(scope="module")
def walls(python: str) -> Walls:
    return strongest(python)


def run(walls: Walls, code: str, *tests: str, seconds: float = 5.0, **limits: int) -> int:
    limits = {"memory_mb": 256, "processes": 8, **limits}
    return passed_tests(walls, code, tests or ["pass"], seconds=seconds, **limits)


def alive(mark: str) -> list[str]:
    """The processes whose command line has this mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_text("utf-8", "replace"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def gone(mark: str, *, seconds: float = 2) -> bool:
    """Whether they all end, which the kernel may take a moment for."""
    end = time.monotonic() + seconds
    while alive(mark) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(mark)


# ----------------------------------------------------------------------------------------------------- the reward


def test_all_or_nothing_or_the_share_of_the_tests(python: str) -> None:
    texts = [
        f"Here:\n```python\n{RIGHT}```\nThat is all.",
        RIGHT,
        "```python\ndef add(a, b):\n    return int(a) + int(b)\n```",
        "def add(a, b):\n    return a - b",
        "I do not know",
        "",
    ]
    prompts = [Prompt(text="?", reference=TESTS)] * len(texts)
    strict = CodeSandbox(python=python, weight=0.5).rlhf_reward(texts=texts, prompts=prompts)
    assert strict.values.tolist() == [1, 1, 0, 0, 0, 0]
    assert (strict.name, strict.weight, strict.values.dtype) == ("code_sandbox", 0.5, torch.float32)
    shares = CodeSandbox(python=python, partial_credit=True).rlhf_reward(texts=texts, prompts=prompts)
    assert shares.values.tolist() == pytest.approx([1, 1, 2 / 3, 0, 0, 0])


def test_a_single_test_may_be_a_text_and_none_at_all_abstains(python: str) -> None:
    prompts = [Prompt(text="?", reference=reference) for reference in ("\n".join(TESTS), None, [])]
    one, *none = CodeSandbox(python=python).rlhf_reward(texts=[RIGHT] * 3, prompts=prompts).values.tolist()
    assert one == 1
    assert all(map(math.isnan, none))


@pytest.mark.parametrize("reference", [7, [1], {"tests": []}])
def test_a_reference_that_is_no_test_is_named(python: str, reference: object) -> None:
    with pytest.raises(ValueError, match=rf"the prompt 'add' is a {type(reference).__name__}"):
        CodeSandbox(python=python).rlhf_reward(texts=[""], prompts=[Prompt(text="add", reference=reference)])


def test_which_code_counts() -> None:
    assert code_of("a = 1") == "a = 1"
    assert code_of("First\n```\na = 1\n```\nbetter:\n```python\na = 2\n```\nDone.") == "a = 2\n"
    assert code_of("```py\na = 3\nb") == "a = 3\nb"  # cut off at the length limit
    assert code_of("``` a ```") == "``` a ```"


def test_answers_run_at_the_same_time(python: str) -> None:
    reward = CodeSandbox(python=python, at_once=4)
    prompts = [Prompt(text="?", reference="pass")] * 4
    start = time.monotonic()
    assert reward.rlhf_reward(texts=["import time; time.sleep(1)"] * 4, prompts=prompts).values.tolist() == [1] * 4
    assert time.monotonic() - start < 3


# ------------------------------------------------------------------------------------------ what an answer may do


def test_the_code_is_a_module_of_its_own_with_the_standard_library(walls: Walls) -> None:
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass, fields\nimport json, math\n"
        "@dataclass\nclass Point:\n    x: int = 0\n"
        "if __name__ == '__main__':\n    raise SystemExit('a program that asks for input')\n"
    )
    assert (
        run(walls, code, "assert json.dumps([Point().x]) == '[0]'", "assert math.pi > 3 and len(fields(Point)) == 1")
        == 2
    )


def test_one_test_does_not_spoil_the_next(walls: Walls) -> None:
    assert run(walls, RIGHT, "add = None", TESTS[0], "raise SystemExit", TESTS[1], "this is no Python") == 3


def test_it_finds_an_empty_environment_and_folder_and_nothing_to_read(
    walls: Walls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    tests = [
        "import os; assert 'JUDGE_KEY' not in os.environ and 'HOME' not in os.environ",
        "import os; assert os.listdir() == [] and os.getcwd() != '/'",
        "import sys; assert sys.stdin.read() == ''",
        "import sys; assert sys.flags.isolated",
        "open('file', 'w').write('in its own folder it may')",
    ]
    assert run(walls, "", *tests) == len(tests)


# ------------------------------------------------------------------------------------------------ what it may not


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_what_does_not_end_is_ended(walls: Walls, code: str) -> None:
    start = time.monotonic()
    assert run(walls, code, seconds=0.7) == 0
    assert time.monotonic() - start < 2.5


def test_tests_that_passed_before_the_time_was_over_count(walls: Walls) -> None:
    assert run(walls, RIGHT, TESTS[0], "while True: pass", TESTS[1], seconds=0.7) == 1


@pytest.mark.parametrize(
    "code",
    ["raise SystemExit(0)", "import os; os._exit(0)", "import os; os.kill(os.getpid(), 9)", FORGED],
)
def test_ending_early_or_writing_a_report_passes_no_test(walls: Walls, code: str) -> None:
    assert run(walls, code, "assert False") == 0


def test_memory_is_bounded(walls: Walls) -> None:
    code = "try:\n    held = bytearray(400 << 20)\nexcept MemoryError:\n    held = None"
    assert run(walls, code, "assert held is None", memory_mb=256) == 1
    assert run(walls, code, "assert held is None", memory_mb=800) == 0


def test_processes_are_bounded(walls: Walls) -> None:
    bomb = (
        "import os, time\nstarted = 0\ntry:\n    while started < 40:\n"
        "        if os.fork() == 0:\n            time.sleep(30); os._exit(0)\n        started += 1\n"
        "except BlockingIOError:\n    pass"
    )
    assert run(walls, bomb, "assert 1 <= started <= 8", processes=8) == 1


def test_what_is_printed_is_not_kept_and_a_file_has_its_limit(walls: Walls) -> None:
    loud = "import sys\nfor _ in range(300): sys.stdout.write('x' * (1 << 20))"
    assert run(walls, loud) == 1
    large = "try:\n    open('f', 'wb').write(bytes(20 << 20))\nexcept OSError as error:\n    said = error.errno"
    assert run(walls, large, "import errno; assert said == errno.EFBIG") == 1


def test_limits_cannot_be_raised_again(walls: Walls) -> None:
    code = (
        "import resource as r\nraised = []\nfor what in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_CPU, r.RLIMIT_FSIZE):\n"
        "    try:\n        r.setrlimit(what, (r.RLIM_INFINITY, r.RLIM_INFINITY)); raised.append(what)\n"
        "    except (ValueError, OSError):\n        pass"
    )
    assert run(walls, code, "assert raised == []") == 1


@pytest.mark.parametrize("session", ["False", "True"])
def test_its_children_end_with_it(walls: Walls, session: str) -> None:
    if session == "True" and not walls.prefix:
        pytest.skip("without namespaces a process that leaves its group stays, as the docstring says")
    mark = f"4242{os.getpid()}{session == 'True':d}"
    code = (
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-I', '-c', 'import time; time.sleep(60)',"
        f" '{mark}'], start_new_session={session})"
    )
    assert run(walls, code, "assert child.poll() is None") == 1
    assert gone(mark)
    assert run(walls, code + "\nimport time; time.sleep(60)", seconds=0.7) == 0
    assert gone(mark)


def test_it_ends_in_time_also_when_the_process_that_started_it_is_killed(walls: Walls) -> None:
    mark = f"4343{os.getpid()}"
    # Put together there, so that the starter's own command line has it not.
    sleeper = f"[sys.executable, '-I', '-c', 'import time; time.sleep(60)', '4343' + '{os.getpid()}']"
    code = f"import os, sys; os.execv(sys.executable, {sleeper})"
    start = (
        f"from rlhf_plugins.code_sandbox.sandbox import *\n"
        f"passed_tests({walls!r}, {code!r}, ['pass'], seconds=1, memory_mb=256, processes=8)"
    )
    starter = subprocess.Popen([sys.executable, "-c", start], cwd=Path(__file__).parents[2])
    end = time.monotonic() + 20
    while not alive(mark) and time.monotonic() < end:
        time.sleep(0.02)
    starter.kill()
    starter.wait()
    assert alive(mark)
    assert gone(mark, seconds=4)


def test_with_namespaces_there_is_no_network_and_no_other_process(walls: Walls) -> None:
    if not walls.prefix:
        pytest.skip("no user namespaces here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)"
        assert run(walls, "", connect) == 0
        assert run(replace(walls, prefix=()), "", connect) == 1
    others = f"import os; os.kill({os.getpid()}, 0)"
    assert run(walls, "", others) == 0
    if "--mount-proc" in walls.prefix:
        assert run(walls, "import os", "assert len([n for n in os.listdir('/proc') if n.isdigit()]) <= 2") == 1


# ------------------------------------------------------------------------------------- what is said of all of this


def test_it_does_not_keep_an_answer_from_files_and_says_so(walls: Walls) -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lies in folders that only their owner may enter
        outside = Path(folder, "outside")
        outside.parent.chmod(0o777)
        assert run(walls, f"open({str(outside)!r}, 'w').write('here')") == 1
        assert outside.read_text() == "here"
    assert run(walls, "text = open('/etc/passwd').read()", "assert 'root' in text") == 1
    said = " ".join((CodeSandbox.__doc__ or "").split())
    assert "does NOT protect from: * reading whatever its user may read" in said
    assert "writing to and deleting whatever its user may" in said


def test_without_namespaces_the_log_says_once_what_is_missing(
    python: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    strongest.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "rlhf_engine"):
            walls = strongest(python)
            assert strongest(python) is walls
        assert walls.prefix == ()
        assert len(caplog.records) == 1
        assert "does not keep an answer from using the network; from killing" in caplog.text
        assert run(walls, RIGHT, *TESTS) == 3
        test_processes_are_bounded(walls)
        test_its_children_end_with_it(walls, "False")
    finally:
        strongest.cache_clear()


def test_an_interpreter_that_cannot_run_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="code_sandbox cannot run .*nowhere/python: there is no such program"):
        CodeSandbox(python=str(tmp_path / "nowhere/python")).rlhf_run_started()
    liar = tmp_path / "python"
    liar.write_text("#!/bin/sh\necho no such module >&2\n")
    liar.chmod(0o755)
    with pytest.raises(RuntimeError, match="code_sandbox cannot run"):
        CodeSandbox(python=str(liar)).rlhf_run_started()


def test_an_interpreter_that_does_not_begin_is_no_fault_of_the_answer(python: str, walls: Walls) -> None:
    assert passed_tests(walls, "", ["pass"], seconds=0.001, memory_mb=256, processes=8) is None
    assert passed_tests(walls, "import os; os._exit(0)", ["pass"], seconds=5, memory_mb=256, processes=8) == 0
    with pytest.raises(ValueError, match="does not even start with memory_mb = 512, seconds = 0.001"):
        CodeSandbox(python=python, seconds=0.001).rlhf_run_started()
    answers = CodeSandbox(python=python, seconds=0.001).rlhf_reward(["x = 1"], [Prompt(text="q", reference="x")])
    assert answers.values.isnan().all()


def test_the_answer_never_runs_as_root(walls: Walls) -> None:
    assert run(walls, "import os", "assert os.getuid() != 0 and os.geteuid() != 0 and not os.getgroups()[1:]") == 1
