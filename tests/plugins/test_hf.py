"""The models of `rlhf_plugins.hf`, on tiny ones: every answer is compared with transformers' own or a formula."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    MambaConfig,
    Qwen2Config,
)

from rlhf_engine.batch import Document
from rlhf_plugins.hf import HFPolicy, HFScalar, HFTokenizer, HuggingFace, load_models
from rlhf_plugins.hf import tokenizer as tokenizer_module
from rlhf_plugins.hf.backbone import positions

TEXTS = ["a very good film, really very good", "a bad film — 坏电影 🎬 <br />", "nobody was good, nobody was bad"] * 5
PAD, END = 0, 1
TINY = {"vocabulary": 50, "hidden": 16, "layers": 2, "heads": 2, "intermediate": 24, "context": 32}


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return HFTokenizer.train(TEXTS, 300)


@pytest.fixture
def policy() -> HFPolicy:
    return spread(HFPolicy.fresh(**TINY, pad_id=PAD, end_id=END, seed=1))


def spread(policy: HFPolicy) -> HFPolicy:
    """Weights large enough for the model to have preferences, where fresh ones are nearly uniform."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return policy


def other_config(kind: str, rows: int):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    shared = {**sizes, "num_key_value_heads": 1, "vocab_size": rows, "max_position_embeddings": 40}
    if kind == "gpt2":
        ends = {"bos_token_id": END, "eos_token_id": END}
        return GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=40, vocab_size=rows, **ends)
    if kind == "gemma2":  # soft-capped logits, and attention over a sliding window in every other layer
        return Gemma2Config(**shared, head_dim=8, sliding_window=5, final_logit_softcapping=2.0)
    if kind == "cohere":
        return CohereConfig(**{**shared, "num_key_value_heads": 2})
    if kind == "mamba":
        return MambaConfig(vocab_size=rows, hidden_size=16, num_hidden_layers=2)
    return Qwen2Config(**shared, attention_dropout=0.3)


