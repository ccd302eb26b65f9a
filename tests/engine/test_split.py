from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_engine.split import normalise, part


def test_normalise_ignores_what_data_sets_do_to_a_text():
    rated = "“Lovely &amp;amp; Amazing” is a bleak,  ***** Café film -- clichés_and all."
    tokenised = '" lovely & amazing " is a bleak , cafe film - - cliche\'s and all .'
    assert normalise(rated) == normalise(tokenised) == "lovelyamazingisableakcafefilmclichesandall"


def test_normalise_keeps_letters_of_every_script_and_digits():
    assert normalise("Любовь 2 東京!") == "любовь2東京"


@given(st.text(st.characters(codec="ascii", exclude_characters="&")))
def test_normalise_changes_nothing_that_is_normalised(text):
    assert normalise(normalise(text)) == normalise(text)


# sha256 of "split 4: " and the normalised text over 2^256, worked out apart from this code.
@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("Great movie!", 0.0018302297310194991),
        ("A bore.", 0.12633415733911563),
        ("Watch it", 0.273470349706836),
        ("Eight", 0.6865777058797394),
        ("Seven", 0.7936583324409656),
    ],
)
def test_part_is_the_same_on_every_machine(text, position):
    assert part(text, heldout=position + 1e-12, gold=0) == "heldout"
    assert part(text, heldout=position - 1e-12, gold=2e-12) == "gold"
    assert part(text, heldout=position - 1e-12, gold=0) == "train"


def test_part_by_default():
    texts = {"Great movie!": "heldout", "A bore.": "gold", "Seven": "train"}
    assert {text: part(text) for text in texts} == texts


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_part_moves_monotonically_with_its_shares(text, heldout, gold):
    split = part(text, heldout=heldout, gold=gold)
    # gold takes nothing from the held-out part, and a larger held-out part keeps what a smaller one has.
    assert (split == "heldout") == (part(text, heldout=heldout, gold=0) == "heldout")
    if split == "heldout":
        assert part(text, heldout=0.5 + heldout / 2, gold=0) == "heldout"
    if split != "train":
        assert part(text, heldout=0, gold=heldout + gold) == "gold"


def test_part_gives_each_split_its_share():
    count = 20_000
    found = Counter(part(f"text {number}", heldout=0.2, gold=0.05) for number in range(count))
    for split, share in {"heldout": 0.2, "gold": 0.05, "train": 0.75}.items():
        deviation = (count * share * (1 - share)) ** 0.5
        assert abs(found[split] - count * share) < 4 * deviation


@pytest.mark.parametrize("shares", [{"heldout": -0.1}, {"gold": -0.1}, {"heldout": 0.6, "gold": 0.5}])
def test_part_refuses_shares_that_are_none(shares):
    with pytest.raises(ValueError, match="at least 0, and together at most 1"):
        part("a text", **shares)
