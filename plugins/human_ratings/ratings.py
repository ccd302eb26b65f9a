"""Reading the individual human ratings that came with VADER (Hutto and Gilbert, ICWSM 2014)."""

from __future__ import annotations

import ast
import io
import tarfile
from dataclasses import dataclass
from hashlib import sha256
from html import unescape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_engine.split import normalise

__all__ = ["FILES", "RatedTexts", "read_ratings"]

FILES = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "news": "nytEditorialSnippets",
}
"""domain -> how its two files are called"""

_SIZE = 2_466_783
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_LOWEST, _HIGHEST = -4, 4


@dataclass(frozen=True, kw_only=True)
class RatedTexts:
    """Texts with what their raters said."""

    texts: list[str]
    means: NDArray[np.float64]
    """[N]: mean ratings, in -4..4"""
    shares: NDArray[np.float64]
    """[N, 9]: the share of a text's raters who gave -4, -3, ... 4"""

    def pick(self, rows: list[int]) -> RatedTexts:
        """The texts of these rows, in that order."""
        return RatedTexts(texts=[self.texts[row] for row in rows], means=self.means[rows], shares=self.shares[rows])

    def strengths(self) -> NDArray[np.float64]:
        """[N, N]: P(a random rater of text i gives more than a random rater of text j) + half of P(equal)."""
        below = np.cumsum(self.shares, axis=1) - self.shares
        return self.shares @ (below + self.shares / 2).T


def read_ratings(path: Path, domain: str) -> RatedTexts:
    """All texts of a domain, in the file's order, each once, with HTML entities (`&amp;`) resolved.

    A text whose two files disagree about its mean is left out: its ratings belong to another text (199 of the
    4,200 tweets, none elsewhere). Raises FileNotFoundError or ValueError if `path` is not the source
    distribution of vaderSentiment 3.3.2.
    """
    with (
        tarfile.open(fileobj=io.BytesIO(_read_checked(path))) as distribution,
        tarfile.open(fileobj=distribution.extractfile(_ARCHIVE)) as archive,
    ):
        truth, ratings = (
            _read_rows(archive, f"hutto_ICWSM_2014/{FILES[domain]}_{kind}.txt")
            for kind in ("GroundTruth", "anonDataRatings")
        )
    texts: dict[str, str] = {}
    means, shares = [], []
    for key, (mean, text) in truth.items():
        listed_mean, _deviation, listed = ratings[key]
        text = unescape(unescape(text)).strip()  # twice: the news have &amp;amp;
        if normalise(text) in texts or abs(float(mean) - float(listed_mean)) > 0.001:
            continue
        texts[normalise(text)] = text
        given = np.array(ast.literal_eval(listed))
        # Not the printed mean: it is rounded, so that equal means would differ.
        means.append(given.sum() / len(given))
        shares.append(np.bincount(given - _LOWEST, minlength=_HIGHEST - _LOWEST + 1) / len(given))
    return RatedTexts(texts=list(texts.values()), means=np.array(means), shares=np.stack(shares))


def _read_checked(path: Path) -> bytes:
    remedy = f"Get it with: pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2 -d {path.parent}"
    if not path.is_file():
        raise FileNotFoundError(
            f"human_ratings: {path.absolute()} is missing; it should be the source distribution of "
            f"vaderSentiment 3.3.2, which holds the ratings (the wheel does not). {remedy}"
        )
    content = path.read_bytes()
    if len(content) != _SIZE or sha256(content).hexdigest() != _SHA256:
        raise ValueError(
            f"human_ratings: {path.absolute()} is damaged or another version: {len(content):,} bytes with sha256 "
            f"{sha256(content).hexdigest()}, expected {_SIZE:,} bytes with {_SHA256}. Delete it. {remedy}"
        )
    return content


def _read_rows(archive: tarfile.TarFile, name: str) -> dict[str, list[str]]:
    member = archive.extractfile(name)
    assert member is not None, name
    # Not splitlines(): it would also split at characters that stand inside a text.
    lines = filter(None, member.read().decode("utf-8-sig").split("\r\n"))
    return {key: columns for key, *columns in (line.split("\t") for line in lines)}
