"""Who is wrong, falls back or is missing gets no time; what stands in a record is what was measured."""

import dataclasses
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import backends, harness, judging
from bench.case import BOTH, Case
from bench.harness import COMPILED, OURS_TORCH, OURS_TRITON, Options, measure
from bench.record import Record
from rlhf_kernels import backend, token_logprobs
from tests.bench.toy import ROGUES, double, toy

CPU = torch.device("cpu")
QUICK = Options(CPU, rounds=2, seconds=0, compiled="not here", least_rounds=2)
CEILINGS = {"copy GB/s": 10.0, "matmul float32 TFLOP/s": 1.0}


def records(bench: Any, case: Case, options: Options = QUICK) -> dict[str, Record]:
    return {record.contestant: record for record in measure(bench, case, options, CEILINGS)}


@pytest.fixture(scope="module")
def found() -> dict[str, Record]:
    return records(toy(**ROGUES), Case((4, 8), direction=BOTH))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong", "output 0 is off by"),
        ("wrong_gradient", "the gradient of x is off by 1.0e+00 of its largest"),
        ("wrong_shape", "output 0 is off by inf"),
        ("nan", "output 0 is off by inf"),
        ("breaks", "raises KeyError: 'inside'"),
    ],
)
def test_a_wrong_contestant_gets_no_time(found: dict[str, Record], name: str, why: str) -> None:
    assert found[name].milliseconds is None and found[name].ratio is None
    assert found[name].right is False
    assert why in found[name].why


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("refuses", "not offered: no doubles here"),
        ("absent", "rlhf-no-such-distribution is not installed"),
        (COMPILED, "not here"),
        (OURS_TRITON, "no GPU; Triton's interpreter is not timed"),
    ],
)
def test_who_takes_no_part_says_why_and_is_not_wrong(found: dict[str, Record], name: str, why: str) -> None:
    if name == OURS_TRITON and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert (found[name].milliseconds, found[name].right, found[name].why) == (None, None, why)


def test_a_wrong_gradient_does_not_matter_forward() -> None:
    assert records(toy(**ROGUES), Case((4, 8)))["wrong_gradient"].milliseconds is not None


def test_the_right_ones_get_all_that_a_record_has(found: dict[str, Record]) -> None:
    for name in (OURS_TORCH, "naive"):
        record = found[name]
        assert record.right and record.backend == "torch" and record.why == ""
        time, ratio = record.milliseconds, record.ratio
        assert time is not None and 0 < time.low <= time.median <= time.high
        assert ratio is not None and ratio.low <= ratio.median <= ratio.high
        assert record.gb_per_second == pytest.approx(record.least_bytes / time.median / 1e6)  # type: ignore[operator]
        least = 8 * 32 / 10e9  # seconds: the bytes at the ceiling of copying; the arithmetic would take less
        assert record.ceiling == "copy" and record.of_ceiling == pytest.approx(1e3 * least / time.median)
        assert record.first_call_seconds is not None and record.rounds == 2
    assert found[OURS_TORCH].ratio == type(found[OURS_TORCH].ratio)(1.0, 1.0, 1.0)


def test_a_time_that_no_machine_could_take_is_bounded_by_the_longer_of_its_limits() -> None:
    from bench.ceilings import limit

    assert limit(CEILINGS, "float32", least_bytes=10e9, least_flops=1) == (1.0, "copy")
    assert limit(CEILINGS, "float32", least_bytes=1, least_flops=2e12) == (2.0, "matmul")
    assert limit({"copy GB/s": 10.0}, "float16", least_bytes=10e9, least_flops=9e12) == (1.0, "copy")  # not measured
    slow = {**CEILINGS, "matmul bfloat16 TFLOP/s": 0.5}  # float32 is the faster way then
    assert limit(slow, "bfloat16", least_bytes=1, least_flops=2e12) == (2.0, "matmul")


# ------------------------------------------------------------------------------------------- what really ran


