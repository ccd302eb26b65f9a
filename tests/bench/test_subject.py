"""What all contestants work on is what the benches say it is."""

from bench.subject import (
    Setting,
    letter_share,
    make_policy,
    make_preferences,
    make_prompts,
    make_scorer,
    make_tokenizer,
)

SETTING = Setting()
TOKENIZER = make_tokenizer(SETTING)


def lengths(texts: list[str]) -> set[int]:
    return {len(row) for row in TOKENIZER(texts)["input_ids"]}


def test_texts_have_the_lengths_that_were_asked_for_so_that_nobody_pads() -> None:
    preferences = make_preferences(SETTING, 50)
    assert lengths(make_prompts(SETTING, 50)) == {16}
    assert lengths(preferences["chosen"]) == lengths(preferences["rejected"]) == {48}
    assert not set(preferences["chosen"]) & set(preferences["rejected"])


def test_every_token_is_a_word_of_its_own_and_comes_back() -> None:
    ids = list(range(1, SETTING.vocabulary))
    text = TOKENIZER.decode(ids)
    assert len(set(text.split())) == SETTING.vocabulary - 1
    assert TOKENIZER(text)["input_ids"] == ids


def test_the_end_cannot_be_sampled_but_can_be_scored() -> None:
    assert TOKENIZER.eos_token_id == make_policy(SETTING).config.vocab_size == SETTING.vocabulary
    assert make_scorer(SETTING).config.vocab_size == SETTING.vocabulary + 1


def test_the_model_has_the_size_that_the_setting_says() -> None:
    assert sum(parameter.numel() for parameter in make_policy(SETTING).parameters()) / 1e6 == 1.213568


def test_letter_share() -> None:
    assert letter_share(["baba", "", "fo"]) == [0.5, 0, 0]
