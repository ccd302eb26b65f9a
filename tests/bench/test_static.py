"""Every kernel compiles for four GPUs, as it should, on a machine that has none."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]


RESULT = ROOT / "bench/results/static.md"


def rows_of(table: str) -> list[list[str]]:
    return [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]


@pytest.fixture(scope="module")
def committed() -> str:
    return RESULT.read_text("utf-8")


@pytest.fixture(scope="module")
def printed(committed: str) -> str:
    """What the command prints, in a process of its own: here Triton may be in its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.static"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )
    RESULT.write_text(committed, "utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_kernel_compiles_for_every_target_without_a_fault(printed: str) -> None:
    from bench.static import TARGETS

    rows = rows_of(printed)
    assert {row[1] for row in rows} == set(TARGETS)
    assert len(rows) % len(TARGETS) == 0 and len(rows) >= 10 * len(TARGETS)
    assert all(int(row[2]) > 10 and int(row[3]) == 0 for row in rows)


def test_the_committed_table_is_of_these_kernels(committed: str, printed: str) -> None:
    """Not its figures, which are those of the Triton that it names."""
    assert [row[:2] for row in rows_of(committed)] == [row[:2] for row in rows_of(printed)]


def test_every_kernel_in_the_package_is_compiled(printed: str) -> None:
    from rlhf_kernels import backend

    kernels = [name for name in backend.operations() if backend.has_kernel(name)]
    for name in kernels:
        assert f"| {name} " in printed, f"{name} has a Triton kernel, and bench/static.py has no case of it"


def test_a_fault_is_named() -> None:
    from bench.static import Case, Row, faults

    case = Case("k", None, {}, {}, 4, bytes_moved=2, bytes_least=2)
    good = Row(case, "sm_90", registers=40, spills=0, shared=0, load_bits=128, store_bits=128)
    assert list(faults(good)) == []
    bad = {
        "spilled": replace(good, spills=8),
        "200 registers": replace(good, registers=200),
        "shared memory": replace(good, shared=10**6),
        "widest load has 32 bits": replace(good, load_bits=32),
        "4 bytes per element, 2 would do": replace(good, case=replace(case, bytes_moved=4)),
    }
    for message, row in bad.items():
        (fault,) = faults(row)
        assert message in fault


def test_the_reading_of_ptx_and_of_the_resources() -> None:
    from bench.static import largest, ptx_widths

    ptx = "ld.global.v4.b32 {%r1}; @%p1 ld.global.L1::evict_first.b16 %rs1; st.global.v2.b32 [%rd1]; st.global.b8"
    assert ptx_widths(ptx) == (128, 64)
    assert largest(r"REG:(\d+)", " REG:40 STACK:0\n REG:56 STACK:0") == 56
