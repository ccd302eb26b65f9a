"""What a GPU, or this machine's CPU, can do at most, and how much of that is usually reached."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from rlhf_engine.config import ConfigError, did_you_mean

__all__ = ["GPUS", "Efficiency", "Machine", "find_machine", "measure_cpu"]

WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Efficiency:
    """The share of each ceiling that is counted on."""

    matmul: float
    memory: float
    link: float
    basis: str
    """where these shares come from"""

    def __str__(self) -> str:
        shares = {"matrix peak": self.matmul, "bandwidth": self.memory, "links": self.link}
        return ", ".join(f"{share:.0%} of the {name}" for name, share in shares.items()) + f" ({self.basis})"


# Matrix products: 43 % is what Llama 3 405B reached on 8192 H100s at 8192 tokens (arXiv:2407.21783, table 4). Bandwidth
# and links are assumed: 0.9 is what `token_logprobs` is meant to reach on an H100.
ON_GPU = Efficiency(matmul=0.43, memory=0.9, link=0.8, basis="43% as Llama 3; the rest assumed, not measured")
# The ceilings are measured here, so these are shares of what was reached once: about the medians of `linear_logprobs`
# and `token_logprobs`, forward and backward in float32, in one run of `rlhf bench --quick` on two cores.
ON_CPU = Efficiency(matmul=0.6, memory=0.35, link=1.0, basis="as the benches reached on two cores")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The limits of one device, in units of bytes, FLOPs and seconds."""

    name: str
    flops: dict[str, float]
    """dense matrix products a second by dtype"""
    bandwidth: float
    """bytes a second of its memory"""
    memory: float
    """bytes"""
    link: float = 0.0
    """bytes a second in one direction to the other devices of a node"""
    network: float = 0.0
    """and to other nodes"""
    node: int = 8
    """devices of a node"""
    launch: float = 1e-5
    """seconds from Python for one operation of a model's layer. Of a GPU assumed: half is what the modules of
    transformers take on a CPU with nothing to compute (4.3 to 5.3 us an operation, measured), half the launch itself"""
    is_cpu: bool = False
    """the same cores launch and work: these times add up, where a GPU's overlap"""
    efficiency: Efficiency = field(default=ON_GPU)
    source: str = ""

    def peak(self, dtype: str) -> float:
        """A CPU may multiply what is given in 16 bits in float32, if that is faster."""
        return max(self.flops[dtype], self.flops["float32"])


def _gpu(name: str, tensor: float, float32: float, bandwidth: float, memory: float, *links: float) -> Machine:
    return Machine(
        name=name, flops={"bfloat16": tensor * 1e12, "float16": tensor * 1e12, "float32": float32 * 1e12},
        bandwidth=bandwidth * 1e12, memory=memory * 1e9, link=links[0] * 1e9, network=links[1] * 1e9,
        source="NVIDIA's data sheet: dense, without sparsity; NVLink in one direction; the network of a DGX",
    )  # fmt: skip


# 16-bit and float32 TFLOP/s, TB/s, GB, GB/s to a neighbour, GB/s to another node
GPUS = {
    "a100": _gpu("a100", 312, 19.5, 2.039, 80, 300, 25),
    "h100": _gpu("h100", 989.4, 66.9, 3.35, 80, 450, 50),
    "h200": _gpu("h200", 989.4, 66.9, 4.8, 141, 450, 50),
    "b200": _gpu("b200", 2250, 75, 8.0, 180, 900, 50),
}


def find_machine(name: str) -> Machine:
    """A GPU by name, or "cpu": this machine, measured now. Raises ConfigError for any other name."""
    if name == "cpu":
        return measure_cpu()
    if name not in GPUS:
        known = [*GPUS, "cpu"]
        raise ConfigError(f"--gpu {name}: unknown.{did_you_mean(name, known)} Known: {', '.join(known)}")
    return GPUS[name]


def measure_cpu() -> Machine:
    """This machine's ceilings with torch's present number of threads; takes about a second."""
    import torch  # here alone, so that everything else is told without waiting for it

    source = torch.ones(2**25)
    target = torch.zeros_like(source)
    bandwidth = 2 * source.nbytes / _best(partial(target.copy_, source))
    flops = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        square = torch.ones(768, 768, dtype=dtype)
        flops[str(dtype).removeprefix("torch.")] = 2 * 768**3 / _best(partial(torch.matmul, square, square))
    module, tiny = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    return Machine(
        name=f"this CPU, {torch.get_num_threads()} threads", flops=flops, bandwidth=bandwidth,
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        launch=_best(partial(_many, partial(module, tiny))) / CALLS,
        is_cpu=True, efficiency=ON_CPU, source="measured now",
    )  # fmt: skip


CALLS = 200


def _many(step: Callable[[], object]) -> None:
    for _ in range(CALLS):
        step()


def _best(step: Callable[[], object], rounds: int = 7) -> float:
    """Seconds of the fastest call after a first one: a ceiling is what was reached once."""
    step()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