def hf_folder(folder: Path, tokenizer: HFTokenizer, kind: str, *, spare_rows: int = 0) -> Path:
    """A folder as other people's tools leave it: one special token, which ends texts."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(other_config(kind, len(tokenizer) + spare_rows))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "wpe" not in name:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    vocabulary = folder / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("<|pad|>", "<|reserved|>"))
    edit(folder / "tokenizer_config.json", pad_token="<|end|>")
    return folder


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def counted(*rows: int, width: int) -> torch.Tensor:
    """A left-padded mask with so many counted tokens in each row."""
    return torch.arange(width) >= width - torch.tensor(rows)[:, None]


def random_tokens(*shape: int, high: int = 50) -> torch.Tensor:
    return torch.randint(2, high, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(policy: HFPolicy, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    heads = policy(tokens, mask)
    raw = torch.nn.functional.linear(heads.hidden, heads.weight, heads.bias)
    return raw if heads.softcap is None else heads.softcap * torch.tanh(raw / heads.softcap)


class FakeRun:
    """What the hook uses of a run."""

    seed = 5

    def __init__(self, **results: Path) -> None:
        self.results = results
        self.said: list[str] = []
        documents = [Document(text=text) for text in TEXTS] + [Document(text="zzyzx " * 50, split="heldout")]
        self.hook = SimpleNamespace(rlhf_documents=lambda run: iter(documents))

    def result(self, stage: str) -> Path | None:
        return self.results.get(stage)

    def say(self, text: str) -> None:
        self.said.append(text)


# ------------------------------------------------------------------------------------------------------ tokenizer


def test_tokenizer_round_trip(tokenizer, tmp_path):
    texts = [*TEXTS[:3], "", " leading space", "tab\tand\nline", "\u00e9\U0001f600\u202e"]
    assert tokenizer.decode(tokenizer.encode(texts)) == texts
    assert tokenizer.encode([]) == tokenizer.decode([]) == []
    assert tokenizer.decode([[]]) == [""]
    assert tokenizer.pad_id != tokenizer.end_id
    assert tokenizer.decode([[tokenizer.pad_id, *tokenizer.encode(["good"])[0], tokenizer.end_id]]) == ["good"]

    tokenizer.save(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert (opened.pad_token_id, opened.eos_token_id) == (tokenizer.pad_id, tokenizer.end_id)
    assert opened(texts, add_special_tokens=False)["input_ids"] == tokenizer.encode(texts)
    assert opened.batch_decode(tokenizer.encode(texts)) == texts


def test_tokenizer_learns_merges_up_to_its_vocabulary(tokenizer):
    assert len(tokenizer) == 300
    assert len(tokenizer.encode([" good"])[0]) == 1
    assert HFTokenizer.train(TEXTS, 300).same_tokens(tokenizer)
    assert not HFTokenizer.train(TEXTS, 299).same_tokens(tokenizer)


def test_tokenizer_says_when_training_takes_long(monkeypatch):
    said: list[str] = []
    HFTokenizer.train(TEXTS, 260, said.append)
    assert said == []
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_PER_SECOND", 50)
    HFTokenizer.train(TEXTS, 260, said.append)
    characters = sum(map(len, TEXTS))
    assert said == [f"training the tokenizer on 15 texts (0 million characters): about {characters / 50:.0f} s"]


def test_tokenizer_refuses_what_it_cannot_train_on():
    with pytest.raises(ValueError, match="no document of split 'train'"):
        HFTokenizer.train([], 300)
    with pytest.raises(ValueError, match="vocabulary is 257, but the bytes and two special tokens make 258"):
        HFTokenizer.train(TEXTS, 257)


def test_pad_is_never_end_in_a_foreign_folder(tokenizer, tmp_path):
    """SCIENCE: if the pad token were the end token, every padded row would look ended."""
    folder = hf_folder(tmp_path / "spare", tokenizer, "gpt2", spare_rows=1)
    loaded = HFTokenizer.load(folder)
    assert (loaded.pad_id, loaded.end_id) == (len(tokenizer), tokenizer.end_id)
    loaded.save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").pad_token_id == len(tokenizer)

    folder = hf_folder(tmp_path / "unknown", tokenizer, "gpt2")
    edit(folder / "tokenizer_config.json", unk_token="!")
    assert HFTokenizer.load(folder).pad_id == tokenizer.tokenizer.convert_tokens_to_ids("!")

    folder = hf_folder(tmp_path / "full", tokenizer, "gpt2")
    with pytest.raises(ValueError, match=r"full.* has no padding token apart from its end token '<\|end\|>'"):
        HFTokenizer.load(folder)

    edit(folder / "config.json", vocab_size=200)
    edit(folder / "tokenizer_config.json", pad_token="<|reserved|>")
    with pytest.raises(ValueError, match="has 300 tokens, but the model has only 200 rows"):
        HFTokenizer.load(folder)


# --------------------------------------------------------------------------------------------------------- policy


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2"])
def test_policy_answers_as_transformers_does_whatever_the_padding(kind, tokenizer, tmp_path):
    if kind == "llama":
        policy = spread(HFPolicy.fresh(**TINY, pad_id=PAD, end_id=END))
    else:
        policy = HFPolicy.load_folder(hf_folder(tmp_path, tokenizer, kind, spare_rows=1))
    mask = counted(12, 7, 1, width=12)
    tokens = random_tokens(3, 12)
    padded = logits(policy, tokens, mask)
    right_padded = logits(policy, torch.cat([tokens, tokens], 1), torch.cat([mask, mask & False], 1))
    for row, length in enumerate([12, 7, 1]):
        alone = policy.model(input_ids=tokens[row : row + 1, -length:]).logits[0]
        torch.testing.assert_close(padded[row, -length:], alone, atol=2e-6, rtol=0)
        torch.testing.assert_close(right_padded[row, 12 - length : 12], alone, atol=2e-6, rtol=0)


def test_one_row_has_the_same_bits_beside_any_others(policy):
    """The mask is left out when nothing is padded on the left; that must not change the first ratio from 1."""
    tokens, mask = random_tokens(4, 20), counted(20, 20, 13, 2, width=20)
    together = policy(tokens, mask).hidden
    assert torch.equal(policy(tokens[:2], mask[:2]).hidden, together[:2])


def test_positions_count_along_the_mask():
    assert positions(counted(3, 1, 4, width=4)).tolist() == [[0, 0, 1, 2], [0, 0, 0, 0], [0, 1, 2, 3]]


def test_padding_carries_no_gradient(policy):
    tokens, mask = random_tokens(2, 8), counted(8, 3, width=8)
    policy(tokens, mask).hidden[mask].sum().backward()
    got = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    tokens[1, :5] = 49
    policy(tokens, mask).hidden[mask].sum().backward()
    for one, other in zip(got, policy.parameters(), strict=True):
        assert torch.equal(one, other.grad)
        assert one.isfinite().all()


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_dropout_is_off_in_training_mode(kind, tokenizer, tmp_path):
    """SCIENCE 2: else the ratio of the first pass is not 1. GPT-2's folder says .1 everywhere, this Qwen2's .3."""
    folder = hf_folder(tmp_path, tokenizer, kind, spare_rows=1)
    policy, scalar = HFPolicy.load_folder(folder), HFScalar.on_trunk(folder, pad_id=PAD)
    scalar.initialise_reward_head(0)
    tokens, mask = random_tokens(2, 9), counted(9, 4, width=9)
    for model, answer in ((policy, lambda: policy(tokens, mask).hidden), (scalar, lambda: scalar(tokens, mask))):
        model.eval()
        expected = answer()
        model.train()
        assert torch.equal(answer(), expected)
        assert torch.equal(answer(), expected)


def test_a_row_longer_than_the_context_is_refused(policy):
    tokens = random_tokens(2, 40)
    policy(tokens, counted(32, 5, width=40))
    with pytest.raises(ValueError, match="row 1 has 33 tokens, but the model's context is 32"):
        policy(tokens, counted(5, 33, width=40))


@pytest.mark.parametrize("kind", ["cohere", "mamba"])
def test_an_architecture_that_works_otherwise_is_refused(kind, tokenizer, tmp_path):
    """Cohere scales its logits; Mamba takes no cache of keys and values, and would sample without any memory."""
    with pytest.raises(ValueError, match=r"(Cohere|Mamba)ForCausalLM differs from what this policy assumes by"):
        HFPolicy.load_folder(hf_folder(tmp_path, tokenizer, kind))


def test_fresh_weights_depend_on_the_seed_alone():
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in HFPolicy.fresh(**TINY, pad_id=PAD, end_id=END, seed=seed).parameters()])

    before = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_sampled_logp_is_that_of_the_training_forward(kind, temperature, tokenizer, tmp_path):
    """SCIENCE 1: the temperature divides the logits, in the rollout as in training."""
    if kind == "llama":
        policy = spread(HFPolicy.fresh(**TINY, pad_id=PAD, end_id=END))
    else:
        policy = HFPolicy.load_folder(hf_folder(tmp_path, tokenizer, kind, spare_rows=1))
    for mask in (counted(9, 9, 9, width=9), counted(9, 4, 1, width=9)):
        prompt = random_tokens(3, 9)
        tokens, logp = policy.generate(prompt, mask, length=11, temperature=temperature, end_id=-1)
        everything = torch.cat([prompt, tokens], 1), torch.cat([mask, torch.ones(3, 11, dtype=torch.bool)], 1)
        expected = (logits(policy, *everything)[:, 8:-1] / temperature).log_softmax(-1)
        expected = expected.gather(-1, tokens[..., None]).squeeze(-1)
        assert logp.dtype == torch.float32
        torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
        again = policy(*everything).logprobs(tokens, torch.ones_like(logp).bool(), start=8, temperature=temperature)
        torch.testing.assert_close(again.logp, logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_sampled_frequencies_are_the_softmax_at_the_temperature(policy, temperature):
    """SCIENCE 1: sampling, never a beam. Pearson's chi-square, 49 degrees of freedom: above 107 once in 3e6."""
    torch.manual_seed(0)
    rows = 40_000
    prompt = random_tokens(1, 3).expand(rows, 3)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    tokens, _ = policy.generate(prompt, mask, length=1, temperature=temperature, end_id=-1)
    expected = (logits(policy, prompt[:1], mask[:1])[0, -1] / temperature).softmax(-1) * rows
    likely = expected >= 5
    observed = torch.bincount(tokens[:, 0], minlength=50).float()
    chi_square = ((observed - expected) ** 2 / expected)[likely].sum()
    rest = expected[~likely].sum()
    assert chi_square < 107
    assert abs(observed[~likely].sum() - rest) <= 6 * max(float(rest), 1.0) ** 0.5
    assert likely.sum() > 10


