"""The size of a language model: its parameters, and what a token costs in arithmetic and in memory.

Llama-like decoders: grouped-query attention, a gated feed-forward layer, RMS norms. With hidden size h, heads a and
key-value heads k of size d, feed-forward size f, vocabulary V and l layers:

    products of a layer      2 h a d + 2 h k d + 3 h f                      weights in matrix products
    parameters               l (products + biases + norms) + h + V h, and V h again for an output layer of its own
    arithmetic of a token    2 l products forward, twice that backward; 2 V h for the output layer where it is asked
    attention                4 a d l for every pair of a token and one that it sees
    keys and values          2 l k d numbers for every token
    kept for backward        w (4 h + 2 a d + 2 k d + 4 f) + 8 h bytes a token and layer at w bytes a number: the norms
                             keep theirs in float32, and attention's probabilities are computed again
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlhf_engine.config import ConfigError, did_you_mean

__all__ = ["PRESETS", "Architecture", "find_architecture"]

KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder's sizes, as its `config.json` has them."""

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool = False
    """whether the output layer is the embedding"""
    attention_bias: bool = False
    """of queries, keys and values"""
    attention_norms: bool = False
    """of queries and keys, as in Qwen 3"""
    source: str = ""

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def layer_products(self) -> int:
        """Weights of a layer that take part in matrix products."""
        return 2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        biases = self.queries + 2 * self.keys if self.attention_bias else 0
        norms = 2 * self.hidden + (2 * self.head_size if self.attention_norms else 0)
        return self.layer_products + biases + norms

    @property
    def head(self) -> int:
        """Weights of the output layer, which are as many as the embedding's."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of the language model."""
        return self.trunk + (0 if self.tied else self.head)

    @property
    def trunk(self) -> int:
        """Without an output layer of its own."""
        return self.layers * self.layer_parameters + self.hidden + self.head

    @property
    def scalar_parameters(self) -> int:
        """Of a critic or reward model on this trunk: one number a position instead of logits."""
        return self.trunk + self.hidden

    @property
    def largest_unit(self) -> int:
        """The most parameters that are gathered at a time where every layer is sharded on its own."""
        return max(self.layer_parameters, self.head)

    def kv_bytes(self, width: int) -> int:
        """Of the keys and values of one token; `width`: bytes a number."""
        return 2 * self.layers * self.keys * width

    def kept_bytes(self, width: int) -> int:
        """What one layer keeps of one token for its backward pass."""
        return width * (4 * self.hidden + 2 * (self.queries + self.keys) + 4 * self.intermediate) + 8 * self.hidden

    def body_flops(self, tokens: float) -> float:
        """All layers forward, without attention's pairs and without the output layer."""
        return 2.0 * self.layers * self.layer_products * tokens

    def attention_flops(self, start: float, stop: float) -> float:
        """Of the tokens at positions start to stop of one sequence: each sees all before it."""
        return 2.0 * self.layers * self.queries * (stop**2 - start**2)

    def head_flops(self, tokens: float) -> float:
        return 2.0 * self.head * tokens


def _preset(name: str, source: str, *sizes: int, tied: bool = False, attention_bias: bool = False) -> Architecture:
    vocabulary, hidden, intermediate, layers, heads, kv_heads, head_size = sizes
    return Architecture(
        name=name, source=f"config.json of {source}", vocabulary=vocabulary, hidden=hidden, intermediate=intermediate,
        layers=layers, heads=heads, kv_heads=kv_heads, head_size=head_size, tied=tied, attention_bias=attention_bias,
    )  # fmt: skip


# vocabulary, hidden, intermediate, layers, heads, key-value heads, size of a head
PRESETS = {
    found.name: found
    for found in (
        _preset("llama-1b", "meta-llama/Llama-3.2-1B", 128_256, 2048, 8192, 16, 32, 8, 64, tied=True),
        _preset("llama-3b", "meta-llama/Llama-3.2-3B", 128_256, 3072, 8192, 28, 24, 8, 128, tied=True),
        _preset("llama-8b", "meta-llama/Llama-3.1-8B", 128_256, 4096, 14_336, 32, 32, 8, 128),
        _preset("llama-70b", "meta-llama/Llama-3.1-70B", 128_256, 8192, 28_672, 80, 64, 8, 128),
        _preset("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", 151_936, 896, 4864, 24, 14, 2, 64, tied=True, attention_bias=True),
        _preset("qwen2.5-7b", "Qwen/Qwen2.5-7B", 152_064, 3584, 18_944, 28, 28, 4, 128, attention_bias=True),
    )
}


def find_architecture(name: str) -> Architecture:
    """A preset by name, or the `config.json` at a path (the file, or the folder that holds it).

    Raises ConfigError where it is neither, or of a kind that is not known here.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"--model {name}: neither a known model nor a config.json (or its folder).{did_you_mean(name, PRESETS)} "
            f"Known: {', '.join(PRESETS)}"
        )
    return _of_config(path)


def _of_config(path: Path) -> Architecture:
    try:
        config = json.loads(path.read_text("utf-8"))
        kind = config["model_type"]
        if kind not in KNOWN_TYPES:
            raise ConfigError(f"{path}: a model of the type {kind!r}; known are {', '.join(KNOWN_TYPES)}")
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        found = Architecture(
            name=path.parent.name or str(path), source=str(path), vocabulary=int(config["vocab_size"]), hidden=hidden,
            intermediate=int(config["intermediate_size"]), layers=int(config["num_hidden_layers"]), heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", kind == "qwen2")), attention_norms=kind == "qwen3",
        )  # fmt: skip
    except KeyError as error:
        raise ConfigError(f"{path}: this config.json has no {error}") from None
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: this config.json cannot be read: {error}") from None
    sizes = (found.vocabulary, found.hidden, found.intermediate, found.layers, heads, found.kv_heads, found.head_size)
    if min(sizes) < 1:
        raise ConfigError(f"{path}: every size must be at least 1; found {sizes}")
    return found
