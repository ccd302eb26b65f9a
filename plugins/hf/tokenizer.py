"""Text to token ids and back: a byte-level BPE trained on the run's own texts, or an existing folder's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .folders import quiet, read_config, require_folder

__all__ = ["HFTokenizer"]

PAD, END = "<|pad|>", "<|end|>"
CHARACTERS_PER_SECOND = 2e6  # BPE training on two cores
WORTH_SAYING = 5.0  # seconds


class HFTokenizer:
    """A transformers tokenizer whose padding token is never its end token.

    Neither `encode` adds special tokens nor does `decode` show them; whoever builds a sequence puts `end_id`
    where it belongs. A special token that is written out in a text is read as that token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end token, so no response could ever end: "
                "set its `eos_token` and save it again"
            )
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no padding token apart from its end token "
                f"{tokenizer.eos_token!r}: set its `pad_token` to a token that no text uses (a reserved one, "
                "say) and save it again"
            )
        self.tokenizer = tokenizer
        self.pad_id: int = tokenizer.pad_token_id
        self.end_id: int = tokenizer.eos_token_id

    def __len__(self) -> int:
        """The number of token ids."""
        return len(self.tokenizer)

    @classmethod
    def train(cls, texts: Sequence[str], vocabulary: int, say: Callable[[str], None] = print) -> HFTokenizer:
        """Train on `texts`; the same texts give the same tokenizer.

        The vocabulary holds the padding token, the end token, the 256 bytes and up to `vocabulary` - 258
        merges (fewer if the texts have no more to merge).
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        least = len(alphabet) + 2
        if vocabulary < least:
            raise ValueError(f"vocabulary is {vocabulary}, but the bytes and two special tokens make {least}")
        if not texts:
            raise ValueError("there are no texts to train a tokenizer on: the data has no document of split 'train'")
        characters = sum(map(len, texts))
        seconds = characters / CHARACTERS_PER_SECOND
        if seconds > WORTH_SAYING:
            say(
                f"training the tokenizer on {len(texts):,} texts ({characters / 1e6:.0f} million characters): "
                f"about {seconds:.0f} s"
            )
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer, length=len(texts))
        return cls(
            PreTrainedTokenizerFast(
                tokenizer_object=bpe,
                pad_token=PAD,
                eos_token=END,
                padding_side="left",
                clean_up_tokenization_spaces=False,
            )
        )

    @classmethod
    def load(cls, folder: Path | str) -> HFTokenizer:
        """The tokenizer of a folder that also holds its model's configuration.

        Where the padding token is missing or is the end token (as in GPT-2 or Llama), a new one takes a row
        of the embedding that no token uses, or else the token for unknown text becomes it. Nothing is resized.
        """
        folder = require_folder(folder, "tokenizer_config.json")
        rows = read_config(folder).get_text_config().vocab_size
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            if len(tokenizer) < rows:
                tokenizer.add_special_tokens({"pad_token": PAD})
            elif tokenizer.unk_token_id not in (None, tokenizer.eos_token_id):
                tokenizer.pad_token = tokenizer.unk_token
        if len(tokenizer) > rows:
            raise ValueError(
                f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model has only {rows} rows of "
                "embedding: the two do not belong together"
            )
        return cls(tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text, without special tokens."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        """The text of each row, without special tokens."""
        if not tokens:
            return []
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """Write the files that `AutoTokenizer.from_pretrained` opens."""
        self.tokenizer.save_pretrained(folder)

    def same_tokens(self, other: HFTokenizer) -> bool:
        """Whether both give every piece of text the same id."""
        return self.tokenizer.get_vocab() == other.tokenizer.get_vocab()
