"""`dtype` and `gradient_checkpointing` of `rlhf_plugins.hf`: what they save, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    MambaConfig,
    Qwen2Config,
)

from rlhf_engine import Batch, Engine, Models, Prompt, Reward, Rollout, hookimpl
from rlhf_engine.batch import Document
from rlhf_engine.checkpoint import load_optimizer, load_tree, optimizer_state, save_tree
from rlhf_engine.defaults import Defaults
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.hf import HFPolicy, HFScalar, HFTokenizer, HuggingFace, load_models
from rlhf_plugins.hf.recompute import recompute_layers
from rlhf_plugins.kl_penalty import KLPenalty
from rlhf_plugins.ppo import PPO

TEXTS = ["a very good film, really very good", "a bad film", "nobody was good, nobody was bad"] * 5
PROMPTS = [Prompt(text=text) for text in ("a very", "nobody was really", "good film, bad", "a")]
FRESH = {"vocabulary": 270, "hidden": 16, "layers": 2, "heads": 2, "intermediate": 24, "context": 48}
LORA = {"lora_rank": 4, "lora_targets": "all-linear"}


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return HFTokenizer.train(TEXTS, 270)


@pytest.fixture(scope="module")
def folder(tokenizer: HFTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("llama"), tokenizer, "llama")


def folder_of(folder: Path, tokenizer: HFTokenizer, kind: str) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {"vocab_size": len(tokenizer) + 1, "pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.end_id}
    shared = {**sizes, **ids, "num_key_value_heads": 2, "max_position_embeddings": 48}
    configs = {
        "gpt2": lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=48, **ids),
        "qwen2": lambda: Qwen2Config(**shared, attention_dropout=0.3),
        "gemma2": lambda: Gemma2Config(**shared, head_dim=8, sliding_window=5),
        "cohere": lambda: CohereConfig(**shared),
        "mamba": lambda: MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=len(tokenizer)),
    }
    torch.manual_seed(3)
    if kind == "llama":
        model = HFPolicy.fresh(**FRESH, pad_id=tokenizer.pad_id, end_id=tokenizer.end_id, seed=3).model
    else:
        model = AutoModelForCausalLM.from_config(configs[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "wpe" not in name:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


class Letters:
    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        return Reward(name="o", values=torch.tensor([float(text.count("o")) for text in texts]))


def engine_of(models: Models) -> Engine:
    return Engine([PPO(), Letters(), KLPenalty()], models, response_length=8, samples_per_prompt=2)


def batch_of(engine: Engine) -> Batch:
    torch.manual_seed(4)
    return engine.experience(engine.generate(PROMPTS), PROMPTS)


@contextmanager
def bytes_kept() -> Iterator[list[int]]:
    """How much the forward passes inside keep for their backward passes: the distinct storages."""
    kept: dict[int, int] = {}
    total: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(kept.values()))


# ------------------------------------------------------------------------------------------ gradient checkpointing


@pytest.mark.parametrize("options", [{"critic": True}, {"value_head": True}, {"value_head": True, **LORA}])
def test_checkpointing_is_active_in_the_engine_and_changes_no_bit(folder, options):
    """The engine differentiates in evaluation mode, where transformers' own switch does nothing and says nothing."""
    runs = []
    for switch in (False, True):
        models = load_models(folder, reference=True, gradient_checkpointing=switch, **options)
        engine = engine_of(models)
        batch = batch_of(engine)
        with bytes_kept() as kept:
            loss = engine.loss(batch)
        loss.value.backward()
        assert not models.policy.training
        assert all(not module.training for module in models.policy.modules())
        runs.append((kept[0], batch, loss.value.detach(), [p.grad for p in engine.parameters()]))
    (all_of_it, batch, loss, gradients), (less, same_batch, same_loss, same_gradients) = runs
    assert less < 0.6 * all_of_it, (less, all_of_it)
    assert torch.equal(same_batch.tokens, batch.tokens)
    assert torch.equal(same_batch.logp, batch.logp), "sampling has lost its cache"
    assert torch.equal(same_loss, loss)
    assert len(gradients) == len(same_gradients)
    for one, other in zip(gradients, same_gradients, strict=True):
        assert torch.equal(one, other)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_of_other_architectures_and_in_training_mode(kind, training, tokenizer, tmp_path):
    folder = folder_of(tmp_path, tokenizer, kind)
    tokens, mask = torch.randint(2, 270, (3, 20)), torch.arange(20) >= 20 - torch.tensor([20, 9, 1])[:, None]
    runs = []
    for switch in (False, True):
        policy = load_models(folder, gradient_checkpointing=switch).policy.train(training)
        with bytes_kept() as kept:
            hidden = policy(tokens, mask).hidden
        hidden[mask].square().sum().backward()
        runs.append((kept[0], [p.grad for p in policy.parameters() if p.grad is not None]))
    assert runs[1][0] < 0.8 * runs[0][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


def test_every_stage_checkpoints_what_it_trains(folder, tokenizer):
    documents = [Document(text=text) for text in TEXTS]
    run = SimpleNamespace(
        seed=5,
        say=lambda text: None,
        result=lambda stage: None,
        hook=SimpleNamespace(rlhf_documents=lambda run: iter(documents)),
    )
    tokens = torch.randint(2, 260, (2, 30))
    for stage, options in (("pretrain", FRESH), ("pretrain", {}), ("reward", {}), ("rl", {})):
        kept = []
        for switch in (False, True):
            start = {} if options else {"policy": str(folder)}
            plugin = HuggingFace(**options, **start, gradient_checkpointing=switch, device="cpu")
            models = plugin.rlhf_models(run=run, stage=stage, needs={"values"} if stage == "rl" else set())
            for model in filter(None, (models.policy, models.reward_model, models.critic)):
                with bytes_kept() as total:
                    model(tokens, tokens > 0)
                kept.append(total[0])
        half = len(kept) // 2
        assert half == (2 if stage == "rl" else 1)
        assert all(less < 0.6 * more for more, less in zip(kept[:half], kept[half:], strict=True)), (stage, kept)


def test_an_architecture_that_cannot_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing = true: transformers marks no layer of Sequential"):
        recompute_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)))


