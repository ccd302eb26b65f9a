"""The kernels' tests run on every path: torch where the host may look at values, torch where it may not, and Triton.

Where there is no GPU, Triton's interpreter runs the kernels on the CPU (tests/conftest.py switches it on).
"""

from collections.abc import Iterator

import pytest
import torch

from rlhf_kernels import backend
from rlhf_kernels.ops import _check


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
