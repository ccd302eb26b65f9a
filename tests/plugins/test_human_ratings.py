from itertools import islice, pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_engine.manager import manager
from rlhf_engine.split import part
from rlhf_engine.stages.reward import by_texts
from rlhf_plugins.human_ratings import HumanRatings
from rlhf_plugins.human_ratings.ratings import RatedTexts, read_ratings


def preferences(plugin: HumanRatings, split: str, *, seed: int = 0, epoch: int = 0):
    return plugin.rlhf_preferences(run=SimpleNamespace(seed=seed), split=split, epoch=epoch)


@pytest.fixture(scope="module")
def rated(ratings_path) -> RatedTexts:
    return read_ratings(Path(ratings_path), "movies")


@pytest.fixture(scope="module")
def otherwise(ratings_path) -> HumanRatings:
    """The same ratings with other options."""
    return HumanRatings(path=ratings_path, texts_per_block=10, margin=2.0)


ratings = st.lists(st.integers(-4, 4), min_size=1, max_size=25)


@given(st.lists(ratings, min_size=2, max_size=4))
def test_strength_is_that_of_every_rater_against_every_other(rated):
    shares = np.stack([np.bincount(np.array(row) + 4, minlength=9) / len(row) for row in rated])
    strengths = RatedTexts(texts=[], means=np.array([]), shares=shares).strengths()
    for (i, a), (j, b) in product(enumerate(rated), repeat=2):
        wins = sum((x > y) + (x == y) / 2 for x, y in product(a, b))
        assert strengths[i, j] == pytest.approx(wins / (len(a) * len(b)), abs=1e-12)


def test_the_ratings_of_one_text_are_those_in_the_file(rated):
    row = next(n for n, text in enumerate(rated.texts) if text.startswith("The Rock is destined to be"))
    given = [3, 2, 2, 2, 0, 4, 3, 1, 2, 2, 4, 3, 3, 1, 2]
    assert rated.means[row] == sum(given) / 15
    assert (rated.shares[row] * 15).round(9).tolist() == [given.count(value) for value in range(-4, 5)]
    assert any(text.startswith("With a cast") and "Lovely & Amazing" in text for text in rated.texts)


# Each text once, and none of the 199 tweets whose two files contradict one another.
@pytest.mark.parametrize(
    ("domain", "count"), [("movies", 10_603), ("amazon", 3_688), ("tweets", 3_996), ("news", 5_118)]
)
def test_every_domain_can_be_read(ratings_path, domain, count):
    rated = read_ratings(Path(ratings_path), domain)
    assert len(rated.texts) == len(rated.means) == len(rated.shares) == count
    assert not [text for text in rated.texts if "&amp;" in text]
    np.testing.assert_allclose(rated.shares.sum(axis=1), 1)
    np.testing.assert_allclose(rated.shares @ np.arange(-4, 5), rated.means, atol=1e-12)


def test_an_epoch_is_all_pairs_of_one_block_after_another(human_ratings, rated):
    row = {text: number for number, text in enumerate(rated.texts)}
    pairs = list(preferences(human_ratings, "train"))
    blocks = list(by_texts(pairs, 64))
    texts = [{text for pair in block for text in (pair.chosen, pair.rejected)} for block in blocks]
    assert [len(block) for block in texts] == [64] * 150 + [44]
    assert sum(map(len, texts)) == len(set().union(*texts)) == 9_644

    assert min(pair.strength for pair in pairs) >= 0.5
    assert max(pair.strength for pair in pairs) <= 1 + 1e-12
    for block, members in zip(blocks[:3], texts, strict=False):
        rows = sorted(row[text] for text in members)
        strengths = rated.pick(rows).strengths()
        expected = {
            (a, b): strengths[i, j]
            for (i, a), (j, b) in product(enumerate(rows), repeat=2)
            if rated.means[a] > rated.means[b] and strengths[i, j] >= 0.5
        }
        assert {(row[pair.chosen], row[pair.rejected]): pair.strength for pair in block} == pytest.approx(expected)
        assert len(block) == len(expected)


def test_the_order_follows_seed_and_epoch(human_ratings):
    def first(**at):
        return [pair.chosen for pair in islice(preferences(human_ratings, "train", **at), 100)]

    orders = [first(), first(epoch=1), first(seed=1), first(seed=1, epoch=1)]
    assert first() == orders[0]
    assert all(a != b for a, b in pairwise([*orders, orders[0]]))


def test_the_heldout_pairs_are_always_the_same(human_ratings, otherwise):
    pairs = list(preferences(human_ratings, "heldout"))
    assert list(preferences(otherwise, "heldout", seed=5, epoch=3)) == pairs
    texts = {text for pair in pairs for text in (pair.chosen, pair.rejected)}
    assert {part(text) for text in texts} == {"heldout"}
    assert (len(texts), len(pairs)) == (928, 5_641)


def test_one_rater_agrees_with_the_heldout_pairs_nine_times_in_ten(human_ratings):
    strengths = [pair.strength for pair in preferences(human_ratings, "heldout")]
    assert np.mean(strengths) == pytest.approx(0.898, abs=0.001)


def test_pairs_are_further_apart_than_the_margin(human_ratings, otherwise, rated):
    mean = dict(zip(rated.texts, rated.means, strict=True))
    for plugin, split, margin in (
        (human_ratings, "train", 0.0),
        (human_ratings, "heldout", 0.5),
        (otherwise, "train", 2.0),
    ):
        apart = [mean[pair.chosen] - mean[pair.rejected] for pair in islice(preferences(plugin, split), 5000)]
        assert margin < min(apart) < margin + 0.01


def test_there_is_no_gold_preference(human_ratings):
    with pytest.raises(ValueError, match="no preferences of the split 'gold': only train and heldout"):
        preferences(human_ratings, "gold")


REMEDY = "pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2 -d "


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    plugin = HumanRatings(path=str(tmp_path / "data/sdist.tar.gz"))
    with pytest.raises(FileNotFoundError) as error:
        preferences(plugin, "train")
    assert "data/sdist.tar.gz is missing" in str(error.value)
    assert REMEDY + str(tmp_path / "data") in str(error.value)


def test_a_missing_file_stops_a_run_before_its_first_stage(tmp_path):
    hook = manager([HumanRatings(path=str(tmp_path / "sdist.tar.gz"))]).hook
    with pytest.raises(FileNotFoundError, match="is missing"):
        hook.rlhf_run_started.call_historic(kwargs={"run": None})


def test_a_truncated_or_changed_file_is_named_with_the_remedy(tmp_path, ratings_path):
    whole = Path(ratings_path).read_bytes()
    changed = bytearray(whole)
    changed[1_000_000] ^= 1
    for content in (whole[:-1], whole[: len(whole) // 2], b"", bytes(changed)):
        (tmp_path / "sdist.tar.gz").write_bytes(content)
        with pytest.raises(ValueError, match=f"damaged or another version: {len(content):,} bytes.*{REMEDY}"):
            preferences(HumanRatings(path=str(tmp_path / "sdist.tar.gz")), "train")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"domain": "books"}, "domain = 'books': allowed are movies, amazon, tweets, news"),
        ({"texts_per_block": 1}, "texts_per_block = 1"),
        ({"margin": -0.5}, "margin = -0.5"),
        ({"heldout_margin": -0.5}, "heldout_margin = -0.5"),
    ],
)
def test_options_out_of_range_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        HumanRatings(**options)
