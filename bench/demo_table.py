"""What `make demo` reached, seed by seed, as the table that the README shows.

    python -m bench.demo_table runs/movies runs/movies-seed1 runs/movies-seed2

writes bench/results/demo/table.md and plot.png (the first run's), and the table into README.md.
"""

import json
import platform
import re
import shutil
import sys
from pathlib import Path

from .timing import commit, processor, version

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "demo"
MARKS = re.compile(r"(<!-- demo table -->\n).*?(<!-- end of demo table -->)", re.DOTALL)


def table(folders: list[Path]) -> str:
    """One line a figure, one column a run; a figure that was not reached says so."""
    reports = [json.loads((folder / "report" / "result" / "results.json").read_text("utf-8")) for folder in folders]
    seeds = [json.loads((folder / "run.json").read_text("utf-8"))["config"]["run"]["seed"] for folder in folders]
    lines = ["| | wanted | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|---|" + "---|" * len(seeds)]
    for rows in zip(*reports, strict=True):
        cells = [f"{row['reached']}{'' if row['met'] else ' (NOT REACHED)'}<br>{row['beside']}" for row in rows]
        lines.append(f"| {rows[0]['what']} | {rows[0]['wanted']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table and the picture."""
    folders = [Path(name) for name in sys.argv[1:]]
    made = table(folders)
    RESULTS.mkdir(parents=True, exist_ok=True)
    where = (
        f"{processor()}; Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}; commit {commit()}"
    )
    command = "rlhf run examples/movies.toml --set run.seed=N --set run.folder=runs/movies-seedN"
    (RESULTS / "table.md").write_text(f"{made}\n{where}\n\nEach column: `{command}`\n", "utf-8")
    shutil.copy(folders[0] / "report" / "result" / "plot.png", RESULTS / "plot.png")
    readme = ROOT / "README.md"
    readme.write_text(MARKS.sub(lambda m: m[1] + made + m[2], readme.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