def test_the_sampler_uses_the_global_random_numbers_and_nothing_else(policy):
    prompt, mask = random_tokens(4, 5), counted(5, 2, 3, 5, width=5)

    def draw() -> torch.Tensor:
        return policy.generate(prompt, mask, length=8, temperature=1.0, end_id=-1)[0]

    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


def test_a_prompt_in_several_rows_is_answered_independently(policy):
    """Prompts of a group are read once; each row still gets its own response and its own log-probs."""
    distinct, mask = random_tokens(3, 6), counted(6, 2, 6, width=6)
    rows = torch.tensor([2, 0, 0, 1, 2, 1, 0])
    torch.manual_seed(1)
    tokens, logp = policy.generate(distinct[rows], mask[rows], length=9, temperature=1.0, end_id=-1)
    assert tokens.unique(dim=0).shape[0] == 7
    everything = torch.cat([distinct[rows], tokens], 1), torch.cat([mask[rows], torch.ones(7, 9).bool()], 1)
    expected = logits(policy, *everything)[:, 5:-1].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)


def test_sampling_stops_once_every_row_has_ended(policy):
    prompt = random_tokens(3, 4)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    torch.manual_seed(2)
    everything, logp = policy.generate(prompt, mask, length=20, temperature=1.0, end_id=-1)
    end = int(everything[0, 0])
    torch.manual_seed(2)
    tokens, shorter = policy.generate(prompt[:1], mask[:1], length=20, temperature=1.0, end_id=end)
    assert tokens.shape == shorter.shape == (1, 1)
    first_ends = [row.index(end) if end in row else 20 for row in everything.tolist()]
    torch.manual_seed(2)
    tokens, shorter = policy.generate(prompt, mask, length=20, temperature=1.0, end_id=end)
    width = min(max(first_ends) + 1, 20)
    assert torch.equal(tokens, everything[:, :width])
    assert torch.equal(shorter, logp[:, :width])


