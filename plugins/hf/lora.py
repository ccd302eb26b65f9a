"""A policy of which a low-rank adapter alone is trained (Hu et al. 2021, through peft), and its reference.

This module imports peft, so nobody imports it who was not asked for an adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_engine.models import Heads

from .folders import quiet, require_folder
from .policy import HFPolicy

__all__ = ["LoraPolicy", "LoraReference"]

NAME = "default"  # peft's own for an only adapter
WEIGHTS, SETTINGS, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
PREFIX = "base_model.model."  # peft's files name the weights as they stand inside its own wrapper
COMPARED = ("r", "lora_alpha", "target_modules")


class LoraPolicy(HFPolicy):
    """A causal language model whose weights stand still, and an fp32 adapter on some of its linear layers.

    The adapter begins as no change at all (B is 0), so the first answers are the base model's to the bit. `save`
    and `load` are for checkpoints: the adapter, a value head, and the base model's hash. `export` writes the
    folder that others open.
    """

    def __init__(self, model: PreTrainedModel, *, rank: int, alpha: float, targets: str, seed: int) -> None:
        super().__init__(model)
        # GPT-2's linear layers hold their weights the other way round.
        turned = any(isinstance(module, Conv1D) for module in model.modules())
        settings = LoraConfig(
            r=rank,
            lora_alpha=cast(Any, alpha),  # any number will do
            target_modules=None if targets == "default" else targets,
            fan_in_fan_out=turned,
            base_model_name_or_path=model.config.name_or_path or None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(settings, model, adapter_name=NAME)
            except ValueError as error:
                raise ValueError(
                    f"peft puts no adapter on a {type(model).__name__} with lora_targets = {targets!r}: {error}. "
                    'lora_targets = "all-linear" takes every linear layer but the output layer'
                ) from error
        for parameter in self.adapter().values():
            parameter.data = parameter.data.float()  # small updates would be lost in bf16
        self.settings = settings

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if ".lora_A." in name or ".lora_B." in name}

    def base(self) -> dict[str, nn.Parameter]:
        """The parameters that stand still, by name."""
        mine = self.adapter()
        return {name: p for name, p in self.model.named_parameters() if name not in mine}

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, the model answers as before it had an adapter; afterwards all is as it was, whatever happened."""
        before = {parameter: parameter.requires_grad for parameter in self.adapter().values()}
        layers = self._layers()
        try:
            for layer in layers.values():
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers.values():
                layer.enable_adapters(True)
            for parameter, wanted in before.items():  # peft's switch has turned them all
                parameter.requires_grad_(wanted)

    def save(self, folder: Path) -> None:
        """Write what trains, and by a hash upon which weights: a checkpoint, which `load` reads."""
        self._write_adapter(folder)
        (folder / BASE).write_text(json.dumps({"sha256": self._base_hash}), "utf-8")
        self._save_value_head(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into this policy, in place and bit for bit.

        Raises ValueError if it was trained on other weights, or is an adapter of other settings.
        """
        settings = json.loads((require_folder(folder, SETTINGS) / SETTINGS).read_text("utf-8"))
        for name in COMPARED:
            mine = getattr(self.settings, name)
            mine, theirs = (sorted(x) if isinstance(x, set | list) else x for x in (mine, settings[name]))
            if mine != theirs:
                raise ValueError(
                    f"{folder} holds an adapter with {name} = {theirs!r}, but this one has {mine!r}: load it into one "
                    "made from the same settings"
                )
        if json.loads((folder / BASE).read_text("utf-8"))["sha256"] != self._base_hash:
            raise ValueError(
                f"the adapter in {folder} was trained on other weights than these: start from the folder (and with "
                "the dtype) that it was trained on"
            )
        found = load_file(folder / WEIGHTS)
        with torch.no_grad():
            for name, parameter in self.adapter().items():
                parameter.copy_(found[_file_name(name)])
        self._load_value_head(folder)

    def export(self, folder: Path) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` opens: the adapter is merged into the weights.

        `adapter/` beside them holds it alone and exactly, where merged weights are rounded to the base's dtype;
        `PeftModel.from_pretrained` opens that.
        """
        merged = {_without_layer(name): weight.detach() for name, weight in self.base().items()}
        with torch.no_grad():
            for name, layer in self._layers().items():
                weight = merged[f"{name}.weight"]
                merged[f"{name}.weight"] = (weight.float() + layer.get_delta_weight(NAME)).to(weight.dtype)
        merged |= {_without_layer(name): buffer for name, buffer in self._saved_buffers()}
        with quiet():
            self.model.save_pretrained(folder, state_dict=merged)
        self._save_value_head(folder)
        self._write_adapter(folder / "adapter")

    def _write_adapter(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self.model, adapter_name=NAME, save_embedding_layers=False)
        save_file({PREFIX + name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
        self.settings.save_pretrained(str(folder))

    def _layers(self) -> dict[str, Any]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}

    def _saved_buffers(self) -> Iterator[tuple[str, Tensor]]:
        saved = self.model.state_dict()
        return ((name, buffer) for name, buffer in self.model.named_buffers() if name in saved)

    @cached_property
    def _base_hash(self) -> str:
        hashed = hashlib.sha256()
        for name, parameter in self.base().items():
            hashed.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            hashed.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return hashed.hexdigest()


class LoraReference:
    """The policy before its adapter, as the engine's reference: the same weights in memory, the adapter off.

    Its answers carry no gradient. It has no mode of its own, and leaves the policy's alone.
    """

    has_values = False

    def __init__(self, policy: LoraPolicy) -> None:
        self.policy = policy
        self.context = policy.context

    @torch.no_grad()
    def __call__(self, tokens: Tensor, mask: Tensor) -> Heads:
        with self.policy.adapter_off():
            return self.policy.language_heads(tokens, mask)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The policy's own frozen weights."""
        return iter(self.policy.base().values())

    def train(self, mode: bool = True) -> LoraReference:
        return self

    def eval(self) -> LoraReference:
        return self

    def save(self, folder: Path) -> None:
        raise NotImplementedError("this reference is the policy's own base model; save the policy")

    def load(self, folder: Path) -> None:
        raise NotImplementedError("this reference is the policy's own base model; load the policy")


def _file_name(name: str) -> str:
    return PREFIX + name.replace(f".{NAME}.", ".")


def _without_layer(name: str) -> str:
    """A weight's name in the model without an adapter."""
    return name.replace(".base_layer.", ".")
