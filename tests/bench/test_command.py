"""Every bench still runs (tiny, one round), the report stands alone, and the commands say what is missing."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from bench import command, readme_table, tables
from bench.case import Case
from bench.command import BenchError, Request, from_command_line
from bench.harness import OURS_TORCH, OURS_TRITON, Options, measure
from bench.measuring import OUT_OF_TIME, Clock, measure_all
from bench.record import Results
from bench.request import load, module_of, operations

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# Not in the common form; each has tests of its own.
ALONE = {"step"}


@pytest.mark.parametrize("operation", [name for name in operations() if name not in ALONE])
def test_the_bench_still_runs_and_ours_is_right(operation: str) -> None:
    bench = load(operation)
    assert bench.operation == operation
    for case in bench.cases([bench.tiny]):
        records = measure(bench, case, Options(CPU, rounds=1, seconds=0, compiled="not in a smoke run", least_rounds=1))
        of = {record.contestant: record for record in records}
        own = of[OURS_TORCH]
        assert own.right and own.milliseconds and own.backend == "torch", f"{case}: {own.why}"
        for record in records:
            assert record.milliseconds or record.why, record
            assert record.right is not False or record.backend, f"{case}: {record.contestant} {record.why}"
        assert len([record for record in records if record.milliseconds]) >= 2, "alone it is no comparison"


@pytest.mark.parametrize("operation", [name for name in operations() if name not in ALONE])
def test_the_declaration_is_sound(operation: str) -> None:
    bench = load(operation)
    axes = len(bench.axes.split(", "))
    swept = [shape for sizes in bench.sweeps.values() for shape in sizes.values()]
    for shape in [*bench.shapes, *bench.quick, bench.tiny, *bench.gpu_shapes, *swept]:
        assert len(shape) == axes, shape
    assert {"ours", "naive"} <= set(bench.contestants)
    for case in bench.cases(bench.shapes):
        assert bench.bytes_moved(case) > 0 and bench.flops(case) > 0


def test_the_step_bench_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours really steps; the rivals, which CI has not, are stood in for."""
    pytest.importorskip("transformers")
    from bench import bench_step
    from bench.steps import measure_steps
    from bench.subject import Setting, make_tokenizer

    small = Setting(vocabulary=64, hidden=16, intermediate=24, layers=2, heads=2, prompts=2, group=2, prompt_length=4)
    monkeypatch.setattr(bench_step, "SETTING", small)
    monkeypatch.setattr(bench_step, "TOKENIZER", make_tokenizer(small))
    for rival in ("hf_pretrain", "trl_grpo", "trl_reward", "trl_ppo"):
        monkeypatch.setattr(bench_step.peers, rival, lambda *arguments, **options: lambda: None)
    records = measure_steps(Options(CPU, rounds=1), Clock(None), show=False)
    assert [record.form for record in records if record.contestant == "ours"] == ["pretrain", "reward", "grpo", "ppo"]
    assert all(record.milliseconds and record.clock == "cpu" for record in records)

    def absent(*arguments: object) -> None:
        raise ImportError("this rival needs TRL")

    monkeypatch.setattr(bench_step.peers, "trl_reward", absent)
    records = measure_steps(Options(CPU, rounds=1), Clock(None), show=False)
    assert [record.why for record in records if not record.milliseconds] == ["this rival needs TRL"]


# ---------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the smoke run of one operation, two shapes, so that something can be drawn."""
    folder = tmp_path_factory.mktemp("report")
    asked = ["--ops", "linear_logprobs", "--shapes", "4x8x50,32x16x4000", "--device", "cpu", "--quick", "--rounds", "1"]
    assert from_command_line([*asked, "--json", str(folder / "a.json"), "--output", str(folder)]) == 0
    return folder


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "img"
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "data", "srcset")]
        assert tag not in ("script", "link", "iframe", "object")


def test_the_report_is_one_file_that_needs_no_other(report: Path) -> None:
    text = (report / "report.html").read_text("utf-8")
    links = Links()
    links.feed(text)
    assert links.pictures >= 3
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "@import" not in text and "url(" not in text


def test_the_report_holds_what_was_measured(report: Path) -> None:
    results = Results.load(report / "results.json")
    page, text = ((report / name).read_text("utf-8") for name in ("report.html", "results.md"))
    for record in results.records:
        for cell in (record.case, record.contestant):
            assert cell in page and cell in text
        assert not record.milliseconds or tables.spread(record.milliseconds) in page
    assert results.header["commit"] in page and "copy GB/s" in page
    assert len(list(report.glob("*.png"))) >= 3


def test_memory_and_huge_pages_are_measured_for_all_that_have_a_time(report: Path) -> None:
    timed = [record for record in Results.load(report / "results.json").records if record.milliseconds]
    assert len(timed) >= 12
    assert all(record.peak_bytes is not None and record.huge_pages is not None for record in timed)
    naive = next(record for record in timed if record.contestant == "naive" and record.shape == (32, 16, 4000))
    assert naive.peak_bytes is not None and naive.peak_bytes > 2 * 4 * 32 * 4000  # logits and their log-softmax


