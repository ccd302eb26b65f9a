"""Reading Hugging Face folders: without noise, without dropout, without touching the random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

__all__ = ["quiet", "read_config", "read_model", "require_folder", "restore"]

# What may differ between two configurations of one model.
INCIDENTAL = {"_name_or_path", "architectures", "dtype", "transformers_version"}


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its progress bars and load reports: what matters in them is raised here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def require_folder(folder: Path | str, name: str = "config.json") -> Path:
    """The folder, if it is there and holds a file `name`."""
    folder = Path(folder)
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder} is not a Hugging Face folder: it has no {name}. Give a folder that `save_pretrained` wrote."
        )
    return folder


def read_config(folder: Path | str) -> PreTrainedConfig:
    """The folder's configuration with every dropout probability at 0.

    Dropout makes two passes over the same tokens differ, and then the first ratio of a policy update is not 1.
    """
    with quiet():
        config = AutoConfig.from_pretrained(require_folder(folder), local_files_only=True)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if ("drop" in name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def read_model(
    auto_class: Any,
    folder: Path | str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    fresh: tuple[str, ...] = (),
) -> PreTrainedModel:
    """The model in `folder`, its weights in `dtype` from safetensors files.

    `fresh` names the parameters that the folder may lack (a head that the caller initialises). Raises
    ValueError if the folder lacks any other.
    """
    with quiet(), torch.random.fork_rng(devices=[]):
        model, report = auto_class.from_pretrained(
            require_folder(folder),
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    wrong = sorted(set(report["missing_keys"]) - set(fresh)) + sorted(map(str, report["mismatched_keys"]))
    if wrong:
        raise ValueError(
            f"{folder} does not hold the weights of a {type(model).__name__}: {len(wrong)} parameters are missing "
            f"or of another shape, the first is {wrong[0]}"
        )
    return model


def restore(model: PreTrainedModel, folder: Path | str) -> None:
    """Read what `model.save_pretrained(folder)` wrote into `model`, in place and bit for bit.

    Raises ValueError if the folder holds another kind or size of model.
    """
    config = read_config(folder)
    mine, theirs = model.config.to_dict(), config.to_dict()
    for name in sorted((mine.keys() | theirs.keys()) - INCIDENTAL):
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"{folder} holds a model with {name} = {theirs.get(name)!r}, but this one has {mine.get(name)!r}: "
                "load it into a model made from the same settings"
            )
    model.load_state_dict(read_model(type(model), folder, config, dtype=model.dtype).state_dict())
