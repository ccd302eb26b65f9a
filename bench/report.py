"""The report of a run: one HTML file with its pictures inside, the pictures beside it, and the tables as Markdown."""

import base64
import html
import sys
from pathlib import Path

from . import plots, request, tables
from .record import Record, Results

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: 13px; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.ours td { background: #eaf2fa; } tr.untimed td { color: #777; } img { max-width: 100%; }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e6e6e6; } pre { background: #22252b; }
th, td { border-color: #333; } tr.ours td { background: #1d2c3d; } img { background: white; } }
"""
READING = """Every time is the median of rounds in which all contestants took turns; "over ours" is paired round by
round. A contestant whose answer is wrong, or that silently ran something else than it should, gets no time. "of
ceiling" is the least possible time of the case (its least traffic at the measured copy bandwidth, or its least
arithmetic at the measured speed of a matrix product, whichever is longer) over the measured time; small inputs, of
which up to 32 copies take turns, may still lie in a large cache, and then it can pass 100 %. "huge pages" was
taken in another process with THP_MEM_ALLOC_ENABLE=1, which lets torch ask for pages of 2 MB. "first call" holds
compilation and warm-up and is in no other time. Memory is what a call adds to its inputs at most."""


def write(results: Results, folder: Path) -> list[Path]:
    """report.html, results.md and the PNG files; returns them, the report first."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(results, folder, _sweeps(results))
    page, text = folder / "report.html", folder / "results.md"
    page.write_text(render(results, pictures), "utf-8")
    text.write_text(markdown(results), "utf-8")
    return [page, text, folder / "results.json", *pictures]


def _sweeps(results: Results) -> dict[str, dict[str, dict[int, tuple[int, ...]]]]:
    found = {}
    for operation in tables.grouped(results.records):
        if operation in request.operations() and operation != "step":
            found[operation] = {axis: dict(sizes) for axis, sizes in request.load(operation).sweeps.items()}
    return found


def markdown(results: Results) -> str:
    parts = [f"# Benchmarks\n\n```\n{tables.head(results)}\n```\n\n{READING}\n\n{tables.summary(results)}"]
    for operation, records in tables.grouped(results.records).items():
        untimed = "".join(f"- {reason}\n" for reason in tables.untimed(records))
        timed = [record for record in records if record.milliseconds]
        parts.append(f"## {operation}\n\n{tables.times(records)}\n\n{tables.full(timed)}\n\n{untimed}")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def render(results: Results, pictures: list[Path]) -> str:
    """The page: nothing in it points outside."""
    shown = "".join(
        f'<h3>{html.escape(path.stem)}</h3><img alt="{html.escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    sections = "".join(
        f"<details><summary>{html.escape(operation)}: {len(records)} records</summary>{_table(records)}"
        f"<ul>{''.join(f'<li>{html.escape(reason)}</li>' for reason in tables.untimed(records))}</ul></details>"
        for operation, records in tables.grouped(results.records).items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>rlhf bench</title><style>{STYLE}</style>'
        f"</head><body><h1>rlhf bench</h1><pre>{html.escape(tables.head(results))}</pre><p>{html.escape(READING)}</p>"
        f"<h2>Summary</h2>{_of_markdown(tables.summary(results))}<h2>Pictures</h2>{shown}<h2>Records</h2>{sections}"
        "</body></html>\n"
    )


def _table(records: list[Record]) -> str:
    rows = "".join(
        f'<tr class="{"untimed" if not record.milliseconds else "ours" if record.is_ours else ""}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in tables.full_row(record))
        + "</tr>"
        for record in records
    )
    return f"<table><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in tables.COLUMNS)}</tr>{rows}</table>"


def _of_markdown(text: str) -> str:
    head, _, *body = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines())
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>{rows}</table>"


if __name__ == "__main__":  # python -m bench.report RESULTS.json FOLDER
    print(*write(Results.load(Path(sys.argv[1])), Path(sys.argv[2])), sep="\n")