def test_the_backend_is_what_ran_and_not_what_was_asked_for() -> None:
    logits, tokens = torch.randn(2, 8), torch.zeros(2, dtype=torch.long)
    with backends.watching() as seen:
        token_logprobs(logits, tokens)
    assert (seen.backend, seen.launches) == ("torch", [])
    with backend.using("triton"), backends.watching() as seen:
        token_logprobs(logits, tokens)
    assert seen.backend == "triton" and str(seen).startswith("triton, 2 launches: "), str(seen)


def test_a_silent_fallback_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for its kernel, it computes the right thing on torch."""
    everybody = harness.contestants

    def with_kernel(*arguments: Any) -> list[harness.Contestant]:
        return [
            dataclasses.replace(one, missing="", mode="") if one.name == OURS_TRITON else one
            for one in everybody(*arguments)
        ]

    monkeypatch.setattr(harness, "contestants", with_kernel)
    record = records(toy(), Case((4, 8)))[OURS_TRITON]
    assert record.right and record.milliseconds is None
    assert record.why == "fell back: triton was asked for, torch ran"


def test_torch_compile_that_does_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    record = records(toy(), Case((4, 8)), dataclasses.replace(QUICK, compiled=""))[COMPILED]
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        assert record.why == "no C++ compiler here"
    else:
        assert record.why == "fell back: compile was asked for, torch ran"


def test_torch_compile_is_seen_to_compile() -> None:
    compiled = torch.compile(double, fullgraph=True, backend="eager")
    with backends.watching() as seen:
        compiled(torch.ones(3))
    assert seen.backend == "compile"
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------- the measuring


def test_inputs_take_turns_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"x": torch.zeros(1000), "flag": True}
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 10_000)
    sets = harness.sets_of(inputs, CPU)
    assert len(sets) == 5  # twice the cache
    assert len({one["x"].data_ptr() for one in sets}) == 5 and all(one["flag"] for one in sets)
    monkeypatch.setattr(harness, "MOST_INPUTS", 8000)
    assert len(harness.sets_of(inputs, CPU)) == 2
    monkeypatch.setattr(harness, "MOST_INPUTS", 1)
    assert len(harness.sets_of(inputs, CPU)) == 1


def test_every_call_gets_the_next_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 4 * 128)
    monkeypatch.setattr(harness, "SAMPLE_SECONDS", 0.0)
    places: list[int] = []

    def spy(x: Tensor) -> Tensor:
        places.append(x.data_ptr())
        return 2 * x

    measure(toy(spy=spy, other=double), Case((4, 8)), QUICK)
    timed = places[2:]  # the first two calls are the check's and the warm-up
    assert len(set(timed)) > 1


def test_a_large_case_is_checked_on_some_rows_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "CHECKED_IN_FULL", 16 * 128)
    bench = toy(last_row_wrong=lambda x: torch.cat([2 * x[:-1], 3 * x[-1:]]), wrong=ROGUES["wrong"])
    found = records(bench, Case((64, 128), direction=BOTH))
    assert found[OURS_TORCH].checked == "16 of 64 rows, gradient of x" and found[OURS_TORCH].right
    assert found["wrong"].right is False and found["last_row_wrong"].right is False
    monkeypatch.setattr(judging, "CHECKED_IN_FULL", 1)
    found = records(bench, Case((64, 128)))
    assert found[OURS_TORCH].checked == "2 of 64 rows, gradient of nothing"
    assert found["last_row_wrong"].right is False


def test_what_16_bits_explain_is_not_wrong_for_a_rival_but_for_ours() -> None:
    case = Case((4, 8), torch.bfloat16)
    rounded = {"ours": lambda x: 2.02 * x, "rival": lambda x: 2.02 * x}
    found = records(toy(**rounded), case)
    assert found["rival"].right and found["rival"].milliseconds is not None
    assert found[OURS_TORCH].right is False and found[OURS_TORCH].milliseconds is None
    assert found["rival"].ratio is None  # to whom?
