"""The rivals, each as a function that makes exactly one of its optimizer steps per call.

TRL's trainers run unmodified: `trainer.train()` goes on in a thread of its own and is held, by a callback, at the end
of every optimizer step. A call lets it run to the next one. Its sampler, its generate, its loss and its optimizer step
are its own, and while it is held it uses no processor. Everything is at TRL's defaults but for what the bench fixes
for all (batch, response length, learning-rate schedule length), fp32, and no logging, saving or progress bar.
"""

import copy
import itertools
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    StaticCache,
    TrainerCallback,
)

from .subject import Setting, letter_share, make_blocks, make_preferences

STEPS = 10_000  # more than any bench asks for: the trainers want to know the length of their schedule


class HeldTrainer:
    """A trainer whose `train()` advances by one optimizer step per call; `close()` ends it."""

    def __init__(self, trainer: Any):
        self._proceed, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._closing = False
        self._ended = False
        self._error: BaseException | None = None
        self.trainer = trainer
        trainer.remove_callback(PrinterCallback)  # PPOTrainer logs at every step whatever it is told
        trainer.add_callback(_Hold(self))
        threads = torch.get_num_threads()

        def run() -> None:
            try:
                torch.set_num_threads(threads)  # OpenMP keeps the count per thread
                self._proceed.acquire()
                if not self._closing:
                    trainer.train()
            except _Closed:
                pass
            except BaseException as error:  # handed to the caller, who otherwise would wait for ever
                self._error = error
            self._ended = True
            self._arrived.release()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Called in the trainer's thread at the end of a step: report it, then wait for the next call."""
        self._arrived.release()
        self._proceed.acquire()
        if self._closing:
            raise _Closed

    def __call__(self) -> None:
        """One optimizer step of the trainer (PPOTrainer: one batch with all its epochs)."""
        if not self._ended:  # a thread that has ended answers no further call
            self._proceed.release()
            self._arrived.acquire()
        if self._error is not None:
            raise RuntimeError(f"{type(self.trainer).__name__} failed inside its training loop") from self._error
        if self._ended:
            raise RuntimeError(f"{type(self.trainer).__name__} finished: it has no step left")

    def close(self) -> None:
        """End the training loop where it is held; nothing is saved."""
        self._closing = True
        self._proceed.release()
        self._thread.join()


class _Closed(Exception):
    pass


class _Hold(TrainerCallback):
    def __init__(self, held: HeldTrainer):
        self._held = held

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._held.hold()


def _trl(release: str) -> Any:
    """TRL, imported only when asked for: the benches that need no rival run without it."""
    try:
        import trl
    except ImportError as error:
        raise ImportError(f"this rival needs TRL {release}: pip install trl=={release}") from error
    if trl.__version__ != release:
        raise ImportError(f"this rival is TRL {release}, found {trl.__version__}: pip install trl=={release}")
    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every trainer that is made; a bench sends nothing
    return trl


def _common(folder: str) -> dict[str, Any]:
    """What every trainer here is told: fp32 on the CPU, silent, nothing written but an empty folder."""
    return {
        "output_dir": folder,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _dataset(rows: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(rows)


def hf_pretrain(model: PreTrainedModel, setting: Setting) -> HeldTrainer:
    """transformers' own Trainer at its defaults: a step is 32 blocks of 128 tokens, the model's own loss."""
    try:
        import accelerate  # noqa: F401 (the Trainer says so only when it is made)
        from transformers import Trainer, TrainingArguments
    except ImportError as error:
        raise ImportError("this rival, transformers' Trainer, needs accelerate: pip install accelerate") from error
    arguments = TrainingArguments(
        **{name: value for name, value in _common(tempfile.mkdtemp()).items() if name != "bf16"},
        per_device_train_batch_size=setting.batch,
        max_steps=STEPS,
    )
    blocks = make_blocks(setting, 64 * setting.batch)
    rows = [{"input_ids": row, "labels": row} for row in blocks]
    return HeldTrainer(Trainer(model=copy.deepcopy(model), args=arguments, train_dataset=rows))


def trl_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    setting: Setting,
    reward: Callable[[list[str]], list[float]] = letter_share,
    *,
    gradient_checkpointing: bool = False,
) -> HeldTrainer:
    """TRL 1.16's GRPOTrainer at its defaults (dapo loss, beta 0, one iteration) but for gradient checkpointing, which
    it has on, and which costs a forward pass that nobody else here takes.

    A step: 8 prompts x 4 completions, generated in one go, rewarded by `reward(texts)`, one update on all 32.
    """
    trl = _trl("1.16.0")
    arguments = trl.GRPOConfig(
        **{**_common(tempfile.mkdtemp()), "use_cpu": model.device.type == "cpu"},
        per_device_train_batch_size=setting.batch,
        num_generations=setting.group,
        max_completion_length=setting.response_length,
        gradient_checkpointing=gradient_checkpointing,
        max_steps=STEPS,
    )

    def reward_function(completions: list[str], **columns: Any) -> list[float]:
        return reward(completions)

    trainer = trl.GRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=reward_function,
        args=arguments,
        train_dataset=_dataset({"prompt": prompts}),
        processing_class=copy.deepcopy(tokenizer),
    )
    return HeldTrainer(trainer)


