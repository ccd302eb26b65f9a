"""Every step's metrics for TensorBoard, in `tensorboard/STAGE` of the run's folder: `tensorboard --logdir runs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_engine import hookimpl
from rlhf_engine.manager import PluginError
from rlhf_engine.run import Run

__all__ = ["TensorBoard"]


@dataclass(eq=False)
class TensorBoard:
    """One TensorBoard run a stage: metrics as scalars under their names, samples as text."""

    _writers: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        try:  # here and not above: only a run that names it needs the library
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PluginError(
                f"the tracker tensorboard needs its library: pip install 'rlhf-engine[tensorboard]' ({error})"
            ) from error
        self.writer = SummaryWriter

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        self.folder = run.folder / "tensorboard"

    @hookimpl
    def rlhf_step_end(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        if stage not in self._writers:
            # Steps from here on that a killed run wrote before are done again: readers leave the old ones out.
            self._writers[stage] = self.writer(str(self.folder / stage), purge_step=step)
        writer = self._writers[stage]
        for name, value in metrics.items():
            if name == "samples":
                writer.add_text(name, "\n\n".join(map(_as_markdown, value)), step)
            else:
                writer.add_scalar(name, value, step)
        writer.flush()


def _as_markdown(sample: dict[str, str]) -> str:
    """As a block of code, which Markdown shows as it stands."""
    text = f"{sample['prompt']}\N{RIGHTWARDS ARROW}{sample['response']}"
    return "\n".join(f"    {line}" for line in text.splitlines())
