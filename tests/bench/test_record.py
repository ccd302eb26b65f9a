"""Results survive the file, and a comparison finds what got slower and nothing else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench.command import from_command_line
from bench.harness import Options, measure
from bench.record import Record, Results, Spread, drift, header, regressions
from tests.bench.toy import ROGUES, toy


@pytest.fixture(scope="module")
def results() -> Results:
    bench = toy(**ROGUES)
    records = []
    for case in bench.cases([(4, 8), (64, 128)]):
        limits = {"copy GB/s": 10.0}
        records += measure(bench, case, Options(torch.device("cpu"), 3, 0, "not here"), limits)
    records = [
        dataclasses.replace(record, milliseconds=Spread(2.0, 1.5, 2.5), huge_pages=Spread(1.0, 0.9, 1.1), peak_bytes=4)
        if record.milliseconds
        else record
        for record in records
    ]
    return Results(header(), {"copy GB/s": 10.0}, records)


def test_the_file_gives_back_what_was_saved(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "deep" / "results.json")
    assert Results.load(tmp_path / "deep" / "results.json") == results


def test_the_header_says_where_and_how(results: Results) -> None:
    assert results.header["versions"]["torch"] == torch.__version__
    assert {"device", "commit", "command", "huge_pages"} <= set(results.header)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"header": {}, "ceilings": {}, "records": [{"operation": "x"}]}'])
def test_another_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a file of this version's `rlhf bench --json`"):
        Results.load(tmp_path / "x.json")


def with_times(results: Results, index: int, **changes: object) -> Results:
    records = list(results.records)
    records[index] = dataclasses.replace(records[index], **changes)
    return dataclasses.replace(results, records=records)


def mine(results: Results) -> int:
    return next(at for at, record in enumerate(results.records) if record.is_ours and record.milliseconds)


def test_nothing_got_slower_where_nothing_changed(results: Results) -> None:
    assert list(regressions(results, results)) == []
    assert drift(results, results) == 1.0


def test_a_planted_regression_is_found(results: Results) -> None:
    slower = with_times(results, mine(results), milliseconds=Spread(2.8, 2.6, 3.0))
    [found] = regressions(results, slower)
    assert found == "token_logprobs [4, 8] float32 forward, ours, torch: 2 ms (1.5-2.5) before, now 2.8 ms (2.6-3)"


def test_within_the_spread_of_both_runs_nothing_is_found(results: Results) -> None:
    assert not list(regressions(results, with_times(results, mine(results), milliseconds=Spread(2.8, 2.4, 3.0))))
    assert not list(regressions(results, with_times(results, mine(results), milliseconds=Spread(1.0, 0.9, 1.1))))


def test_a_rival_that_got_slower_is_drift_of_the_machine_and_no_regression(results: Results) -> None:
    rivals = [at for at, record in enumerate(results.records) if record.contestant == "naive"]
    moved = results
    for at in rivals:
        moved = with_times(moved, at, milliseconds=Spread(4.0, 3.5, 4.5))
    assert list(regressions(results, moved)) == []
    assert drift(results, moved) == 2.0


def test_what_the_rivals_of_the_case_lost_too_is_no_regression(results: Results) -> None:
    moved = with_times(results, mine(results), milliseconds=Spread(2.8, 2.6, 3.0))
    for at, record in enumerate(results.records):
        if record.contestant == "naive":
            moved = with_times(moved, at, milliseconds=Spread(4.0, 3.5, 4.5))
    assert not list(regressions(results, moved))


def test_to_lose_ones_time_is_a_regression_and_to_run_out_of_time_is_none(results: Results) -> None:
    lost = with_times(results, mine(results), milliseconds=None, right=False, why="output 0 is off by 1e+00")
    assert ["now no time: output 0 is off by 1e+00" in line for line in regressions(results, lost)] == [True]
    late = with_times(results, mine(results), milliseconds=None, why="out of time: ...")
    assert list(regressions(results, late)) == []


def test_the_command_compares_and_its_status_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, again = tmp_path / "old.json", tmp_path / "again.json"
    run = ["--ops", "linear_logprobs", "--smoke", "--device", "cpu"]
    assert from_command_line([*run, "--json", str(old)]) == 0
    found = json.loads(old.read_text())
    for record in found["records"]:  # nobody can be slower than this, or faster
        if record["milliseconds"]:
            record["milliseconds"] = {"median": 1e6, "low": 1e6, "high": 1e6}
    again.write_text(json.dumps(found))
    capsys.readouterr()
    assert from_command_line([*run, "--compare", str(again)]) == 0
    assert "of 2, 0 slower beyond the spread" in capsys.readouterr().out
    for record in found["records"]:  # and of this only ours, or it would be the machine
        if record["milliseconds"] and record["contestant"].startswith("ours"):
            record["milliseconds"] = {"median": 1e-6, "low": 1e-6, "high": 1e-6}
    again.write_text(json.dumps(found))
    assert from_command_line([*run, "--compare", str(again)]) == 1
    printed = capsys.readouterr().out
    assert "2 slower beyond the spread" in printed and "linear_logprobs [8, 16, 100] bfloat16" in printed
    none = [*run[:1], "masked_mean", *run[2:], "--compare", str(again)]
    assert from_command_line(none) == 2
    assert "nothing that was measured now was measured then" in capsys.readouterr().err
    found["header"]["device"] = "an abacus"
    again.write_text(json.dumps(found))
    assert from_command_line([*run, "--compare", str(again)]) == 2
    told = capsys.readouterr()
    assert "of another device (an abacus)" in told.err
    assert "linear_logprobs" not in told.out, "measured before it was refused"


def test_a_record_is_known_by_its_case_and_contestant() -> None:
    record = Record(
        operation="o",
        axes="N",
        shape=(1,),
        dtype="float32",
        direction="forward",
        contestant="ours, torch",
        device="cpu",
    )
    assert dataclasses.replace(record, backend="triton").key == record.key
    assert dataclasses.replace(record, form="GSPO").key != record.key
