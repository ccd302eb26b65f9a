"""The kernels' tests run on every path: torch where the host may look at values, torch where it may not, and Triton.

Where there is no GPU, Triton's interpreter runs the kernels on the CPU (tests/conftest.py switches it on).
"""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _scan


@pytest.fixture(params=["host", "device", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every way through the code. "device" is torch's, for tensors whose values the host would have to wait for."""
    if request.param == "device":
        monkeypatch.setattr(_check, "on_host", lambda x: False)
    if request.param != "triton":
        yield request.param
        return
    with backend.using("triton"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield request.param


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Rows of a few dozen tokens then take several tiles. The result is the module with the other numbers."""
    of_kernels = pytest.importorskip("rlhf_kernels._triton._scan", reason="triton is not installed")
    monkeypatch.setattr(of_kernels, "BLOCK", 16)
    monkeypatch.setattr(_scan, "_BLOCK", 8)
    return of_kernels
