"""The exact state of a run as trees of values and tensors; on disk JSON and safetensors, never pickle.

A tree is None, a bool, int, float, str or Tensor, or a dict (with int or str keys), list or tuple of trees.
"""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from rlhf_engine.batch import Batch, Columns, Rewarded, Rollout, Scored

__all__ = [
    "columns_state",
    "load_columns",
    "load_optimizer",
    "load_rng",
    "load_tree",
    "optimizer_state",
    "rng_state",
    "save_tree",
]

COLUMN_TYPES: dict[str, type[Columns]] = {kind.__name__: kind for kind in (Rollout, Scored, Rewarded, Batch)}
logger = logging.getLogger("rlhf_engine")


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Write a tree as `name.json` and `name.safetensors`, exactly.

    Tensors are stored by value: those that share memory do not when they come back. Raises TypeError, which
    says where, for what is no tree (a numpy float or a named tuple is none: its type would be lost).
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, tensors, name), allow_nan=False)
    (folder / f"{name}.json").write_text(text, "ascii")
    save_file(tensors, folder / f"{name}.safetensors")


def load_tree(folder: Path, name: str) -> Any:
    """What `save_tree` wrote, with tensors on the CPU."""
    # Clones stand where torch's allocator puts tensors. The file is not aligned so, and the last bits of a
    # matrix product may depend on the alignment.
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / f"{name}.safetensors").items()}
    return _decode(json.loads((folder / f"{name}.json").read_text("ascii")), tensors)


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """The JSON of one value: what JSON has no word for becomes an object with a single key."""
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return {"float": repr(value)}
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # A copy, because safetensors refuses tensors that share memory.
        tensors[key] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": key}
    if kind in (list, tuple):
        items = [_encode(item, tensors, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind is dict:
        pairs = []
        for key, item in value.items():
            if type(key) not in (int, str):
                raise TypeError(f"{where} has the key {key!r}; a checkpoint's keys are of type int or str")
            pairs.append([key, _encode(item, tensors, f"{where}[{key!r}]")])
        return {"dict": pairs}
    raise TypeError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds values of exactly the types "
        "dict, list, tuple, None, bool, int, float, str and Tensor"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in inner}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in inner)
    return tensors[inner] if kind == "tensor" else float(inner)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The tree of an optimizer's state and of its groups' settings (`lr` and `initial_lr` among them).

    It shares memory with the optimizer: save it before the next step.
    """
    return optimizer.state_dict()


def load_optimizer(optimizer: Optimizer, tree: dict[str, Any]) -> None:
    """Give an optimizer over the same parameters what `optimizer_state` returned, every dtype as it was."""

    def as_saved(saved: Any, loaded: Any) -> Any:
        return saved.to(loaded.device, copy=True) if isinstance(saved, Tensor) else saved

    optimizer.load_state_dict(tree)
    # torch chose the devices rightly, but cast to the parameter's dtype: fp32 moments of bf16 parameters are
    # rounded.
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for key, saved in tree["state"].items():
        parameter = parameters.get(key, key)
        optimizer.state[parameter] = tree_map(as_saved, saved, optimizer.state[parameter])


def rng_state() -> dict[str, Any]:
    """The tree of the random generators of torch (CPU; every GPU too if CUDA is in use), numpy and Python."""
    numpy_state = np.random.get_state(legacy=False)
    words = {**numpy_state["state"], "key": torch.from_numpy(numpy_state["state"]["key"].copy())}
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {**numpy_state, "state": words},
        "python": random.getstate(),
    }


def load_rng(tree: dict[str, Any]) -> None:
    """Set the generators to what `rng_state` returned. A GPU that is not there now is named in a warning."""
    torch.set_rng_state(tree["torch"])
    for index, state in enumerate(tree["cuda"]):
        if index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, index)
        else:
            logger.warning("the checkpoint has a random state for cuda:%d, which is not there now", index)
    words = {**tree["numpy"]["state"], "key": tree["numpy"]["state"]["key"].numpy()}
    np.random.set_state({**tree["numpy"], "state": words})
    random.setstate(tree["python"])


def columns_state(batch: Columns | None) -> dict[str, Any] | None:
    """The tree of a batch: the name of its type, and its columns. Raises TypeError for any other type."""
    if batch is None:
        return None
    if type(batch) not in COLUMN_TYPES.values():
        raise TypeError(f"a {type(batch).__name__} cannot be saved; allowed are {', '.join(COLUMN_TYPES)}")
    return {"type": type(batch).__name__, "columns": dict(batch.items())}


def load_columns(tree: dict[str, Any] | None) -> Columns | None:
    """The batch that `columns_state` described."""
    return None if tree is None else COLUMN_TYPES[tree["type"]](**tree["columns"])