def test_a_big_call_s_memory_is_counted_to_the_megabyte() -> None:
    from bench.peak_memory import Server

    bench = load("token_logprobs")
    case = Case((4, 64, 16_000))  # logits of 16.4 MB
    with Server() as server:
        naive = server.peak(bench, module_of("token_logprobs"), case, "naive")
        again = server.peak(bench, module_of("token_logprobs"), case, "naive")
    assert naive == pytest.approx(16.4e6, abs=1.5e6)  # the log-softmax
    assert again == pytest.approx(naive, abs=0.5e6)


# --------------------------------------------------------------------------------------------- the README


def test_the_readme_s_table_is_made_from_the_published_results() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    shown = text.partition("<!-- bench table -->\n")[2].partition("<!-- end of bench table -->")[0]
    if not shown:
        pytest.skip("the README has no such table yet")
    assert shown == readme_table.render(Results.load(readme_table.RESULTS))


def test_the_table_is_written_between_its_marks(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    monkeypatch.setattr(readme_table, "ROOT", tmp_path)
    monkeypatch.setattr(readme_table, "RESULTS", report / "results.json")
    readme.write_text("a\n", "utf-8")
    with pytest.raises(ValueError, match="has no lines"):
        readme_table.main()
    readme.write_text("a\n<!-- bench table -->\nold\n<!-- end of bench table -->\nb\n", "utf-8")
    readme_table.main()
    made = readme_table.render(Results.load(report / "results.json"))
    assert readme.read_text("utf-8") == f"a\n<!-- bench table -->\n{made}<!-- end of bench table -->\nb\n"
    assert "| `linear_logprobs` | 4 |" in made


# ------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "gaee"], "there is no bench of gaee; there is "),
        (["--shapes", "4,x"], "'4,x' is not of the form 8x128x4096"),
        (["--ops", "token_logprobs", "--shapes", "4x5"], r"\(4, 5\) has 2 axes; the operations asked for have 3"),
        (["--ops", "step", "--shapes", "4x5"], "the operations asked for have no shapes"),
        (["--ops", "gae", "--shapes", "4x-5"], "'4x-5' has a size below 1"),
        (["--ops", "gae", "--minutes", "0"], "--minutes 0: it must be more than 0"),
        (["--ops", "gae", "--rounds", "-1"], "--rounds -1: it must be at least 1"),
        (["--ops", "gae, gaee"], "there is no bench of gaee; there is "),
        (["--compare", "no/such.json"], "No such file"),
    ],
)
def test_what_is_not_there_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert from_command_line([*arguments, "--smoke", "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_report_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"pip install 'rlhf-engine\[bench\]'"):
        command.bench(Request())


def test_a_run_that_is_out_of_time_says_what_it_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    results = measure_all(Request(ops=["linear_logprobs"], smoke=True, minutes=1e-6, device="cpu"))
    assert {record.why for record in results.records} == {OUT_OF_TIME}
    assert "out of time" in capsys.readouterr().out


def test_times_without_those_of_huge_pages_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "killed for memory")
    monkeypatch.setattr("bench.measuring.subprocess.run", lambda *told, **options: failed)
    results = measure_all(Request(ops=["masked_mean"], shapes=[(2, 8)], quick=True, rounds=1, device="cpu"))
    assert any(record.milliseconds for record in results.records)
    assert not any(record.huge_pages for record in results.records)
    printed = capsys.readouterr().out
    assert "no times with huge pages: " in printed and "killed for memory" in printed


def test_an_operation_may_take_twice_its_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("bench.measuring.time.monotonic", lambda: now[0])
    whole = Clock(10)
    part = whole.share(5)
    assert part.left == pytest.approx(240) and whole.share(1).left == 600
    now[0] += 241
    assert part.over and not whole.over and Clock(None).share(3).left is None


def test_ours_wrong_is_told_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.bench.toy import toy

    monkeypatch.setattr("bench.measuring.load", lambda name: toy(ours=lambda x: 3 * x))
    assert from_command_line(["--ops", "token_logprobs", "--smoke", "--device", "cpu"]) == 1
    assert "OURS FAILED: token_logprobs [2, 4] float32 forward, ours, torch: output 0 is off" in capsys.readouterr().out


def test_rlhf_bench_is_the_same_command(tmp_path: Path) -> None:
    """As `rlhf_bench`, which an installed package is; a checkout's folder is linked here under that name."""
    (tmp_path / "rlhf_bench").symlink_to(ROOT / "bench")
    path = os.pathsep.join(filter(None, [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    told = [sys.executable, "-m", "rlhf_engine", "bench", "--ops"]
    run = [*told, "linear_logprobs", "--shapes", "8x16x100", "--json", "out.json", "--quick"]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = Results.load(tmp_path / "out.json").records
    assert any(record.contestant == OURS_TORCH and record.peak_bytes is not None for record in records)
    assert any(record.contestant == OURS_TRITON and not record.milliseconds for record in records)


def test_rlhf_bench_without_its_files_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_engine import cli

    monkeypatch.setitem(sys.modules, "rlhf_bench", None)
    with pytest.raises(cli.BenchMissing, match=r"rlhf bench needs rlhf_bench.*pip install 'rlhf-engine\[bench\]'"):
        cli.bench()


def test_the_engine_does_not_import_the_benchmarks() -> None:
    code = "import sys, rlhf_engine.cli; print([name for name in sys.modules if 'bench' in name.split('.')[0]])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