def trl_ppo(
    policy: PreTrainedModel,
    critic: PreTrainedModel,
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    setting: Setting,
) -> HeldTrainer:
    """TRL 1.10's PPOTrainer, the last release that has one, at its defaults.

    A step here is one of its on_step_end: a batch of 32 distinct prompts is generated, scored by the reward model,
    valued by the critic and compared with a frozen reference; then 4 epochs of one minibatch each, 4 optimizer steps.
    """
    _trl("1.10.0")
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"TRL 1.10's PPOTrainer does not import ({error}): pip install requests") from error
    arguments = PPOConfig(
        **_common(tempfile.mkdtemp()),
        per_device_train_batch_size=setting.batch,
        response_length=setting.response_length,
        total_episodes=STEPS * setting.batch,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=copy.deepcopy(tokenizer),
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(policy),
        reward_model=copy.deepcopy(reward_model),
        value_model=copy.deepcopy(critic),
        train_dataset=_dataset({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]}),
    )
    return HeldTrainer(trainer)


def trl_reward(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, setting: Setting) -> HeldTrainer:
    """TRL 1.16's RewardTrainer with gradient checkpointing off: a step is 32 pairs of 48 tokens (and the end token)."""
    trl = _trl("1.16.0")
    arguments = trl.RewardConfig(
        **_common(tempfile.mkdtemp()),
        per_device_train_batch_size=setting.batch,
        gradient_checkpointing=False,
        max_steps=STEPS,
    )
    trainer = trl.RewardTrainer(
        model=copy.deepcopy(model),
        args=arguments,
        train_dataset=_dataset(make_preferences(setting, 64 * setting.batch)),
        processing_class=copy.deepcopy(tokenizer),
    )
    return HeldTrainer(trainer)


def minimal_pretrain(model: PreTrainedModel, setting: Setting) -> Callable[[], None]:
    """The floor: the same step in plain PyTorch."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batches = itertools.cycle(make_blocks(setting, 64 * setting.batch).split(setting.batch))

    def step() -> None:
        tokens = next(batches)
        logits = model(input_ids=tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def minimal_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    setting: Setting,
    reward: Callable[[list[str]], list[float]] = letter_share,
) -> Callable[[], None]:
    """The honest floor: the same step in plain PyTorch, with a Hugging Face model, a static cache and no options."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batches = itertools.cycle([prompts[i : i + setting.prompts] for i in range(0, len(prompts), setting.prompts)])

    def step() -> None:
        ids = tokenizer(next(batches), return_tensors="pt")["input_ids"].repeat_interleave(setting.group, 0)
        with torch.no_grad():
            tokens = _sample(model, ids, setting.response_length)
        scores = torch.tensor(reward(tokenizer.batch_decode(tokens, skip_special_tokens=True)))
        grouped = scores.view(-1, setting.group)
        advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        logits = model(input_ids=torch.cat([ids, tokens], 1), logits_to_keep=setting.response_length + 1).logits
        chosen = -F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens, reduction="none")
        ratio = (chosen - chosen.detach()).exp()  # one update on each batch: the old policy is the current one
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sample(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Tokens [B, new_tokens] sampled at temperature 1 after ids [B, P]."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new_tokens)
    tokens, fed = [], ids
    for _ in range(new_tokens):
        logits = model(input_ids=fed, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        fed = torch.multinomial(logits.softmax(-1), 1)
        tokens.append(fed)
    return torch.cat(tokens, 1)