def test_sampled_tensors_may_enter_autograd(policy):
    prompt = random_tokens(2, 4)
    tokens, logp = policy.generate(prompt, prompt > 0, length=3, temperature=1.0, end_id=-1)
    assert not logp.requires_grad
    heads = policy(torch.cat([prompt, tokens], 1), torch.ones(2, 7, dtype=torch.bool))
    (heads.hidden.sum() * logp.exp().sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())


def test_bad_prompts_are_refused_by_name(policy):
    prompt = random_tokens(3, 10)

    def generate(mask: torch.Tensor, length: int = 4, temperature: float = 1.0) -> None:
        policy.generate(prompt, mask, length=length, temperature=temperature, end_id=END)

    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(counted(10, 0, 3, width=10))
    with pytest.raises(ValueError, match="prompt 2 is padded on the right"):
        generate(counted(10, 4, 0, width=10) | (torch.arange(10) < 2))
    with pytest.raises(ValueError, match=r"prompt 0 has 10 tokens, and with a response of 23 .* context of 32"):
        generate(counted(10, 4, 3, width=10), length=23)
    generate(counted(10, 4, 3, width=10), length=22)
    with pytest.raises(ValueError, match="length 0"):
        generate(counted(10, 4, 3, width=10), length=0)
    with pytest.raises(ValueError, match="temperature 0"):
        generate(counted(10, 4, 3, width=10), temperature=0.0)


