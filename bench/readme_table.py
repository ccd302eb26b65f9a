"""The README's table of benchmarks, made from the results that are published with it.

python -m bench.readme_table        reads bench/results/cpu/results.json, writes the table into README.md
"""

import re
from pathlib import Path

from . import tables
from .record import Results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu" / "results.json"
MARKS = re.compile(r"(<!-- bench table -->\n).*?(<!-- end of bench table -->)", re.DOTALL)


def render(results: Results) -> str:
    """The summary, and where it was taken."""
    head = results.header
    limits = ", ".join(f"{name} {found:.3g}" for name, found in results.ceilings.items())
    where = f"{head['device']}; torch {head['versions']['torch']}; commit {head['commit']}; measured ceilings: {limits}"
    return f"{tables.summary(results)}\n\n{where}. Made by `{head['command']}` and `python -m bench.readme_table`.\n"


def main() -> None:
    """Raises ValueError where the README has no place for it."""
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    if not MARKS.search(text):
        raise ValueError("README.md has no lines `<!-- bench table -->` and `<!-- end of bench table -->`")
    made = render(Results.load(RESULTS))
    readme.write_text(MARKS.sub(lambda marks: marks[1] + made + marks[2], text), "utf-8")


if __name__ == "__main__":
    main()
