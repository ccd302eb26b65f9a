"""The cost model: figures worked out by hand, models that transformers builds, and a command that answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from rlhf_engine.cli import app
from rlhf_engine.config import ConfigError, read_run_file
from rlhf_engine.plan import (
    Job,
    Setup,
    bottleneck,
    find_architecture,
    find_machine,
    job_of,
    memory_parts,
    model_of,
    operations,
    peak,
    seconds,
)
from rlhf_engine.plan.architecture import PRESETS
from rlhf_engine.plan.check import compare
from rlhf_engine.plan.kernels import kernel_work
from rlhf_engine.plan.machine import GPUS, Machine
from rlhf_engine.plan.memory import ALWAYS, GENERATING, LEARNING, activations
from rlhf_engine.plan.step import Operation
from rlhf_engine.plan.tables import check_tables, duration, size, spare
from tests.toys import run_file

MOVIES = Path(__file__).resolve().parents[2] / "examples" / "movies.toml"
PPO = Job(
    prompts=128, prompt_tokens=512, response_tokens=1024, epochs=2, minibatch=64, piece=4, old_logp=True,
    reference=True, values=True, own_critic=True, reward_model=True,
)  # fmt: skip
GRPO = Job(prompts=16, samples=8, prompt_tokens=512, response_tokens=1024, minibatch=128, piece=2)


def on_h100(job: Job = PPO, model: str = "llama-8b", **changes: Any) -> Setup:
    return Setup(job=job, model=find_architecture(model), machine=GPUS["h100"], **changes)


def parts(setup: Setup) -> dict[str, float]:
    return {part.name: part.bytes for part in memory_parts(setup)}


def by_name(setup: Setup) -> dict[str, Operation]:
    return {operation.name: operation for operation in operations(setup)}


# ----------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_parameters_are_the_published_ones(name: str, parameters: int) -> None:
    assert find_architecture(name).parameters == parameters


SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("config", "kind"),
    [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)],
)
def test_a_config_has_the_parameters_that_transformers_builds(
    tmp_path: Path, config: Any, kind: Any, tied: bool
) -> None:
    made = config(**SIZES, head_dim=8, tie_word_embeddings=tied)
    made.save_pretrained(tmp_path)
    model = kind(made)
    found = find_architecture(str(tmp_path))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found == find_architecture(str(tmp_path / "config.json"))
    assert found.trunk == sum(p.numel() for p in model.base_model.parameters())


def test_arithmetic_is_what_torch_counts() -> None:
    """But for attention, where torch counts every pair of tokens and a causal model needs half."""
    rows, length = 2, 12
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    ours = replace(
        find_architecture("llama-1b"),
        vocabulary=96,
        hidden=32,
        intermediate=48,
        layers=3,
        heads=4,
        kv_heads=2,
        head_size=8,
    )
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(96, (rows, length)), use_cache=False)
    attention = rows * ours.attention_flops(0, length)
    tokens = rows * length
    assert counter.get_total_flops() == ours.body_flops(tokens) + ours.head_flops(tokens) + 2 * attention


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, width: int) -> None:
    def kept(layers: int) -> float:
        sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers}
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        stored: dict[int, torch.Tensor] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                stored[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.base_model(input_ids=torch.randint(96, (2, 64)), use_cache=False)
        return sum(x.untyped_storage().nbytes() for x in stored.values()) / (2 * 64)

    ours = replace(find_architecture("llama-1b"), hidden=128, intermediate=256, heads=4, kv_heads=2, head_size=32)
    assert kept(3) - kept(2) == pytest.approx(ours.kept_bytes(width), rel=0.01)  # the rest: a number a head and norm


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "gpt2"}', "'gpt2'; known are llama"),
        ('{"model_type": "llama"}', "has no 'num_attention_heads'"),
        ("{", "cannot be read"),
        (json.dumps({"model_type": "llama", **SIZES, "num_hidden_layers": 0}), "at least 1"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        find_architecture(str(tmp_path))


def test_unknown_names_are_told_with_what_is_known() -> None:
    with pytest.raises(ConfigError, match='Did you mean "llama-8b".*qwen2.5-7b'):
        find_architecture("lama-8b")
    with pytest.raises(ConfigError, match='Did you mean "h100".*cpu'):
        find_machine("h10")


# ---------------------------------------------------------------------------------------------- the memory


def test_memory_by_hand() -> None:
    """llama-8b on one device in 16 bits: 2 bytes a weight, 12 of Adam, 2 of gradient; a critic of 7.5e9 beside it."""
    found, model = parts(on_h100()), find_architecture("llama-8b")
    policy, critic = 8_030_261_248, 8_030_261_248 - 128_256 * 4096 + 4096
    assert model.kv_bytes(2) == 131_072
    assert found["policy"] == 2 * policy
    assert found["critic"] == found["reward model"] == 2 * critic
    assert found["optimizer states"] == 12 * (policy + critic)
    assert found["gradients"] == 2 * (policy + critic)
    assert found["reference"] == 2 * policy
    assert found["keys and values"] == 128 * (512 + 1024) * 131_072
    assert found["logits, by the kernels"] == 2 * 256 * 2**20 + 4 * 128_256 * 4096
    assert not {"generator's weights", "gathered layer"} & set(found)


def test_adam_in_float32_needs_no_copy_of_the_weights() -> None:
    assert parts(on_h100(GRPO, dtype="float32"))["optimizer states"] == 8 * 8_030_261_248


def test_activations_by_hand() -> None:
    """Of 2 sequences of 1536 tokens; with recomputation one input a layer and one layer."""
    setup = on_h100(GRPO)
    layer = 2 * (4 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14_336) + 8 * 4096
    assert activations(setup, recompute=False) == 2 * 1536 * 32 * layer
    assert activations(setup, recompute=True) == 2 * 1536 * (32 * 4096 * 2 + layer)
    assert activations(on_h100(replace(PPO, piece=2)), recompute=False) == 2 * activations(setup, recompute=False)


def test_the_most_at_a_time_is_the_larger_of_two_turns() -> None:
    setup = on_h100(count=8)
    found = memory_parts(setup)
    total = {when: sum(x.bytes for x in found if x.when == when) for when in (ALWAYS, GENERATING, LEARNING)}
    assert peak(found) == total[ALWAYS] + max(total[GENERATING], total[LEARNING])
    assert isclose(sum(total.values()), sum(part.bytes for part in found))


JOBS = st.builds(
    Job,
    prompts=st.integers(1, 300), samples=st.integers(1, 9), prompt_tokens=st.integers(1, 5000),
    response_tokens=st.integers(1, 5000), minibatch=st.integers(1, 300), piece=st.integers(1, 40),
    reference=st.booleans(), own_critic=st.booleans(), reward_model=st.booleans(),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(job=JOBS, model=st.sampled_from(sorted(PRESETS)), dtype=st.sampled_from(["bfloat16", "float32"]))
def test_more_devices_never_need_more_memory_on_each(job: Job, model: str, dtype: str) -> None:
    needed = [
        peak(memory_parts(on_h100(job, model, count=n, dtype=dtype))) for n in (1, 2, 3, 4, 7, 8, 12, 16, 64, 100)
    ]
    assert needed == sorted(needed, reverse=True)


def test_the_generator_is_split_over_as_few_devices_as_will_do() -> None:
    assert on_h100(count=64).tensor_parallel == 1  # 16 of 80 GB
    assert on_h100(model="llama-70b", count=64).tensor_parallel == 8  # 141 GB: a quarter of 80 GB holds an eighth of it
    assert on_h100(model="llama-70b", count=6).tensor_parallel == 4
    assert on_h100(model="llama-70b", count=64).generated == 16


# ------------------------------------------------------------------------------------------------ the step


def test_sampling_takes_at_least_a_walk_through_the_weights_for_every_token() -> None:
    setup = on_h100(replace(GRPO, prompts=1, samples=1))
    weights = 2 * (8_030_261_248 - 128_256 * 4096 - 4096)  # all but the embedding and the last norm
    seen = sum(512 + i + 0.5 for i in range(1024)) * 131_072
    found = by_name(setup)["generate: tokens"]
    assert found.bytes == 1024 * weights + seen + 32 * 1024 * 128_256
    products = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336) + 128_256 * 4096
    attention = 4 * 32 * 4096 * sum(512 + i + 0.5 for i in range(1024))
    assert found.flops == 2 * products * 1024 + attention
    eager = replace(setup, machine=replace(setup.machine, launch=0.0))
    time, why = seconds(found, eager)
    assert (why, time) == ("memory", pytest.approx(found.bytes / (3.35e12 * 0.9)))
    assert time > 1024 * weights / 3.35e12


def test_learning_is_six_flops_a_weight_and_token_and_attention() -> None:
    found, again = by_name(on_h100(GRPO)), by_name(on_h100(GRPO, recompute=True))
    tokens, products = 128 * 1536, 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    attention = 12 * 32 * 4096 * 1536**2 / 2 * 128
    assert found["policy: learn"].flops == 6 * products * tokens + attention
    assert again["policy: learn"].flops == pytest.approx(found["policy: learn"].flops * 4 / 3)
    head = 128 * 1024 * 128_256 * 4096
    assert found["policy: log-probs, learn"].flops == 8 * head  # four products: the logits are computed again


def test_what_a_run_needs_decides_what_is_computed() -> None:
    grpo, ppo = by_name(on_h100(GRPO)), by_name(on_h100(PPO))
    forwards = {"policy: forward", "reference: forward", "critic: forward", "reward model: forward"}
    assert forwards <= set(ppo) and not forwards & set(grpo)
    assert {"critic: learn", "value loss"} <= set(ppo) and not {"critic: learn", "value loss"} & set(grpo)
    shared = by_name(on_h100(replace(PPO, own_critic=False)))
    assert "value loss" in shared and "critic: learn" not in shared
    assert on_h100(replace(PPO, own_critic=False)).trained == 8_030_261_248 + 4096


def test_one_device_transfers_nothing_and_many_as_zero_says() -> None:
    assert not any(operation.transfers for operation in operations(on_h100()))
    job = replace(GRPO, piece=64)  # 128 responses on 8 devices: one piece each
    found = by_name(on_h100(job, count=8))
    assert found["policy: learn"].transfers == 3 * 2 * 8_030_261_248 * 7 / 8
    assert found["generate: new weights"].transfers == 2 * 8_030_261_248 * 7 / 8
    slow = seconds(found["generate: new weights"], on_h100(job, count=16))[0]
    assert slow == pytest.approx(
        9 * seconds(found["generate: new weights"], on_h100(job, count=8))[0]
    )  # 450 and 50 GB/s


def test_the_optimizer_reads_and_writes_every_state() -> None:
    found = by_name(on_h100(replace(GRPO, epochs=3, minibatch=64)))["optimizer"]
    assert found.bytes == 6 * (28 + 6) * 8_030_261_248


PLAIN = Machine(
    name="plain", flops={"bfloat16": 10.0, "float32": 10.0}, bandwidth=10.0, memory=1e18, launch=1.0,
    efficiency=replace(GPUS["h100"].efficiency, matmul=1.0, memory=0.5, link=1.0),
)  # fmt: skip


def test_the_slowest_limit_is_the_time_and_a_cpu_launches_beside() -> None:
    setup = replace(on_h100(), machine=PLAIN)
    work = Operation(name="x", flops=40.0, bytes=30.0, launches=3)
    assert seconds(work, setup) == (6.0, "memory")
    assert seconds(replace(work, flops=70.0), setup) == (7.0, "arithmetic")
    assert seconds(replace(work, launches=9), setup) == (9.0, "launches")
    setup = replace(setup, machine=replace(PLAIN, is_cpu=True))
    assert seconds(work, setup) == (9.0, "memory")
    assert seconds(replace(work, launches=9), setup) == (15.0, "launches")


def test_the_bottleneck_and_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*flops: float) -> str:
        made = [Operation(name=f"part {i}", flops=x) for i, x in enumerate(flops)]
        monkeypatch.setattr("rlhf_engine.plan.step.operations", lambda setup: made)
        return bottleneck(replace(on_h100(), machine=PLAIN))

    assert "part 1, 60% of the step, limited by arithmetic" in of(30, 60, 10)
    assert "70% as long, and it would still come first" not in of(31, 59, 10)
    assert "at half" in of(30, 60, 10).lower() and "part 0 (arithmetic, 43%)" in of(30, 60, 10)
    assert "it would still come first, then part 0 (arithmetic, 18%)" in of(10, 90)


# ------------------------------------------------------------------------------------------------- the job


def test_a_run_file_says_what_a_step_is() -> None:
    file = read_run_file(MOVIES)
    assert job_of(file) == Job(
        prompts=128, samples=1, prompt_tokens=32, response_tokens=32, epochs=2, minibatch=16, piece=16, old_logp=True,
        reference=True, values=True, own_critic=True, reward_model=True,
    )  # fmt: skip
    model = model_of(file)
    assert (model.vocabulary, model.hidden, model.layers, model.tied) == (4096, 192, 4, True)
    assert model.parameters == 4096 * 192 + 192 + 4 * (4 * 192 * 192 + 3 * 192 * 512 + 2 * 192)


def test_a_shared_critic_is_no_second_network() -> None:
    found = job_of(read_run_file(MOVIES, ["hf.shared_critic=true"]))
    assert found.values and not found.own_critic


def test_other_sizes() -> None:
    found = GRPO.resized(batch=64, tokens=8192)
    assert (found.prompts, found.samples, found.minibatch) == (8, 8, 64)
    assert (found.response_tokens, found.prompt_tokens) == (8192, 512)
    assert GRPO.resized(prompt_tokens=7).prompt_tokens == 7
    assert GRPO.resized() == GRPO
    with pytest.raises(ConfigError, match="8 to a prompt"):
        GRPO.resized(batch=12)


def test_a_run_without_rl_or_without_a_known_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its stages are pretrain; a plan is of the stage rl"):
        job_of(read_run_file(run_file(tmp_path, run={"stages": ["pretrain"]})))
    file = read_run_file(run_file(tmp_path))
    assert job_of(file).samples == 2
    with pytest.raises(ConfigError, match="say --model"):
        model_of(file)


# ----------------------------------------------------------------------------------- against measurements


def record(operation: str, shape: list[int], milliseconds: float | None, **more: Any) -> dict[str, Any]:
    spread = None if milliseconds is None else {"median": milliseconds, "low": milliseconds, "high": milliseconds}
    plain = {"dtype": "float32", "direction": "forward", "form": "", "contestant": "ours, torch", "device": "cpu"}
    return {"operation": operation, "shape": shape, "milliseconds": spread, **plain, **more}


def results(folder: Path, *records: dict[str, Any]) -> Path:
    ceilings = {"copy GB/s": 20.0, "matmul float32 TFLOP/s": 0.25, "matmul bfloat16 TFLOP/s": 0.1}
    path = folder / "results.json"
    path.write_text(json.dumps({"header": {"device": "toy"}, "ceilings": ceilings, "records": records}))
    return path


def test_predictions_beside_measurements(tmp_path: Path) -> None:
    both = "forward and backward"
    path = results(
        tmp_path,
        record("token_logprobs", [10, 100, 1000], 0.4),
        record("linear_logprobs", [100, 50, 1000], 0.5, direction=both, dtype="bfloat16"),
        record("token_logprobs", [10, 100, 1000], 0.4, dtype="bfloat16"),
        record("token_logprobs", [10, 100, 1000], 0.4, dtype="bfloat16", device="cuda"),
        record("linear_logprobs", [100, 50, 1000], 0.5, contestant="naive"),
        record("token_logprobs", [10, 100, 1000], None),
        record("step", [8, 4, 16, 32], 250.0),
    )
    found, unknown = compare(path)
    assert unknown == ["step"] and len(found) == 4
    assert found[0].floor == pytest.approx(4e6 / 20e9)
    assert found[0].predicted == pytest.approx(4e6 / 20e9 / 0.35)
    assert found[0].error == pytest.approx(0.2 / 0.35 / 0.4 - 1)
    assert found[1].floor == pytest.approx(6 * 5e6 / 0.25e12)  # multiplied in float32, which is faster there
    assert found[2].predicted == found[0].predicted  # a CPU computes in float32 anyway
    assert found[3].floor == pytest.approx(found[0].floor / 2)
    assert found[3].predicted == pytest.approx(2e6 / 20e9 / 0.9)
    printed = list(check_tables(path))
    assert "token_logprobs: median error 43% of 3" in printed
    assert "linear_logprobs: median error 60% of 1" in printed
    assert "all: median error 51% of 4" in printed
    assert "no formula, not compared: step" in printed


@pytest.mark.parametrize("text", ["{", "[]", '{"records": []}', '{"ceilings": {"copy GB/s": 1}, "records": [{}]}'])
def test_a_file_that_holds_no_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match="not a file of `rlhf bench --json`"):
        compare(tmp_path / "x.json")


def test_results_with_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no timed record of ours"):
        compare(results(tmp_path, record("step", [1], 1.0)))
    with pytest.raises(ConfigError, match="cannot be read"):
        compare(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("operation", "shape", "backward", "expected"),
    [  # milliseconds on an H100 at 3.35 TB/s and 989 TFLOP/s, from the least that must move
        ("token_logprobs", (8192, 151_936), False, 0.743),
        ("token_logprobs", (8192, 151_936), True, 3 * 0.743),
        ("linear_logprobs", (8192, 4096, 151_936), False, 10.3),
        ("linear_policy_loss", (8192, 4096, 151_936), True, 30.9),
        ("exact_kl", (8192, 151_936), False, 1.486),
        ("shaped_gae", (1024, 8192), False, 0.0726),
    ],
)
def test_the_floors_of_the_kernels(operation: str, shape: tuple[int, ...], backward: bool, expected: float) -> None:
    work = kernel_work(operation, shape, 2, backward=backward)
    assert work is not None
    assert 1e3 * max(work.bytes / 3.35e12, work.flops / 989.4e12) == pytest.approx(expected, rel=0.01)


# --------------------------------------------------------------------------------------------- the command


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    import rich
    from rich.console import Console

    def call(*arguments: object) -> str:
        monkeypatch.setattr(rich, "_console", Console(width=200))
        done = CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    monkeypatch.setattr(rich, "get_console", lambda: Console(width=200))
    return call


def test_the_command_on_the_example(plan: Callable[..., str]) -> None:
    said = plan(MOVIES, "--gpu", "h100", "--count", 8, "--model", "llama-8b", "--tokens", 8192, "--sweep")
    for expected in (
        "8,030,261,248 parameters", "8 x h100", "optimizer states", "keys and values", "NOT fit", "generate: tokens",
        "policy: log-probs, learn", "Bottleneck: ", "llama-70b", "128k", "43% of the matrix peak",
    ):  # fmt: skip
        assert expected in said, expected


def test_the_command_on_this_machine(plan: Callable[..., str]) -> None:
    said = plan(MOVIES, "--gpu", "cpu")
    assert "2,557,632 parameters" in said and "float32" in said and "It fits." in said


def test_the_command_says_what_would_help(plan: Callable[..., str]) -> None:
    def said(*arguments: object) -> str:
        return plan(MOVIES, "--model", "llama-8b", *arguments)

    assert "It does NOT fit; the largest part is: activations. With --recompute it would." in said(
        "--count", 8, "--tokens", 8192
    )
    assert "With --recompute and --set rl.rows_per_forward=1 it would." in said(
        "--count",
        2 * 8,
        "--tokens",
        80_000,
        "--batch",
        32,
        "--set",
        "rl.minibatch_size=32",
        "--set",
        "hf.shared_critic=true",
    )
    assert "largest part is: optimizer states. What helps: more devices." in said()


def test_the_command_compares(plan: Callable[..., str], tmp_path: Path) -> None:
    path = results(tmp_path, record("token_logprobs", [10, 100, 1000], 0.4))
    assert "all: median error 43% of 1" in plan("--check", path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs a run file"),
        ([MOVIES, "--gpu", "v100"], "--gpu v100: unknown"),
        ([MOVIES, "--model", "gpt-5"], "neither a known model"),
        ([MOVIES, "--dtype", "int4"], "Known: bfloat16, float16, float32"),
        ([MOVIES, "--gpu", "cpu", "--count", "2"], "one such machine"),
        ([MOVIES, "--gpu", "cpu", "--sweep"], "one such machine"),
        ([MOVIES, "--set", "rl.epoch=2"], 'Did you mean "epochs"'),
    ],
)
def test_the_command_refuses(arguments: list[object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)


def test_what_does_not_fit_is_tried_more_sparingly() -> None:
    assert spare(on_h100(replace(GRPO, prompts=1), "qwen2.5-0.5b"))[1] == "yes"
    long = replace(GRPO, prompts=8, samples=1, minibatch=8, piece=8, response_tokens=2048)
    setup = on_h100(long, "llama-3b")
    assert spare(setup) == (replace(setup, recompute=True), "yes, recomputed")
    longer = on_h100(replace(long, response_tokens=64 * 1024, prompts=2), "llama-3b", count=2)
    case, fit = spare(longer)
    assert (case.recompute, case.piece, fit) == (True, 1, "yes, recomputed, one at a time")
    assert spare(on_h100(model="llama-70b"))[1] == "no"


def test_figures_are_short() -> None:
    assert [size(x) for x in (5e2, 1.5e6, 80e9, 402.4e9, 2.46e12)] == ["0.5 kB", "1.5 MB", "80 GB", "402 GB", "2.46 TB"]
    assert [duration(x) for x in (1134.2, 0.0123, 4e-6, 5e-9)] == ["1134 s", "12.3 ms", "4 us", "5 ns"]
