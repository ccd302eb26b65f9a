"""TRL's trainers with ours on and off: the same loss, gradients and metrics to rounding, and nothing else changed."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_engine.embed import trl as embed
from rlhf_engine.embed.trl import CannotSwitch, switch_on
from rlhf_kernels import backend
from rlhf_plugins.bradley_terry import BradleyTerry
from tests.engine.embed import tiny
from tests.engine.embed.tiny import grpo, reward, trl

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"))


def loss_and_all(trainer: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
    """Loss, gradients and metrics of one micro-batch, by the trainer's own way in."""
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), {k: g.clone() for k, g in gradients.items()}, dict(trainer._metrics["train"])


def off_policy(trainer: Any, inputs: dict[str, Any], spread: float = 0.5) -> dict[str, Any]:
    """The inputs with old and reference log-probs at some distance from the policy's own."""
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, tiny.RESPONSE)
    draw = torch.Generator().manual_seed(1)
    noise = spread * torch.randn(2, *logp.shape, generator=draw)
    counted = inputs["completion_mask"]
    return {
        **inputs,
        "old_per_token_logps": logp + noise[0] * counted,
        "ref_per_token_logps": logp + noise[1] * counted,
    }


def assert_the_same(theirs: Any, ours: Any, *, rounding: float = 2e-5) -> None:
    assert theirs[0].abs() > 1e-3
    torch.testing.assert_close(ours[0], theirs[0], rtol=rounding, atol=rounding / 20)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=rounding * largest + 1e-9, msg=name)
    assert ours[2].keys() == theirs[2].keys()
    for name, values in theirs[2].items():
        assert ours[2][name] == pytest.approx(values, rel=5 * rounding, abs=1e-6, nan_ok=True), name


