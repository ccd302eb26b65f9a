"""What this machine can do at most, measured in the same run: copy bandwidth, and matrix products per dtype."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from .case import name_of

COPY = "copy GB/s"


def matmul_name(dtype: str) -> str:
    return f"matmul {dtype} TFLOP/s"


def measure(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool = False) -> dict[str, float]:
    """The best of several goes: a ceiling is what was reached once."""
    gpu = device.type == "cuda"
    bytes_copied = (2**31 if gpu else 2**29) >> (6 if quick else 0)
    source = torch.ones(bytes_copied // 4, device=device)
    target = torch.zeros_like(source)
    found = {COPY: 2 * bytes_copied / _best(partial(target.copy_, source), device) / 1e9}
    del source, target
    for dtype in dtypes:
        size = (8192 if gpu else 1024) >> (2 if quick else 0)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[matmul_name(name_of(dtype))] = 2 * size**3 / _best(partial(torch.matmul, a, b), device) / 1e12
    return found


def _best(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of ten calls."""
    seconds = []
    for _ in range(12):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begun)
    return min(seconds[2:])


def limit(ceilings: dict[str, float], dtype: str, least_bytes: float, least_flops: float) -> tuple[float, str]:
    """(seconds, which): no code can be faster here than its least traffic or its least arithmetic allows.

    What is given in 16 bits may be multiplied in float32, which on many a CPU is faster.
    """
    copy = least_bytes / (ceilings[COPY] * 1e9)
    peak = max(ceilings.get(matmul_name(dtype), 0.0), ceilings.get(matmul_name("float32"), 0.0))
    product = least_flops / (peak * 1e12) if peak else 0.0
    return (product, "matmul") if product > copy else (copy, "copy")
