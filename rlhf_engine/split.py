"""Which part of the data a text belongs to, decided by the text alone.

Two data sets that share texts agree on every one of them without knowing of each other, and so do two machines:
a text that one of them holds out is in no training data of the other.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import sha256
from html import unescape

from rlhf_engine.batch import Split

__all__ = ["normalise", "part"]

# The fourth draw: before the demo's settings were chosen, figures on what the first three hold out were looked at. On
# this one nothing was chosen. Whoever tunes on what it holds out should count on once more.
_SPLIT = b"split 4: "
_NOT_LETTERS_OR_DIGITS = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """The letters and digits of a text in lower case, without accents.

    What data sets do to the same text (case, spaces around punctuation, `&amp;` for `&`, curly quotes) makes no
    difference, so equal results mean the same text.
    """
    plain = unescape(unescape(text))  # twice: some data sets have &amp;amp;
    return _NOT_LETTERS_OR_DIGITS.sub("", unicodedata.normalize("NFKD", plain).casefold())


def part(text: str, *, heldout: float = 0.1, gold: float = 0.1) -> Split:
    """The split of a text: the first `heldout` of all texts, the next `gold`, and `train` for the rest.

    The order is that of sha256 over "split 4: " and the normalised text, read as a number u in [0, 1): u < heldout is
    "heldout", u < heldout + gold is "gold". So `heldout` must be the same for data sets that may share texts,
    whereas `gold` may be 0 for one of them only if its texts occur in no gold part of another.

    Raises ValueError if the shares are negative or add up to more than 1.
    """
    if heldout < 0 or gold < 0 or heldout + gold > 1:
        raise ValueError(f"part(heldout={heldout}, gold={gold}): both must be at least 0, and together at most 1")
    digest = sha256(_SPLIT + normalise(text).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < heldout:
        return "heldout"
    return "gold" if position < heldout + gold else "train"
