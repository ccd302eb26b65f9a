"""Chat templates in `rlhf_plugins.hf`: policies and reward models read the very tokens that transformers would give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_engine import Document, Engine, Loss, Preference, Prompt, Reward, Rollout, hookimpl
from rlhf_engine.config import ConfigError, read_run_file
from rlhf_engine.run import Run
from rlhf_engine.stages.reward import score_pairs
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.hf import ChatTokenizer, HFPolicy, HFScalar, HFTokenizer, load_models
from rlhf_plugins.reward_model import RewardModelScore
from tests.toys import run_file

TEXTS = ["what is a very good film", "a bad film is what nobody likes", "user assistant"] * 5
START, STOP = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_folder(folder: Path, template: str | None = CHATML) -> Path:
    """A tiny Llama whose tokenizer has a chat template and tokens for turns."""
    trained = HFTokenizer.train(TEXTS, 280).tokenizer
    trained.add_special_tokens({"extra_special_tokens": [START, STOP]})
    trained.chat_template = template
    tokenizer = HFTokenizer(trained)
    sizes = {"hidden": 16, "layers": 1, "heads": 2, "intermediate": 24, "context": 64}
    HFPolicy.fresh(vocabulary=len(tokenizer), **sizes, pad_id=tokenizer.pad_id, end_id=tokenizer.end_id, seed=1).save(
        folder
    )
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chat"))


SEEN: list[tuple[list[Prompt], list[str]]] = []


class World:
    """What a run needs; the reward writes down what it was shown."""

    @hookimpl
    def rlhf_documents(self) -> Iterator[Document]:
        for split in ("train", "heldout"):
            yield from [Document(text=text, split=split) for text in TEXTS]

    @hookimpl
    def rlhf_prompts(self) -> list[Prompt]:
        return [Prompt(text=t, split=s) for t in ("good?", "a bad film?") for s in ("train", "heldout")]

    @hookimpl
    def rlhf_preferences(self) -> list[Preference]:
        return [Preference(prompt=p, chosen="very good", rejected="bad") for p in ("film?", "what is a film?", "")]

    @hookimpl
    def rlhf_preference_loss(self, chosen: torch.Tensor, rejected: torch.Tensor) -> Loss:
        return Loss(value=-(chosen - rejected).sigmoid().log().mean())

    @hookimpl
    def rlhf_reward(self, rollout: Rollout, prompts: list[Prompt], texts: list[str]) -> Reward:
        SEEN.append((prompts, texts))
        return Reward(name="length", values=rollout.mask.sum(1).float())


def test_the_policy_reads_what_transformers_gives(folder):
    models = load_models(folder, chat_template=True)
    engine = Engine([GRPO(), World()], models, response_length=5, samples_per_prompt=2)
    prompts = [Prompt(text="good?"), Prompt(text="what is a bad film?")]
    rollout = engine.generate(prompts)
    for row, mask, group in zip(rollout.prompt_tokens, rollout.prompt_mask, rollout.group, strict=True):
        message = [{"role": "user", "content": prompts[group].text}]
        expected = models.tokenizer.tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
        assert row[mask].tolist() == expected
    SEEN.clear()
    engine.score(rollout, prompts)
    assert [prompt.text for prompt in SEEN[0][0]] == ["good?"] * 2 + ["what is a bad film?"] * 2, "rewards see messages"

    plain = load_models(folder)
    raw = Engine([GRPO(), World()], plain, response_length=5, samples_per_prompt=2).generate(prompts[:1])
    assert raw.prompt_tokens[0].tolist() == plain.tokenizer.encode(["good?"])[0]


def test_the_end_of_turn_ends_a_response(folder, tmp_path):
    tokenizer = ChatTokenizer.load(folder)
    stop = tokenizer.tokenizer.convert_tokens_to_ids(STOP)
    assert tokenizer.end_id == stop
    assert HFTokenizer.load(folder).end_id != stop

    models = load_models(folder, chat_template=True)
    with torch.no_grad():  # a policy that says nothing but the end of turn
        models.policy.model.model.norm.weight.zero_()
        models.policy.model.lm_head = torch.nn.Linear(16, len(tokenizer))
        models.policy.model.lm_head.bias.fill_(-50.0)[stop] = 50.0
    engine = Engine([GRPO(), World()], models, response_length=5, samples_per_prompt=2)
    rollout = engine.generate([Prompt(text="good?")])
    assert rollout.ended.all()
    assert rollout.tokens.tolist() == [[stop], [stop]]
    assert engine.texts(rollout) == ["", ""]

    # Where no special token follows a message, the tokenizer's end token stays.
    assert ChatTokenizer.load(chat_folder(tmp_path, PLAIN)).end_id == HFTokenizer.load(folder).end_id


def test_a_reward_model_reads_a_preference_as_it_reads_a_rollout(folder, tmp_path):
    """The same message and answer have the same score in the reward stage and in the rl stage."""
    scalar = HFScalar.on_trunk(folder, pad_id=0)
    scalar.initialise_reward_head(0)
    scalar.save(tmp_path / "reward")
    HFTokenizer.load(folder).save(tmp_path / "reward")
    models = load_models(folder, reward_model=tmp_path / "reward", chat_template=True)
    in_stage_2 = score_pairs(models, [Preference(prompt="good?", chosen=" very good", rejected=" bad")])

    encode = models.tokenizer.encode
    row = encode([models.tokenizer.as_prompt("good?") + " very good"])[0]
    width = len(encode([models.tokenizer.as_prompt("good?")])[0])
    asked, answer = torch.tensor([row[:width]]), torch.tensor([[*row[width:], models.tokenizer.end_id]])
    rollout = Rollout(
        prompt_tokens=asked, prompt_mask=asked >= 0, tokens=answer, mask=answer >= 0, group=torch.zeros(1).long(),
        logp=torch.zeros(answer.shape), ended=torch.tensor([True]),
    )  # fmt: skip
    in_stage_3 = RewardModelScore().score(rollout, models, models.reward_model)
    torch.testing.assert_close(in_stage_3, in_stage_2["chosen"], atol=1e-6, rtol=0)
    raw = load_models(folder, reward_model=tmp_path / "reward")
    unread = score_pairs(raw, [Preference(prompt="good?", chosen=" very good", rejected=" bad")])
    assert not torch.allclose(unread["chosen"], in_stage_3, atol=1e-3)


def test_a_text_without_a_prompt_stays_as_it_is(folder):
    models = load_models(folder, chat_template=True)
    assert models.as_prompt("") == ""
    assert models.as_prompt("hi") == f"{START}user\nhi{STOP}\n{START}assistant\n"
    assert load_models(folder).as_prompt("hi") == "hi"


@pytest.mark.parametrize("stages", [["reward", "rl"], ["pretrain", "rl"]])
def test_a_run_with_a_chat_template(folder, tmp_path, stages):
    hf = {"policy": str(folder), "chat_template": True, "device": "cpu"}
    run = Run(
        read_run_file(run_file(tmp_path, run={"stages": stages, "plugins": ["hf", "grpo", f"{__name__}:World"]}, hf=hf))
    )
    run.execute()
    shown = run.results("rl")["after"]["samples"][0]["prompt"]
    assert shown == "user\ngood?\nassistant\n"
    assert ChatTokenizer.load(run.result("rl")).as_prompt("x") == ChatTokenizer.load(folder).as_prompt("x")


def test_a_tokenizer_without_a_template_is_refused_before_any_work(folder, tmp_path):
    bare = chat_folder(tmp_path / "bare", None)
    with pytest.raises(ValueError, match="chat_template = true, but the tokenizer .*bare' has no chat template of its"):
        load_models(bare, chat_template=True)

    def run_of(where: str, **hf: object) -> Run:
        (tmp_path / where).mkdir()
        plugins = ["hf", "grpo", f"{__name__}:World"]
        table = {"chat_template": True, "device": "cpu", **hf}
        return Run(read_run_file(run_file(tmp_path / where, run={"plugins": plugins}, hf=table)))

    run = run_of("one", policy=str(bare))
    with pytest.raises(ValueError, match="no chat template of its own. Take the folder of a model"):
        run.execute()
    assert not (run.folder / "pretrain").exists()
    with pytest.raises(ConfigError, match=r"\[hf\]: chat_template = true needs a tokenizer that has a template"):
        run_of("two")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no') }}", "takes no conversation of user and assistant alone: no"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "message out"),
    ],
)
def test_a_template_that_does_not_serve_is_refused(template, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        ChatTokenizer.load(chat_folder(tmp_path, template))


def test_several_templates_are_no_choice_of_ours(tmp_path):
    folder = chat_folder(tmp_path, None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "one", "template": CHATML}, {"name": "two", "template": CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no chat template of its own: it has several, by name"):
        ChatTokenizer.load(folder)
