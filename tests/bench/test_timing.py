"""The stopwatch itself, on contestants whose cost is known: their clock goes on only when they say so."""

import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import timing
from bench.timing import Timing, compare, header, interleave, ratios, table


class Clock:
    """Stands in for the module `time`; a contestant spends CPU and wall seconds on it, call after call."""

    def __init__(self) -> None:
        self.cpu = self.wall = 100.0
        self.calls: list[str] = []

    def process_time(self) -> float:
        return self.cpu

    def perf_counter(self) -> float:
        return self.wall

    def contestant(self, name: str, *costs: float, wall: float = 10) -> Callable[[], None]:
        """Its n-th call costs `costs[n]` CPU seconds, the last one for ever, and `wall` times as many on the wall."""

        def step() -> None:
            cost = costs[min(self.calls.count(name), len(costs) - 1)]
            self.calls.append(name)
            self.cpu += cost
            self.wall += wall * cost

        return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return made


def test_they_take_turns_there_and_back(clock: Clock) -> None:
    interleave({name: clock.contestant(name, 1) for name in "ABC"}, rounds=2, warmup=1)
    assert "".join(clock.calls) == 3 * "ABCCBA"


def test_an_entry_is_the_mean_of_the_two_calls_of_a_round_and_the_warm_up_is_dropped(clock: Clock) -> None:
    steps = {"A": clock.contestant("A", 50, 60, 1, 3, 5, 9), "B": clock.contestant("B", 70, 80, 2, 2, 4, 1, wall=3)}
    timings = interleave(steps, rounds=2, warmup=1)
    assert timings == {
        "A": Timing(cpu=[2, 7], wall=[20, 70]),
        "B": Timing(cpu=[2, 2.5], wall=[6, 7.5]),
    }


def test_a_drift_within_the_rounds_favours_nobody(clock: Clock) -> None:
    """Every call of whomever costs a second more than the one before it."""
    shared = clock.contestant("any", *range(1, 100))
    timings = interleave({"A": shared, "B": shared, "C": shared}, rounds=3)
    assert timings["A"] == timings["B"] == timings["C"]


@pytest.mark.parametrize(("names", "rounds"), [("", 1), ("A", 0)])
def test_nothing_to_time_is_refused(clock: Clock, names: str, rounds: int) -> None:
    with pytest.raises(ValueError, match=f"at least one step and one round, got {len(names)} and {rounds}"):
        interleave({name: clock.contestant(name, 1) for name in names}, rounds)


def test_sleep_costs_no_cpu_seconds() -> None:
    taken = interleave({"sleeper": lambda: time.sleep(0.1)}, rounds=1, warmup=0)["sleeper"]
    assert taken.cpu[0] < 0.05
    assert taken.wall[0] >= 0.1


def test_cpu_seconds_are_those_of_all_threads() -> None:
    def work() -> None:
        start = time.thread_time()
        while time.thread_time() - start < 0.05:
            pass

    def step() -> None:
        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    assert interleave({"busy": step}, rounds=1, warmup=0)["busy"].cpu[0] >= 0.1


# The numbers tell all of these apart: a median from a mean, theirs / ours from ours / theirs, and a ratio of each round
# from the ratio of two medians (2.5).
OURS, THEIRS = [1.0, 2.0, 10.0], [4.0, 6.0, 5.0]


def test_ratios_are_theirs_over_ours_round_by_round() -> None:
    assert ratios(OURS, THEIRS) == (3.0, 0.5, 4.0)


def test_rounds_without_a_counterpart_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios(OURS, THEIRS[:2])


def numbers(row: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", row)]


def test_the_table_has_medians_and_the_ratio_to_the_first_with_its_spread() -> None:
    timings = {
        "ours": Timing(cpu=OURS, wall=[1.0, 1.0, 4.0]),
        "theirs": Timing(cpu=THEIRS, wall=[5.0, 2.0, 6.0]),
    }
    heading, first, second = table(timings).splitlines()
    assert heading.split()[:4] == ["CPU", "s", "wall", "s"]
    assert heading.index("CPU ratio") < heading.index("wall ratio")
    assert first.split()[0] == "ours" and second.split()[0] == "theirs"
    assert numbers(first) == [2, 1, 1, 1, 1, 1, 1, 1]
    assert numbers(second) == [5, 5, 3, 0.5, 4, 2, 1.5, 5]


def test_compare_prints_and_returns_what_it_measured(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"ours": clock.contestant("ours", 2), "theirs": clock.contestant("theirs", 5)}
    timings = compare(steps, rounds=3)
    printed = capsys.readouterr().out
    assert header() in printed
    assert "rounds   3 of ours, theirs and back" in printed
    assert table(timings) in printed
    assert statistics.median(timings["theirs"].cpu) == 5
    assert numbers(printed.splitlines()[-2])[:3] == [5, 50, 2.5]


# ------------------------------------------------------------------------------- where the figures belong to


def test_the_header_names_device_versions_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench.py", "two words"])
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", SimpleNamespace(name="bench.bench_x"))
    device, versions, commit, command = header().splitlines()
    if not torch.cuda.is_available():
        assert device.endswith(f"{torch.get_num_threads()} thread(s)")
    assert f"torch {torch.__version__}" in versions
    assert commit.split()[0] == "commit"
    assert command == "command  python -m bench.bench_x 'two words'"  # and no path of this machine
    monkeypatch.setattr(main, "__spec__", None)
    assert header().splitlines()[3] == "command  /somewhere/bench.py 'two words'"


def test_a_distribution_that_is_not_there_is_absent() -> None:
    assert timing.version("rlhf-no-such-distribution") == "absent"


def test_the_commit_says_whether_the_tree_differs_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
    assert timing.commit() == "no commit"
    git("init", "--quiet")
    (tmp_path / "timing.py").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    assert timing.commit() == git("rev-parse", "--short", "HEAD")
    (tmp_path / "timing.py").write_text("2")
    assert timing.commit() == git("rev-parse", "--short", "HEAD") + "+changes"
