"""LoRA in `rlhf_plugins.hf`: one copy of the weights is the policy (adapter on) and the reference (adapter off)."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, OlmoConfig

from rlhf_engine import Batch, Engine, Models, Prompt, Reward, Rollout, hookimpl
from rlhf_engine.config import ConfigError, read_run_file
from rlhf_engine.run import Run
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.hf import HFPolicy, HFTokenizer, load_models
from rlhf_plugins.hf.lora import LoraPolicy
from rlhf_plugins.kl_penalty import KLPenalty
from rlhf_plugins.ppo import PPO
from tests.toys import run_file

TEXTS = ["a very good film, really very good", "a bad film", "nobody was good, nobody was bad"] * 5
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": "all-linear"}
PROMPTS = [Prompt(text=text) for text in ("a very", "nobody was really", "good film, bad", "a")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a Hugging Face folder, with weights that have preferences."""
    return llama_folder(tmp_path_factory.mktemp("llama"), seed=1)


def llama_folder(folder: Path, *, seed: int) -> Path:
    tokenizer = HFTokenizer.train(TEXTS, 270)
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 24, "context": 48}
    ids = {"pad_id": tokenizer.pad_id, "end_id": tokenizer.end_id}
    policy = HFPolicy.fresh(vocabulary=len(tokenizer), **sizes, **ids, seed=seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    policy.save(folder)
    tokenizer.save(folder)
    return folder


@dataclass(eq=False)
class World:
    """Prompts, and a reward for tokens on one side of a plane through the embedding, which a frozen head can favour."""

    weight: float = 1.0

    @hookimpl
    def rlhf_prompts(self, run: Run) -> list[Prompt]:
        return [Prompt(text=prompt.text, split=split) for prompt in PROMPTS for split in ("train", "heldout")]

    @hookimpl
    def rlhf_reward(self, rollout: Rollout, models: Models) -> Reward:
        embedded = models.policy.model.get_input_embeddings().weight[rollout.tokens]
        right = (embedded[..., 0] > 0) & rollout.mask
        return Reward(name="right", values=right.sum(1) / rollout.mask.sum(1), weight=self.weight)


def engine_of(algorithm: object, models: Models) -> Engine:
    plugins = [algorithm, World(), KLPenalty(beta=0.01)]
    return Engine(plugins, models, response_length=8, samples_per_prompt=4)


def moved(models: Models) -> Models:
    """The models, their adapter no longer at its start."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in models.policy.adapter().values():
            parameter.add_(torch.randn(parameter.shape) / 4)
    return models


def digest(parameters) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parameters)).hexdigest()


def tokens_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(2, 270, (3, 9)), torch.arange(9) >= 9 - torch.tensor([9, 4, 1])[:, None]


# ------------------------------------------------------------------------------------------------------ one copy


def test_policy_and_reference_are_one_copy_of_the_weights(folder):
    models = load_models(folder, reference=True, value_head=True, **LORA)
    plain = HFPolicy.load_folder(folder)
    base = sum(p.numel() for p in plain.parameters())
    at = {p.data_ptr() for p in models.policy.parameters()}
    assert {p.data_ptr() for p in models.reference.parameters()} <= at
    adapter = sum(p.numel() for p in models.policy.adapter().values())
    per_layer = 4 * (16 + 16) * 4 + 2 * 4 * (16 + 24) + 4 * (24 + 16)  # q, k, v, o; gate, up; down
    assert adapter == 2 * per_layer
    held = [p for model in (models.policy, models.reference) for p in model.parameters()]
    assert sum({p.data_ptr(): p.numel() for p in held}.values()) == base + adapter + 16

    copied = load_models(folder, reference=True)
    both = [p for model in (copied.policy, copied.reference) for p in model.parameters()]
    assert sum({p.data_ptr(): p.numel() for p in both}.values()) == 2 * base


def test_only_the_adapter_and_the_heads_are_trained(folder):
    models = load_models(folder, reference=True, value_head=True, **LORA)
    trained = {id(p) for p in engine_of(PPO(), models).parameters()}
    assert trained == {id(p) for p in (*models.policy.adapter().values(), models.policy.value_head)}
    assert not any(p.requires_grad for p in models.reference.parameters())


@pytest.mark.parametrize("targets", ["default", "all-linear"])
def test_at_the_start_policy_reference_and_plain_model_agree_to_the_bit(folder, targets):
    """B is 0; from the first minibatch the ratio is exactly 1 and the KL exactly 0."""
    models = load_models(folder, reference=True, **{**LORA, "lora_targets": targets})
    tokens, mask = tokens_and_mask()
    plain = HFPolicy.load_folder(folder)(tokens, mask).hidden
    assert torch.equal(models.policy(tokens, mask).hidden, plain)
    assert torch.equal(models.reference(tokens, mask).hidden, plain)

    engine = engine_of(GRPO(), models)
    batch = engine.experience(engine.generate(PROMPTS), PROMPTS)
    assert torch.equal(batch.old_logp, batch.ref_logp)
    assert torch.equal(engine.output(batch).logp, batch.old_logp)
    metrics = engine.loss(batch).metrics
    assert (float(metrics["approx_kl"]), float(metrics["ratio_max"])) == (0.0, 1.0)


def test_the_adapters_first_numbers_depend_on_the_seed_alone(folder):
    def first(seed: int) -> str:
        return digest(load_models(folder, seed=seed, **LORA).policy.adapter().values())

    torch.manual_seed(5)
    before, one = torch.get_rng_state(), first(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert first(1) == one
    assert first(2) != one


# ------------------------------------------------------------------------------------------ the reference's forward


def test_the_reference_leaves_no_trace(folder):
    models = moved(load_models(folder, reference=True, value_head=True, **LORA))
    policy, reference = models.policy, models.reference
    tokens, mask = tokens_and_mask()
    plain = HFPolicy.load_folder(folder)(tokens, mask).hidden
    changed = policy(tokens, mask).hidden
    assert not torch.allclose(changed, plain, atol=1e-3)

    frozen = next(iter(policy.adapter().values())).requires_grad_(False)
    asked = {name: p.requires_grad for name, p in policy.named_parameters()}
    for mode in (True, False):
        policy.train(mode)
        modes = [module.training for module in policy.modules()]
        reference.train(not mode)
        answer = reference(tokens, mask)
        assert torch.equal(answer.hidden, plain)
        assert not answer.hidden.requires_grad
        assert answer.values is None
        assert [module.training for module in policy.modules()] == modes
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == asked
    frozen.requires_grad_(True)

    with pytest.raises(ValueError, match="the model's context is 48"):
        reference(torch.ones(1, 60, dtype=torch.int64), torch.ones(1, 60, dtype=torch.bool))
    assert torch.equal(policy(tokens, mask).hidden, changed)

    def sampled() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return list(policy.generate(tokens, mask, length=6, temperature=1.0, end_id=-1))

    first = sampled()
    reference(tokens, mask)
    assert all(map(torch.equal, sampled(), first))


def test_a_reference_forward_between_forward_and_backward_changes_no_gradient(folder):
    def gradients(between: bool) -> list[torch.Tensor]:
        models = moved(load_models(folder, reference=True, **LORA))
        torch.manual_seed(0)
        tokens, mask = tokens_and_mask()
        hidden = models.policy(tokens, mask).hidden
        if between:
            models.reference(tokens, mask)
        hidden[mask].square().sum().backward()
        assert all(p.grad is None for p in models.reference.parameters())
        return [p.grad for p in models.policy.adapter().values()]

    without, with_one = gradients(False), gradients(True)
    assert all(map(torch.equal, with_one, without))
    assert all(g.abs().max() > 0 for g in without)


# ------------------------------------------------------------------------------------------------- save and export


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_result_opens_as_a_plain_model_and_beside_it_the_adapter(kind, folder, tmp_path):
    if kind == "gpt2":  # its linear layers hold their weights the other way round, and its buffers are saved
        size = len(HFTokenizer.load(folder))
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=40, vocab_size=size, eos_token_id=1)
        torch.manual_seed(0)
        start = tmp_path / "start"
        AutoModelForCausalLM.from_config(config).save_pretrained(start)
        HFTokenizer.load(folder).save(start)
    else:
        start = folder
    policy = moved(load_models(start, **{**LORA, "lora_targets": "default"})).policy
    tokens = tokens_and_mask()[0]
    expected = policy.model.eval()(input_ids=tokens).logits
    assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained(start)(input_ids=tokens).logits, atol=1e-3)
    before = digest(policy.parameters())
    policy.export(tmp_path / "out")
    assert digest(policy.parameters()) == before

    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(opened(input_ids=tokens).logits, expected, atol=2e-5, rtol=0)
    plain = load_file(start / "model.safetensors")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == plain.keys()
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), tmp_path / "out" / "adapter")
    assert torch.equal(on_base(input_ids=tokens).logits, expected)


def test_a_checkpoint_holds_what_trains_and_comes_back_bit_for_bit(folder, tmp_path):
    models = moved(load_models(folder, value_head=True, **LORA))
    with torch.no_grad():
        models.policy.value_head.copy_(torch.randn(16))
    models.policy.save(tmp_path / "saved")
    adapter = sum(p.numel() for p in models.policy.adapter().values())
    saved = [tensor for file in (tmp_path / "saved").glob("*.safetensors") for tensor in load_file(file).values()]
    assert sum(tensor.numel() for tensor in saved) == adapter + 16

    other = load_models(folder, value_head=True, seed=7, **LORA).policy
    identities = [id(p) for p in other.parameters()]
    other.load(tmp_path / "saved")
    assert [id(p) for p in other.parameters()] == identities
    assert digest(other.parameters()) == digest(models.policy.parameters())

    for changed, wrong in (({"lora_rank": 2}, "r = 4, but this one has 2"), ({"lora_alpha": 9.0}, "lora_alpha = 8.0")):
        with pytest.raises(ValueError, match=f"holds an adapter with {wrong}"):
            load_models(folder, value_head=True, **{**LORA, **changed}).policy.load(tmp_path / "saved")
    elsewhere = load_models(llama_folder(tmp_path / "other", seed=2), value_head=True, **LORA).policy
    with pytest.raises(ValueError, match="was trained on other weights than these"):
        elsewhere.load(tmp_path / "saved")
    with pytest.raises(ValueError, match="but this policy has no value head"):
        load_models(folder, **LORA).policy.load(tmp_path / "saved")


# ------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    ("algorithm", "critic"), [(GRPO(), {}), (PPO(), {"critic": True}), (PPO(), {"value_head": True})]
)
def test_the_unchanged_algorithms_train_it(folder, algorithm, critic):
    models = load_models(folder, reference=True, **critic, **LORA)
    base, adapter = digest(models.reference.parameters()), digest(models.policy.adapter().values())
    engine = engine_of(algorithm, models)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=3e-2, weight_decay=0.0)

    def experience() -> Batch:
        return engine.experience(engine.generate(PROMPTS, samples_per_prompt=8), PROMPTS)

    torch.manual_seed(1)
    scores = []
    for _ in range(12):
        batch = experience()
        scores.append(float(batch.scores.mean()))
        for part in batch.split(16):
            engine.update(part, optimizer)
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.2, scores
    assert digest(models.reference.parameters()) == base
    assert digest(models.policy.adapter().values()) != adapter
    batch = experience()
    assert not torch.allclose(batch.old_logp, batch.ref_logp, atol=1e-2)
    if "value_head" in critic:
        assert models.policy.value_head.abs().max() > 0


# ------------------------------------------------------------------------------------------------------- whole runs


def write_run(folder: Path, policy: Path, **hf: object) -> Path:
    folder.mkdir(exist_ok=True)
    plugins = ["hf", "ppo", "kl_penalty", f"{__name__}:World"]
    table = {"policy": str(policy), "shared_critic": True, "device": "cpu", **LORA, **hf}
    return run_file(folder, run={"stages": ["rl"], "plugins": plugins}, hf=table)


def bits(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("result/**/*") if path.is_file()}


def test_a_run_leaves_a_plain_model_and_goes_on_from_a_checkpoint_with_the_same_bits(folder, tmp_path):
    whole = Run(read_run_file(write_run(tmp_path / "whole", folder)))
    whole.execute()
    result = whole.result("rl")
    assert {"model.safetensors", "adapter", "value_head.safetensors", "results.json"} <= {
        p.name for p in result.iterdir()
    }
    trained = AutoModelForCausalLM.from_pretrained(result)
    assert type(trained).__name__ == "LlamaForCausalLM"
    assert digest(trained.parameters()) != digest(HFPolicy.load_folder(folder).parameters())

    (tmp_path / "killed").mkdir()
    shutil.copytree(whole.folder, tmp_path / "killed" / "out")
    killed = Run(read_run_file(write_run(tmp_path / "killed", folder)))
    shutil.rmtree(killed.folder / "rl" / "result")
    saved = sorted((killed.folder / "rl" / "checkpoints").iterdir())
    shutil.rmtree(saved[-1])
    state = json.loads((saved[-2] / "state.json").read_text())
    assert 0 < dict(state["dict"])["ticks"] < 10
    assert {p.name for p in (saved[-2] / "policy").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base.json", "value_head.safetensors",
    }  # fmt: skip
    killed.execute()
    assert bits(killed.folder) == bits(whole.folder)


def test_what_is_missing_or_unknown_is_said_before_any_work(folder, tmp_path, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(OlmoConfig(**sizes, vocab_size=270, pad_token_id=0, eos_token_id=1))
    with pytest.raises(ValueError, match='peft puts no adapter on a OlmoForCausalLM .* lora_targets = "all-linear"'):
        LoraPolicy(model, rank=2, alpha=4, targets="default", seed=0)
    policy = LoraPolicy(model, rank=2, alpha=4, targets="all-linear", seed=0)
    assert not isinstance(policy.model.get_output_embeddings(), LoraLayer)

    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "rlhf_plugins.hf.lora")
    load_models(folder, reference=True)
    with pytest.raises(ConfigError, match=r"\[hf\]: lora_rank = 4 needs peft, .* pip install 'rlhf-engine\[lora\]'"):
        Run(read_run_file(write_run(tmp_path, folder)))
    with pytest.raises(ValueError, match="lora_rank = 4 needs peft"):
        load_models(folder, lora_rank=4)
