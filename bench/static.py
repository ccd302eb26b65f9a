"""What the Triton kernels compile to, for four GPUs, on a machine that has none: `python -m bench.static`.

It prints the table and writes it to bench/results/static.md.

For each kernel and target: registers per thread, spills, shared memory, the widest load and store, and the bytes that
it moves per element against the least possible. A spill, or a narrow access on the wide axis, is an error.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .static_cases import Case, cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MOST_SHARED = 16 * 1024
RESULT = Path(__file__).parent / "results" / "static.md"
HEAD = f"""# What the Triton kernels compile to

Written by `python -m bench.static` with triton {triton.__version__}, without a GPU; V = 151,936. "load" and "store" are
the widest accesses to global memory. Bytes per element are those that the kernel's own loads and stores move."""


@dataclass(frozen=True)
class Row:
    """What one case compiled to on one target."""

    case: Case
    target: str
    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    faults: list[str] = field(default_factory=list)


def compiled(case: Case, target: str) -> Row:
    """Compile one case for one target, and read what came out."""
    names = list(case.signature)
    # What the launcher finds out of itself: pointers begin at 16 bytes, and sizes like 151,936 are multiples of 16.
    aligned = [(names.index(name),) for name, kind in case.signature.items() if kind.startswith("*") or kind == "i32"]
    source = ASTSource(
        case.kernel,
        signature=case.signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={at: [["tt.divisibility", 16]] for at in aligned},
    )
    warps = case.warps_of_64 if TARGETS[target].warp_size == 64 and case.warps_of_64 else case.warps
    made = triton.compile(source, target=TARGETS[target], options={"num_warps": warps})
    if target.startswith("sm_"):
        registers, spills = resources_of_cubin(made.asm["cubin"])
        loads, stores = ptx_widths(made.asm["ptx"])
    else:
        text = made.asm["amdgcn"]
        registers = largest(r"\.vgpr_count:\s+(\d+)", text)
        spills = largest(r"\.vgpr_spill_count:\s+(\d+)", text) + largest(r"\.sgpr_spill_count:\s+(\d+)", text)
        loads, stores = (
            32 * largest(rf"(?:global|buffer)_{access}_dwordx(\d)", text, otherwise=1) for access in ("load", "store")
        )
    row = Row(case, target, registers, spills, made.metadata.shared, loads, stores)
    row.faults.extend(faults(row))
    return row


def faults(row: Row) -> Iterator[str]:
    where = f"{row.case.name} on {row.target}"
    if row.spills:
        yield f"{where}: {row.spills} bytes of registers spilled to memory"
    if row.registers > row.case.most_registers * (2 if row.target == "gfx942" else 1):
        yield f"{where}: {row.registers} registers a thread, more than {row.case.most_registers}"
    if row.shared > MOST_SHARED:
        yield f"{where}: {row.shared} bytes of shared memory, more than {MOST_SHARED}"
    if row.case.wide and row.load_bits < 128:
        yield f"{where}: its widest load has {row.load_bits} bits, not 128"
    if row.case.wide and row.case.bytes_moved > row.case.bytes_least:
        yield f"{where}: it moves {row.case.bytes_moved} bytes per element, {row.case.bytes_least} would do"


def resources_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory (spills), as the assembler of the target reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return largest(r"REG:(\d+)", text.stdout), largest(r"LOCAL:(\d+)", text.stdout) + largest(
        r"STACK:(\d+)", text.stdout
    )


def ptx_widths(ptx: str) -> tuple[int, int]:
    """The widest access to global memory, in bits."""
    widest = {"ld": 0, "st": 0}
    for access, vector, bits in re.findall(r"(ld|st)\.global(?:\.[a-zA-Z_0-9:]+?)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        widest[access] = max(widest[access], int(vector or 1) * int(bits))
    return widest["ld"], widest["st"]


def largest(pattern: str, text: str, otherwise: int = 0) -> int:
    return max((int(found) for found in re.findall(pattern, text)), default=otherwise)


def table(rows: list[Row]) -> str:
    lines = [
        "| kernel | target | registers | spills | shared memory | load | store | bytes per element (least) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        moved = f"{row.case.bytes_moved:g} ({row.case.bytes_least:g})" if row.case.wide else "-"
        lines.append(
            f"| {row.case.name} | {row.target} | {row.registers} | {row.spills} | {row.shared} | {row.load_bits} bit | "
            f"{row.store_bits} bit | {moved} |"
        )
    return "\n".join(lines)


def main() -> None:
    rows = [compiled(case, target) for case in cases() for target in TARGETS]
    written = f"{HEAD}\n\n{table(rows)}\n"
    print(written)
    RESULT.write_text(written, "utf-8")
    if found := [fault for row in rows for fault in row.faults]:
        raise SystemExit("\n".join(["", *found]))


if __name__ == "__main__":
    main()