# ---------------------------------------------------------------------------------------------------------- dtype


def floating(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def test_bf16_weights_answer_in_fp32(folder):
    models = load_models(folder, reference=True, critic=True, dtype=torch.bfloat16)
    for model in (models.policy, models.reference, models.critic):
        assert floating(model) == {torch.bfloat16}
    engine = engine_of(models)
    batch = batch_of(engine)
    assert {c.dtype for c in (batch.logp, batch.old_logp, batch.ref_logp, batch.values)} == {torch.float32}
    assert torch.equal(batch.old_logp, batch.ref_logp)
    assert torch.equal(engine.output(batch).logp, batch.old_logp), "the first ratio is not 1"
    assert not torch.equal(batch.old_logp, batch.old_logp.bfloat16().float()), "computed in bf16"

    plain = load_models(folder, reference=True, critic=True)
    rollout = Rollout(**{column.name: getattr(batch, column.name) for column in fields(Rollout)})
    exact = engine_of(plain).score(rollout, PROMPTS).old_logp
    assert (exact - batch.old_logp).abs().max() < 0.3
    assert (exact - batch.old_logp)[batch.mask].abs().max() > 0


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_the_first_ratio_is_1_in_bf16_where_no_algorithm_asks_for_old_log_probs(folder, options):
    models = load_models(folder, dtype=torch.bfloat16, **options)
    engine = Engine(
        [GRPO()],
        rewards=[lambda texts: list(range(len(texts)))],
        models=models,
        samples_per_prompt=2,
        response_length=8,
    )
    rollout = engine.generate(PROMPTS)
    batch = engine.experience(rollout, PROMPTS)
    assert not torch.equal(batch.old_logp, rollout.logp), "the sampler is as exact as the forward: nothing is shown"
    assert torch.equal(engine.output(batch).logp, batch.old_logp)
    assert not load_models(folder, **options).policy.rough_sampler


def test_values_and_scores_are_not_rounded_to_bf16(folder):
    critic = HFScalar.on_trunk(folder, pad_id=0, dtype=torch.bfloat16)
    critic.initialise_reward_head(0)
    tokens = torch.randint(2, 270, (3, 9))
    values = critic(tokens, tokens > 0)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_the_optimizers_moments_have_the_weights_dtype_and_come_back_exactly(folder, tmp_path):
    engine = engine_of(load_models(folder, reference=True, value_head=True, dtype=torch.bfloat16))
    optimizer = Defaults().rlhf_optimizer(engine.parameters(), learning_rate=1e-2, stage="rl")
    engine.update(batch_of(engine), optimizer)
    kinds = {id(p): optimizer.state[p]["exp_avg"].dtype for p in engine.parameters()}
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}  # the latter: the value head
    assert kinds[id(engine.models.policy.value_head)] == torch.float32
    save_tree(tmp_path, "state", optimizer_state(optimizer))
    again = Defaults().rlhf_optimizer(engine.parameters(), learning_rate=1e-2, stage="rl")
    load_optimizer(again, load_tree(tmp_path, "state"))
    for parameter in engine.parameters():
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(again.state[parameter][name], value)
            assert again.state[parameter][name].dtype == value.dtype


