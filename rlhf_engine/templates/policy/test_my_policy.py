"""What the engine relies on: padding changes nothing, the past alone counts, bits survive the disk, it learns."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rlhf_engine import Engine, FunctionReward, Models, Prompt, Rollout, Stage
from rlhf_engine.manager import load, manager
from torch import Tensor

import my_policy as plugin

TEXTS = ["a", "film", "naïve, but good"]


def models(stage: str = "rl", *, pretrained: Path | None = None) -> Models:
    run: Any = SimpleNamespace(result=lambda stage: pretrained)
    hook = manager([plugin.MyPolicy(width=16)]).hook
    return hook.rlhf_models(run=run, stage=stage, needs={"ref_logp", "values"})


def padded(rows: list[list[int]], *, more: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and mask, padded on the left as prompts are."""
    width = max(map(len, rows)) + more
    tokens = torch.tensor([[plugin.Bytes.pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask


def test_text_comes_back() -> None:
    assert plugin.Bytes().decode(plugin.Bytes().encode(TEXTS)) == TEXTS
    assert plugin.Bytes().decode([[104, 105, plugin.Bytes.end_id, plugin.Bytes.pad_id]]) == ["hi"]


def test_padding_changes_no_answer() -> None:
    network, rows = plugin.Network(16), plugin.Bytes().encode(TEXTS)
    together = network(*padded(rows, more=3))
    assert together.values is not None
    for number, row in enumerate(rows):
        alone = network(*padded([row]))
        assert alone.values is not None
        torch.testing.assert_close(together.next_logits()[number], alone.next_logits()[0])
        torch.testing.assert_close(together.values[number, -len(row) :], alone.values[0])


def test_what_comes_later_changes_no_answer_and_what_came_before_does() -> None:
    network, (tokens, mask) = plugin.Network(16), padded([[1, 2, 3, 4]])
    answer = network(tokens, mask).hidden
    later, before = tokens.clone(), tokens.clone()
    later[0, 3], before[0, 0] = 9, 9
    assert answer is not None
    torch.testing.assert_close(network(later, mask).hidden[:, :3], answer[:, :3])
    assert not torch.allclose(network(before, mask).hidden[:, 3], answer[:, 3])


def test_bits_survive_the_disk_and_rl_begins_from_them(tmp_path: Path) -> None:
    network = plugin.Network(16)
    network.save(tmp_path)
    begun = models("rl", pretrained=tmp_path)
    for model in (begun.policy, begun.reference):
        found: Any = model
        for name, tensor in network.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
    assert not torch.equal(models("pretrain", pretrained=tmp_path).policy.head.weight, network.head.weight)  # type: ignore


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_built_in_algorithms_train_it(algorithm: str) -> None:
    torch.manual_seed(0)

    def small_bytes(rollout: Rollout) -> Tensor:
        return (rollout.tokens < 128).float().mean(1)

    plugins = [load(algorithm)(), FunctionReward(small_bytes)]
    engine = Engine(plugins, models(), samples_per_prompt=16, response_length=4)
    optimizer = torch.optim.Adam(engine.parameters(), lr=0.05)
    prompts = [Prompt(text=text) for text in TEXTS]
    scores = []
    for _ in range(30):
        batch = engine.experience(engine.generate(prompts), prompts)
        engine.update(batch, optimizer)
        scores.append(float(batch.scores.mean()))
    assert scores[-1] > scores[0] + 0.3, scores


def test_a_stage_that_it_has_no_models_for_is_refused_before_any_work() -> None:
    def asked(*stages: str) -> Any:
        stage: Any = Stage(work=print, requires=("rlhf_models",))  # type: ignore
        return SimpleNamespace(stages=dict.fromkeys(stages, stage))

    plugin.MyPolicy().rlhf_run_started(run=asked("pretrain", "rl"))
    with pytest.raises(ValueError, match='no models for the stage "reward": take it out'):
        plugin.MyPolicy().rlhf_run_started(run=asked("pretrain", "reward", "rl"))


def test_run_files_find_it() -> None:
    assert load("my_policy") is plugin.MyPolicy
