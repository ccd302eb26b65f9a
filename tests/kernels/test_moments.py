"""The pieces of which kernels that whiten are built, in a kernel of their own."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from rlhf_kernels._triton import _moments  # noqa: E402


@triton.jit
def rows_kernel(x, mask, figures, out, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Moments of blocks [ROWS, COLUMNS], one after the other, and from all of them those of all."""
    for block in range(PROGRAMS):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, COLUMNS)[None, :]
        at = row * columns + column
        keep = tl.load(mask + at, mask=column < columns, other=0) != 0
        values = tl.load(x + at, mask=column < columns, other=float("nan"))
        _moments.store(figures, block, PROGRAMS, *_moments.of_block(values, keep))
    tl.debug_barrier()
    _moments.store(out, 0, 1, *_moments.load_merged(figures, PROGRAMS, 4))


@pytest.mark.parametrize("columns", [1, 5, 16])
@pytest.mark.parametrize("mean", [0.0, 1000.0, -1e6])
def test_moments_of_blocks_with_junk_and_their_merger(columns: int, mean: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = mean + torch.arange(24 * columns, device=device).reshape(24, columns) * 0.01
    mask = torch.rand(24, columns, device=device) < 0.6
    mask[4:8] = False  # a block of which nothing counts, and junk under the mask
    x[~mask] = torch.nan
    figures, out = torch.full((3, 6), torch.nan, device=device).double(), torch.empty(3, 1, device=device).double()
    rows_kernel[(1,)](x, mask, figures, out, columns, ROWS=4, COLUMNS=16, PROGRAMS=6)
    counted = x[mask].double()
    expected = torch.stack([torch.tensor(len(counted)), counted.mean(), (counted - counted.mean()).square().sum()])
    torch.testing.assert_close(out[:, 0], expected, atol=1e-12, rtol=1e-9)
    assert not figures[:, 1].any() and int(figures[0].sum()) == len(counted)