def test_an_adapter_on_bf16_weights_is_fp32(folder, tmp_path):
    models = load_models(folder, reference=True, dtype=torch.bfloat16, **LORA)
    policy = models.policy
    assert {p.dtype for p in policy.adapter().values()} == {torch.float32}
    assert {p.dtype for p in policy.base().values()} == {torch.bfloat16}
    tokens = torch.randint(2, 270, (2, 9))
    plain = HFPolicy.load_folder(folder, dtype=torch.bfloat16)(tokens, tokens > 0).hidden
    assert torch.equal(policy(tokens, tokens > 0).hidden, plain)
    policy.save(tmp_path / "checkpoint")
    policy.export(tmp_path / "result")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "result", dtype="auto").dtype == torch.bfloat16
    policy.load(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"trained on other weights than these: .* the dtype\)"):
        load_models(folder, **LORA).policy.load(tmp_path / "checkpoint")


def test_bf16_folders_come_back_bit_for_bit(tokenizer, tmp_path):
    ids = {"pad_id": tokenizer.pad_id, "end_id": tokenizer.end_id}
    policy, other = (HFPolicy.fresh(**FRESH, **ids, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    assert floating(policy) == {torch.bfloat16}
    policy.save(tmp_path / "policy")
    tokenizer.save(tmp_path / "policy")
    other.load(tmp_path / "policy")
    reloaded = HFPolicy.load_folder(tmp_path / "policy", dtype=torch.bfloat16)
    tokens = torch.randint(2, 270, (2, 30))
    expected = policy(tokens, tokens > 0).hidden
    assert torch.equal(other(tokens, tokens > 0).hidden, expected)
    assert torch.equal(reloaded(tokens, tokens > 0).hidden, expected)

    scalar, again = (HFScalar.on_trunk(tmp_path / "policy", pad_id=0, dtype=torch.bfloat16) for _ in range(2))
    scalar.initialise_reward_head(0)
    scalar.save(tmp_path / "reward")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype="auto").dtype == torch.bfloat16
    again.load(tmp_path / "reward")
    assert torch.equal(again(tokens, tokens > 0), scalar(tokens, tokens > 0))


@pytest.mark.parametrize("kind", ["cohere", "mamba"])
def test_bf16_still_refuses_an_architecture_that_works_otherwise(kind, tokenizer, tmp_path):
    folder = folder_of(tmp_path, tokenizer, kind)
    with pytest.raises(ValueError, match=r"(Cohere|Mamba)ForCausalLM differs from what this policy assumes by"):
        HFPolicy.load_folder(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma2"])
def test_bf16_takes_the_known_architectures(kind, tokenizer, tmp_path):
    policy = HFPolicy.load_folder(folder_of(tmp_path, tokenizer, kind), dtype=torch.bfloat16)
    assert floating(policy) == {torch.bfloat16}
