"""The picture of a run: proxy score, gold scores and KL against steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(history: dict[str, list[dict[str, Any]]], results: dict[str, Any], path: Path) -> None:
    """Proxy and gold scores in standard deviations of the starting policy's, and KL, at every rl step."""
    figure = Figure(figsize=(14, 4), layout="constrained")  # not through pyplot, which may look for a display
    losses, scores, divergence = figure.subplots(1, 3)
    for stage in ("pretrain", "reward"):
        steps = history.get(stage, [])
        losses.plot([s["step"] / s["steps"] for s in steps], [s["loss"] for s in steps], label=stage)
    losses.set(title="losses of the first two stages", xlabel="part of the stage done", yscale="log")
    losses.legend()
    steps = history.get("rl", [])
    if steps:
        curves = {"score": ("proxy (optimised)", results["before"]["score"])}
        for name, judged in results["before"]["rewards"].items():
            if not judged["weight"]:
                curves[f"score/{name}"] = (f"gold: {name}", judged)
        for name, (label, start) in curves.items():
            gains = [(s[name] - start["mean"]) / (start["std"] or 1) for s in steps]
            scores.plot([s["step"] for s in steps], gains, label=label)
        scores.set(title="mean score, in standard deviations of the start", xlabel="rl step")
        scores.legend()
        if "kl" in steps[0]:
            divergence.plot([s["step"] for s in steps], [s["kl"] for s in steps], label="KL(policy || reference)")
            divergence.set(title="KL, nats per sequence", xlabel="rl step")
            divergence.legend()
    figure.savefig(path, dpi=110)