def test_a_diverged_policy_is_named(policy):
    with torch.no_grad():
        policy.model.model.norm.weight[0] = float("nan")
    prompt = random_tokens(2, 4)
    with pytest.raises(FloatingPointError, match="token 0 of response 0 are not finite: its weights have diverged"):
        policy.generate(prompt, prompt > 0, length=3, temperature=1.0, end_id=-1)


# ----------------------------------------------------------------------------------------- reward and value models


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [9, 14])
def test_score_is_that_of_the_sequence_classifier_whatever_the_padding(policy, tmp_path, side, width):
    """SCIENCE 3: the score at the last real token, identical whatever the padding."""
    policy.save(tmp_path / "policy")
    scalar = HFScalar.on_trunk(tmp_path / "policy", pad_id=PAD)
    scalar.initialise_reward_head(0)
    scalar.save(tmp_path / "reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    rows = [random_tokens(9)[:length].tolist() for length in (9, 4, 1)]
    alone = torch.stack([scalar(torch.tensor([row]), torch.ones(1, len(row)).bool())[0, -1] for row in rows])
    gaps = [[PAD] * (width - len(row)) for row in rows]
    pairs = zip(rows, gaps, strict=True)
    tokens = torch.tensor([gap + row if side == "left" else row + gap for row, gap in pairs])
    mask = tokens != PAD
    last = torch.full((3,), width - 1) if side == "left" else mask.sum(1) - 1
    ours = scalar(tokens, mask)
    assert ours.dtype == torch.float32
    assert ours.shape == (3, width)
    torch.testing.assert_close(ours[torch.arange(3), last], alone, atol=1e-6, rtol=0)
    theirs = classifier(input_ids=tokens, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(theirs, alone, atol=1e-6, rtol=0)
    assert alone.unique().numel() == 3


def test_heads_are_initialised_as_the_paper_says(tmp_path):
    """SCIENCE 4: the reward head N(0, 1/sqrt(d+1)); the value head at 0."""
    wide = HFPolicy.fresh(**{**TINY, "hidden": 1024, "layers": 1}, pad_id=PAD, end_id=END)
    wide.save(tmp_path)
    scalar = HFScalar.on_trunk(tmp_path, pad_id=PAD)
    tokens, mask = random_tokens(2, 6), counted(6, 3, width=6)
    assert torch.equal(scalar(tokens, mask), torch.zeros(2, 6))

    draws = []
    for seed in range(30):
        scalar.initialise_reward_head(seed)
        draws.append(scalar.model.score.weight.detach().flatten().clone())
    everything = torch.cat(draws) * 1025**0.5
    count = everything.numel()
    assert abs(everything.mean()) < 4 / count**0.5
    assert abs(everything.std() - 1) < 4 / (2 * count) ** 0.5
    assert abs((everything.abs() < 1).double().mean() - 0.6827) < 4 * (0.2166 / count) ** 0.5
    scalar.initialise_reward_head(3)
    assert torch.equal(scalar.model.score.weight.flatten(), draws[3])


def test_a_classifier_with_two_labels_is_refused(policy, tmp_path):
    policy.save(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no linear `score` head with one output"):
        HFScalar.load_folder(tmp_path)


# --------------------------------------------------------------------------------------------------- save and load


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_policy_folder_gives_the_same_bits_back(kind, tokenizer, tmp_path):
    if kind == "llama":
        policy, other = (HFPolicy.fresh(**TINY, pad_id=PAD, end_id=END, seed=seed) for seed in (1, 2))
    else:
        folder = hf_folder(tmp_path / "start", tokenizer, kind, spare_rows=1)
        policy, other = HFPolicy.load_folder(folder), HFPolicy.load_folder(folder)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape) / 7)
    policy.save(tmp_path / "policy")
    files = {file.name for file in (tmp_path / "policy").iterdir()}
    assert "model.safetensors" in files
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}

    identities = [id(parameter) for parameter in other.parameters()]
    random_state = torch.get_rng_state()
    other.load(tmp_path / "policy")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [id(parameter) for parameter in other.parameters()] == identities
    assert_same_weights(other, policy)
    tied = policy.model.config.tie_word_embeddings
    assert (other.model.get_input_embeddings().weight is other.model.get_output_embeddings().weight) == tied

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokens = random_tokens(2, 9)
    assert torch.equal(opened(input_ids=tokens).logits, policy.model(input_ids=tokens).logits)