OPTIONS: dict[str, dict[str, Any]] = {
    "dapo": {},  # TRL's default
    "grpo with KL": {"loss_type": "grpo", "beta": 0.3, "epsilon_high": 0.28},
    "dapo with plain KL": {"beta": 0.3, "use_bias_correction_kl": False},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo, delta": {"loss_type": "dr_grpo", "delta": 1.5},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.1},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
    "temperature": {"temperature": 0.7, "top_entropy_quantile": 0.4},
    "fp32 head": {"cast_lm_head_to_fp32": True},
    "off-policy mask": {"off_policy_mask_threshold": 0.05, "beta": 0.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_loss_the_gradients_and_the_metrics_are_trls(folder: Path, options: dict[str, Any]) -> None:
    trainer = grpo(folder, **options)
    inputs = off_policy(trainer, tiny.batch())
    theirs = loss_and_all(trainer, inputs)
    with switch_on(trainer):
        ours = loss_and_all(trainer, inputs)
    assert_the_same(theirs, ours)
    clipped = [name for name in theirs[2] if name.endswith(("region_mean", "cispo_clip_ratio"))]
    assert all(theirs[2][name][0] > 0 for name in clipped)  # the test sees clipping
    again = loss_and_all(trainer, inputs)
    assert again[0] == theirs[0]
    assert all(torch.equal(again[1][name], theirs[1][name]) for name in theirs[1])


def test_tool_calls_per_token_advantages_and_vllms_correction(folder: Path) -> None:
    trainer = grpo(folder, loss_type="grpo", beta=0.1)
    inputs = off_policy(trainer, tiny.batch())
    draw = torch.Generator().manual_seed(5)
    shape = inputs["completion_mask"].shape
    inputs["tool_mask"] = (torch.rand(shape, generator=draw) > 0.3).long()
    inputs["tool_mask"][:, 0] = 1
    inputs["advantages"] = torch.randn(shape, generator=draw)
    trainer.use_vllm = True  # what vLLM sampled arrives as tensors; it does not run here
    trainer.vllm_importance_sampling_correction = True
    for ratio in (torch.rand(shape, generator=draw) * 2, torch.rand(shape[0], 1, generator=draw)):
        inputs["importance_sampling_ratio"] = ratio
        theirs = loss_and_all(trainer, inputs)
        with switch_on(trainer):
            assert_the_same(theirs, loss_and_all(trainer, inputs))


def test_lora(folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    trainer = grpo(folder, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    inputs = off_policy(trainer, tiny.batch())
    theirs = loss_and_all(trainer, inputs)
    assert all("lora" in name for name in theirs[1])
    with switch_on(trainer):
        assert_the_same(theirs, loss_and_all(trainer, inputs))


def test_under_autocast_ours_is_nearer_to_the_truth(folder: Path) -> None:
    """TRL's default is bfloat16 autocast, in which its products are rounded to bfloat16; ours are not."""
    trainer = grpo(folder, bf16=True)
    inputs = tiny.batch()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)

    def logps() -> torch.Tensor:
        with torch.no_grad():
            return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, tiny.RESPONSE)[0]

    with torch.no_grad(), trainer.accelerator.autocast():
        hidden = trainer.model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = hidden.bfloat16().double() @ trainer.model.lm_head.weight.bfloat16().double().T
    truth = logits[:, -tiny.RESPONSE - 1 : -1].log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    truth = (truth * inputs["completion_mask"]).detach()
    theirs = logps()
    with switch_on(trainer):
        ours = logps()
    assert (ours - truth).abs().max() < 1e-5
    assert 1e-4 < (theirs - truth).abs().max() < 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_is_trls_and_off_gives_everything_back(folder: Path, bf16: bool) -> None:
    """With a reference, two iterations on each batch and two micro-batches a step, from the same seed."""
    options = {
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "beta": 0.05,
        "max_steps": 4,
        "bf16": bf16,
        "learning_rate": 0.01,
    }
    trained = []
    for on in (False, True):
        trainer = grpo(folder, **options)
        before = {model: model.forward for model in (trainer.model, trainer.ref_model)}
        switched = switch_on(trainer) if on else None
        torch.manual_seed(11)
        trainer.train()
        trained.append(trainer)
        if switched is None:
            continue
        assert any("GRPOTrainer" in line and "dapo" in line for line in str(backend.report()).splitlines())
        switched.off()
        switched.off()
        assert backend.report().embedded == ()
        assert "_compute_loss" not in vars(trainer)
        assert trainer.ref_model.forward == before[trainer.ref_model]
        if not bf16:
            assert trainer.model.forward == before[trainer.model]
        ids = torch.randint(4, tiny.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
        for model, theirs in before.items():
            with torch.no_grad(), trainer.accelerator.autocast():
                now, then = (f(input_ids=ids, labels=ids, fused_lm_head=True).log_probs for f in (model, theirs))
            assert torch.equal(now, then)
    theirs, ours = trained
    for mine, other in zip(ours.state.log_history[:4], theirs.state.log_history[:4], strict=True):
        assert mine.keys() == other.keys()
        for name in ("loss", "kl", "entropy", "grad_norm", "clip_ratio/region_mean"):
            assert mine[name] == pytest.approx(other[name], rel=0.1 if bf16 else 1e-4, abs=0.05 if bf16 else 1e-6), name
    assert theirs.state.log_history[3]["kl"] > 0.1
    assert theirs.state.log_history[3]["clip_ratio/region_mean"] > 0.1
    if bf16:  # Adam's first steps are signs: where a gradient is near 0, rounding decides
        return
    start = grpo(folder).model
    moved = [(p - q).abs().max() for p, q in zip(theirs.model.parameters(), start.parameters(), strict=True)]
    for mine, other, far in zip(ours.model.parameters(), theirs.model.parameters(), moved, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0.005 * float(far))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_in_evaluation_nothing_is_accumulated(folder: Path, loss_type: str) -> None:
    trainer = grpo(folder, loss_type=loss_type)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, tiny.batch())
    with switch_on(trainer):
        ours = trainer.compute_loss(trainer.model, tiny.batch())
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    first, second = trainer._metrics["eval"]["entropy"]
    assert first == pytest.approx(second, rel=1e-5)


def test_data_parallel_training_is_trls(folder: Path) -> None:
    """Two processes on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])), "OMP_NUM_THREADS": "1"}
    common["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "tests.engine.embed.two_processes", str(folder)]
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        output, errors = processes[0].communicate(timeout=200)
    finally:
        for process in processes[::-1]:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 0, errors
    [line] = [line for line in output.splitlines() if line.startswith("FOUND")]
    theirs, ours = json.loads(line.removeprefix("FOUND"))
    assert theirs["model"] == ours["model"] == "DistributedDataParallel"
    assert ours["weights"] == pytest.approx(theirs["weights"], abs=1e-5)
    for mine, other in zip(ours["logs"], theirs["logs"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert theirs["logs"][3]["clip_ratio/region_mean"] > 0.1


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vespo": ({"loss_type": "vespo"}, {}),
    "importance_sampling_level": ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, {}),
    "delta": ({"delta": 1.1}, {}),
    "epsilon_high": ({"loss_type": "cispo"}, {}),
    "entropy_coef": ({"entropy_coef": 0.01}, {}),
    "router loss": ({}, {"aux_loss_enabled": True}),
    "images": ({}, {"_is_vlm": True}),
    "use_liger_kernel": ({}, {"args.use_liger_kernel": True}),
    "torch_compile": ({}, {"args.torch_compile": True}),
    "logits_scaling": ({}, {"model.config.logits_scaling": 8.0}),
    "FSDP": ({}, {"accelerator.state.distributed_type": "FSDP"}),
}


@pytest.mark.parametrize(("name", "case"), REFUSED.items(), ids=REFUSED.keys())
def test_what_ours_does_not_cover_is_refused_by_name(
    folder: Path, name: str, case: tuple[dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, attributes = case
    trainer = grpo(folder, **options)
    for path, value in attributes.items():
        *owners, last = path.split(".")
        owner = trainer
        for part in owners:
            owner = getattr(owner, part)
        monkeypatch.setattr(owner, last, value, raising=False)
    with pytest.raises(CannotSwitch, match=name):
        switch_on(trainer)
    assert "_compute_loss" not in vars(trainer)
    assert backend.report().embedded == ()


def test_other_trainers_and_releases_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            return super()._compute_loss(model, inputs)

    with pytest.raises(CannotSwitch, match=r"Own changes GRPOTrainer\._compute_loss"):
        switch_on(grpo(folder, kind=Own))
    trainer = grpo(folder)
    with switch_on(trainer), pytest.raises(CannotSwitch, match="If it is switched on, take that back first"):
        switch_on(trainer)
    with pytest.raises(TypeError, match="takes no preference loss"):
        switch_on(trainer, BradleyTerry())
    with pytest.raises(TypeError, match="got int"):
        switch_on(3)
    with pytest.raises(TypeError, match="needs a preference loss"):
        switch_on(reward(folder))
    monkeypatch.setattr(embed, "version", lambda name: "1.17.0")
    with pytest.raises(CannotSwitch, match=r"1\.17\.0 is installed.*trl==1\.16"):
        switch_on(trainer)


def test_reward_trainer_with_its_own_loss_is_the_same(folder: Path) -> None:
    trained = []
    for on in (False, True):
        trainer = reward(folder, gradient_accumulation_steps=2)
        if on:
            switched = switch_on(trainer, BradleyTerry(soft=False))
            assert "RewardTrainer: loss (BradleyTerry); no kernel" in str(backend.report())
        trainer.train()
        trained.append(trainer)
    switched.off()
    assert "compute_loss" not in vars(trained[1])
    for mine, other in zip(trained[1].model.parameters(), trained[0].model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    for mine, other in zip(trained[1].state.log_history[:2], trained[0].state.log_history[:2], strict=True):
        for name in ("loss", "accuracy", "margin", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7)


def test_reward_trainer_learns_from_strengths(folder: Path) -> None:
    strengths = [0.5 + i / 32 for i in range(16)]
    trainer = reward(folder, columns={"strength": strengths}, learning_rate=0.0, max_steps=1)
    seen = []
    model_forward = trainer.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        assert "strength" not in kwargs
        out = model_forward(*args, **kwargs)
        seen.append((kwargs["input_ids"][:, 0], out.logits.detach()))
        return out

    trainer.model.forward = forward
    with switch_on(trainer, BradleyTerry()):
        trainer.train()
    [(first, logits)] = seen
    chosen, rejected = logits.squeeze(-1).double().chunk(2)
    rows = (first[: len(chosen)] - 4).tolist()  # a row's first word tells which it is
    expected = 0.0
    for row, c, r in zip(rows, chosen.tolist(), rejected.tolist(), strict=True):
        s, d = strengths[row], c - r
        expected += (s * math.log1p(math.exp(-d)) + (1 - s) * math.log1p(math.exp(d))) / len(rows)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_reward_trainers_options_that_ours_does_not_cover(folder: Path) -> None:
    with pytest.raises(CannotSwitch, match="center_rewards_coefficient"):
        switch_on(reward(folder, center_rewards_coefficient=0.01), BradleyTerry())
    trainer = reward(folder, columns={"margin": [0.1] * 16})
    with pytest.raises(CannotSwitch, match='column "margin"'), switch_on(trainer, BradleyTerry()):
        trainer.train()
    with pytest.raises(Exception, match="rlhf_preference_loss"):
        from rlhf_plugins.grpo import GRPO

        switch_on(reward(folder), GRPO())


def test_nothing_of_others_is_imported_before_it_is_called_for() -> None:
    code = (
        "import sys, rlhf_engine.embed.trl, rlhf_engine.embed.verl, rlhf_engine.embed.openrlhf;"
        "print([name for name in ('trl', 'transformers', 'accelerate', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
