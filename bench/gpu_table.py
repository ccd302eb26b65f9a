"""The short table that bench/gpu.sh ends with: `python -m bench.gpu_table OUTDIR`. Beside each time stands what the
kernels must reach on an H100 SXM, where that was laid down: N = 8192 tokens, V = 151,936, H = 4096, bfloat16."""

import json
import statistics
import sys
from pathlib import Path

from . import tables
from .case import BOTH, FORWARD
from .record import Record, Results

# (operation, shape, direction, form) -> milliseconds. Forward and backward together are the sum of both bounds.
MUST_REACH = {
    ("token_logprobs", (8, 1024, 151_936), FORWARD, "with entropy"): 0.83,
    ("token_logprobs", (8, 1024, 151_936), BOTH, ""): 0.83 + 1.65,
    ("linear_logprobs", (8192, 4096, 151_936), BOTH, ""): 60.0,
    ("exact_kl", (8, 1024, 151_936), FORWARD, ""): 1.65,
    ("exact_kl", (8, 1024, 151_936), BOTH, ""): 1.65 + 2.5,
    ("gae", (1024, 8192), FORWARD, ""): 0.063,
    ("shaped_gae", (1024, 8192), FORWARD, ""): 0.102,
}


def kernels(results: Results) -> str:
    """A row a case: ours, what it must reach, the best rival, the share of the ceiling."""
    heads = ("operation", "case", "ours ran on", "ms", "must reach", "best rival over ours", "of ceiling")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for operation, records in tables.grouped(results.records).items():
        for case, of in tables.by_case(records).items():
            mine = tables.ours_of(of)
            if mine is None or mine.milliseconds is None:
                why = next((record.why for record in of if record.is_ours and record.why), "not timed")
                lines.append(f"| {operation} | {case} | - | {why} | | | |")
                continue
            must = must_reach(mine)
            share = "-" if mine.of_ceiling is None else f"{mine.of_ceiling:.0%} {mine.ceiling}"
            lines.append(
                f"| {operation} | {case} | {mine.backend} | {tables.spread(mine.milliseconds)} | "
                f"{_verdict(mine.milliseconds.median, must)} | {tables.verdict(of)} | {share} |"
            )
    return "\n".join(lines)


def must_reach(record: Record) -> float | None:
    if record.dtype not in ("bfloat16", "float32") or (record.dtype == "float32" and record.shape[-1] == 151_936):
        return None
    return MUST_REACH.get((record.operation, record.shape, record.direction, record.form))


def _verdict(taken: float, must: float | None) -> str:
    return "-" if must is None else f"{must:.3g}: {'reached' if taken <= must else 'NOT reached'}"


def steps(found: dict[str, dict]) -> str:
    lines = ["| step | ms, median | GB at most |", "|---|---|---|"]
    for name, result in found.items():
        times, held = result.get("milliseconds"), result.get("peak_bytes")
        cells = [f"{statistics.median(times):.0f}" if times else result["why"], f"{held / 1e9:.1f}" if held else "-"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory(found: dict[str, dict]) -> str:
    lines = ["| log-probs from hidden states, forward and backward | longest | MB there | then |", "|---|---|---|---|"]
    for name, result in found.items():
        longest = max(map(int, result["bytes"]), default=0)
        held = f"{result['bytes'][str(longest)] / 1e6:.0f}" if longest else "-"
        lines.append(f"| {name} | {longest} | {held} | {result['end']} |")
    return "\n".join(lines)


def main() -> None:
    """Print what is there."""
    folder = Path(sys.argv[1])
    if (folder / "kernels.json").is_file():
        results = Results.load(folder / "kernels.json")
        print(f"```\n{tables.head(results)}\n```\n\n{kernels(results)}\n")
    for name, shown in (("steps", steps), ("memory", memory)):
        if (folder / f"{name}.json").is_file():
            print(shown(json.loads((folder / f"{name}.json").read_text("utf-8"))) + "\n")
    parts = (line.split("\t") for line in (folder / "parts.txt").read_text("utf-8").splitlines())
    print("| part | took | |\n|---|---|---|\n" + "\n".join(f"| {' | '.join(part)} |" for part in parts))


if __name__ == "__main__":
    main()