def test_scalar_folder_gives_the_same_bits_back(policy, tmp_path):
    policy.save(tmp_path / "policy")
    scalar, other = (HFScalar.on_trunk(tmp_path / "policy", pad_id=PAD) for _ in range(2))
    scalar.initialise_reward_head(0)
    scalar.save(tmp_path / "reward")
    other.load(tmp_path / "reward")
    assert_same_weights(other, scalar)
    assert_same_weights(HFScalar.load_folder(tmp_path / "reward"), scalar)


def test_a_folder_of_another_model_is_refused(policy, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a Hugging Face folder: it has no config.json"):
        policy.load(tmp_path / "nowhere")
    HFPolicy.fresh(**{**TINY, "heads": 4}, pad_id=PAD, end_id=END).save(tmp_path / "heads")
    with pytest.raises(ValueError, match=r"head_dim = 4, but this one has 8"):
        policy.load(tmp_path / "heads")
    with pytest.raises(ValueError, match=r"holds a model with"):
        policy.load(hf_folder(tmp_path / "qwen2", tokenizer, "qwen2"))
    policy.save(tmp_path / "policy")
    edit(tmp_path / "policy" / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"does not hold the weights .* 9 parameters are missing .*layers\.2\."):
        HFPolicy.load_folder(tmp_path / "policy")


# ------------------------------------------------------------------------------------------------- the value head


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_a_value_head_reads_the_trunks_own_hidden_states(kind, tokenizer, tmp_path):
    folder = hf_folder(tmp_path, tokenizer, kind, spare_rows=1)
    random_state = torch.get_rng_state()
    policy, plain = load_models(folder, value_head=True).policy, load_models(folder).policy
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (policy.has_values, plain.has_values) == (True, False)
    tokens, mask = random_tokens(2, 8), counted(8, 5, width=8)
    assert torch.equal(policy(tokens, mask).values, torch.zeros(2, 8))
    assert plain(tokens, mask).values is None
    assert torch.equal(logits(policy, tokens, mask), logits(plain, tokens, mask))
    with torch.no_grad():
        policy.value_head.copy_(torch.linspace(-1, 1, 16))
    values = policy(tokens[:1], mask[:1]).values
    theirs = plain.model(input_ids=tokens[:1], output_hidden_states=True).hidden_states[-1]  # after the last norm
    expected = (theirs.double() * torch.linspace(-1, 1, 16)).sum(-1).float()
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    assert values.unique().numel() == 8
    values.sum().backward()
    assert policy.model.get_input_embeddings().weight.grad.abs().max() > 0


def test_a_value_head_is_saved_beside_the_language_model(policy, tmp_path):
    policy.save(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("value_head*"))
    policy.add_value_head()
    other = HFPolicy.fresh(**TINY, pad_id=PAD, end_id=END, seed=2)
    other.add_value_head()
    with torch.no_grad():
        policy.value_head.copy_(torch.randn(16) / 7)
    policy.save(tmp_path / "valued")
    identities = [id(parameter) for parameter in other.parameters()]
    other.load(tmp_path / "valued")
    assert [id(parameter) for parameter in other.parameters()] == identities
    assert_same_weights(other, policy)

    tokens = random_tokens(2, 9)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "valued", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(opened(input_ids=tokens).logits, policy.model(input_ids=tokens).logits)
    assert not HFPolicy.load_folder(tmp_path / "valued").has_values

    with pytest.raises(ValueError, match=r"plain has no value_head\.safetensors, but this policy has a value head"):
        other.load(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"valued has a value_head\.safetensors, but this policy has no value head"):
        HFPolicy.fresh(**TINY, pad_id=PAD, end_id=END).load(tmp_path / "valued")


def test_hook_with_a_shared_critic(policy, tokenizer, tmp_path):
    folder = hf_folder(tmp_path, tokenizer, "qwen2", spare_rows=1)
    plugin = HuggingFace(policy=str(folder), shared_critic=True, device="cpu")
    models = plugin.rlhf_models(run=FakeRun(), stage="rl", needs={"values", "ref_logp"})
    assert models.critic is None
    assert models.policy.has_values
    assert models.policy.value_head.requires_grad
    assert not models.reference.has_values
    for stage, needs in (("rl", {"ref_logp"}), ("pretrain", set())):
        assert not plugin.rlhf_models(run=FakeRun(), stage=stage, needs=needs).policy.has_values


# ------------------------------------------------------------------------------------------------------- the hook


def test_hook_from_text_to_reinforcement_learning(tmp_path):
    plugin = HuggingFace(vocabulary=300, hidden=16, layers=1, heads=2, intermediate=24, context=32, device="cpu")
    run = FakeRun()
    first = plugin.rlhf_models(run=run, stage="pretrain", needs=set())
    assert first.reference is first.critic is first.reward_model is None
    assert len(first.tokenizer.encode([" zzyzx"])[0]) == 6, "the tokenizer has seen a held-out text"
    assert len(first.tokenizer.encode([" film"])[0]) == 1
    assert_same_weights(plugin.rlhf_models(run=run, stage="pretrain", needs=set()).policy, first.policy)
    pretrained = tmp_path / "pretrain"
    first.policy.save(pretrained)
    first.tokenizer.save(pretrained)

    second = plugin.rlhf_models(run=FakeRun(pretrain=pretrained), stage="reward", needs=set())
    assert second.policy is None
    assert torch.equal(
        second.reward_model.model.model.embed_tokens.weight, first.policy.model.model.embed_tokens.weight
    )
    assert second.reward_model.model.score.weight.std() > 0.1
    reward = tmp_path / "reward"
    with torch.no_grad():
        second.reward_model.model.model.norm.weight.add_(0.5)
    second.reward_model.save(reward)
    second.tokenizer.save(reward)

    run = FakeRun(pretrain=pretrained, reward=reward)
    plain = plugin.rlhf_models(run=run, stage="rl", needs={"old_logp"})
    assert plain.reference is plain.critic is None
    assert_same_weights(plain.policy, first.policy)
    assert_same_weights(plain.reward_model, second.reward_model)
    assert not any(p.requires_grad for p in plain.reward_model.parameters())

    full = plugin.rlhf_models(run=run, stage="rl", needs={"ref_logp", "values"})
    assert_same_weights(full.reference, full.policy)
    assert not full.reference.training
    assert not any(p.requires_grad for p in full.reference.parameters())
    with torch.no_grad():
        next(full.policy.parameters()).add_(1)
    assert_same_weights(full.reference, first.policy)
    assert torch.equal(full.critic.model.model.norm.weight, second.reward_model.model.model.norm.weight)
    assert full.critic.model.score.weight.abs().sum() == 0

    critic = plugin.rlhf_models(run=FakeRun(pretrain=pretrained), stage="rl", needs={"values"}).critic
    assert torch.equal(critic.model.model.norm.weight, first.policy.model.model.norm.weight)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma2"])
def test_hook_with_an_existing_folder(kind, tokenizer, tmp_path):
    folder = hf_folder(tmp_path, tokenizer, kind, spare_rows=1)
    plugin = HuggingFace(policy=str(folder), device="cpu")
    for stage in ("pretrain", "reward", "rl"):
        models = plugin.rlhf_models(run=FakeRun(), stage=stage, needs={"values", "ref_logp"})
        assert models.tokenizer.pad_id == len(tokenizer)
    tokens, mask = random_tokens(2, 8), counted(8, 5, width=8)
    sampled, _ = models.policy.generate(tokens, mask, length=4, temperature=1.0, end_id=models.tokenizer.end_id)
    assert sampled.max() < len(tokenizer) + 1
    assert torch.equal(models.critic(tokens, mask), torch.zeros(2, 8))
    assert models.reward_model is None


def test_hook_names_what_is_missing(tmp_path):
    for stage in ("reward", "rl"):
        with pytest.raises(
            ValueError, match=f"the stage '{stage}' needs a language model to start from: put 'pretrain'"
        ):
            HuggingFace().rlhf_models(run=FakeRun(), stage=stage, needs=set())
    with pytest.raises(FileNotFoundError, match="is not a Hugging Face folder"):
        HuggingFace(policy=str(tmp_path)).rlhf_models(run=FakeRun(), stage="pretrain", needs=set())
    with pytest.raises(ValueError, match="hidden = 30 must be an even multiple of heads = 4"):
        HuggingFace(hidden=30)


def test_a_reward_model_with_another_tokenizer_is_refused(policy, tokenizer, tmp_path):
    for name, own in (("policy", tokenizer), ("reward", HFTokenizer.train(TEXTS, 290))):
        fresh = HFPolicy.fresh(**{**TINY, "vocabulary": 300}, pad_id=PAD, end_id=END)
        fresh.save(tmp_path / name)
        own.save(tmp_path / name)
    HFScalar.on_trunk(tmp_path / "reward", pad_id=PAD).save(tmp_path / "reward")
    with pytest.raises(ValueError, match="have different tokenizers"):
        load_models(tmp_path / "policy", reward_model=tmp_path / "reward")


def test_reward_models_of_finished_runs_make_an_ensemble(policy, tokenizer, tmp_path):
    folders = {name: tmp_path / name for name in ("policy", "first", "second")}
    for name, folder in folders.items():
        fresh = HFPolicy.fresh(**{**TINY, "vocabulary": len(tokenizer)}, pad_id=PAD, end_id=END, seed=len(name))
        fresh.save(folder)
        tokenizer.save(folder)
        if name != "policy":
            HFScalar.on_trunk(folder, pad_id=PAD).save(folder)
    named = [str(folders["first"]), str(folders["second"])]
    plugin = HuggingFace(policy=str(folders["policy"]), reward_models=named, device="cpu")
    models = plugin.rlhf_models(run=FakeRun(), stage="rl", needs={"values"})
    assert isinstance(models.reward_model, list)
    for member, folder in zip(models.reward_model, named, strict=True):
        assert_same_weights(member, HFScalar.load_folder(folder))
        assert not any(p.requires_grad for p in member.parameters())
    assert_same_weights(models.critic.model.base_model, models.reward_model[0].model.base_model)
    plugin.reward_models = named[1:]
    single = plugin.rlhf_models(run=FakeRun(), stage="rl", needs=set()).reward_model
    assert_same_weights(single, HFScalar.load_folder(named[1]))
    with pytest.raises(ValueError, match="this run's reward stage would train another, which nothing would use"):
        plugin.rlhf_run_started(run=SimpleNamespace(stages={"reward": None, "rl": None}))
    plugin.rlhf_run_started(run=SimpleNamespace(stages={"rl": None}))
    plugin.reward_models = [*named, str(tmp_path / "third")]
    with pytest.raises(FileNotFoundError, match="third is not a Hugging Face folder"):
        plugin.rlhf_run_started(run=SimpleNamespace(stages={"rl": None}))
