"""From the sums of the programs of a kernel to a mean: the normaliser's part in `masked_mean` and the token losses."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels._triton import _moments, _rows


@triton.jit(do_not_specialize=["programs"])
def mean_kernel(
    figures,  # [2, programs] fp64: sums, and how many entries they have
    normalizer,  # [1], if BY is "tensor"
    out,  # [1] fp32
    divisor,  # [1] fp64: what the sum was divided by
    number: tl.float64,  # if BY is "number"
    programs,
    BY: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The sum of all sums over the normaliser; over the count of all entries if BY is "count". Of nothing, 0."""
    total = _moments.load_sum(figures, programs, PROGRAMS)
    count = _moments.load_sum(figures + programs, programs, PROGRAMS)
    if BY == "count":
        by = tl.maximum(count, 1.0)
    elif BY == "tensor":
        by = tl.load(normalizer).to(tl.float64)
        by = tl.where((count == 0) & (by == 0), 1.0, by)
    else:
        by = number
    tl.store(out, (total / by).to(tl.float32))
    tl.store(divisor, by)


def mean(figures: Tensor, normalizer: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """figures [2, programs] float64, the sums and counts of each program -> the mean, 0-d float32, and what it was
    divided by, 0-d float64."""
    out, divisor = figures.new_empty((), dtype=torch.float32), figures.new_empty(())
    by_tensor = isinstance(normalizer, Tensor)
    with _rows.device_of(figures):
        mean_kernel[(1,)](
            figures,
            normalizer if by_tensor else None,
            out,
            divisor,
            0.0 if normalizer is None or by_tensor else float(normalizer),
            figures.shape[1],
            BY="count" if normalizer is None else "tensor" if by_tensor else "number",
            PROGRAMS=_moments.MOST_PROGRAMS,
            num_warps=_rows.WARPS,
        )
    return out, divisor
