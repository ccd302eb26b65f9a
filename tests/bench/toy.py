"""A bench of one line of arithmetic, with contestants that are right, wrong, missing or not what they say."""

from typing import Any

import torch
from torch import Generator, Tensor

from bench.case import BOTH, FORWARD, Bench, Case, NotOfferedError, Rival


def inputs(case: Case, generator: Generator) -> dict[str, Any]:
    return {"x": torch.randn(case.shape, generator=generator).to(case.dtype)}


def double(x: Tensor) -> Tensor:
    return 2 * x


def wrong(x: Tensor) -> Tensor:
    return 2.01 * x


def wrong_gradient(x: Tensor) -> Tensor:
    return 2 * x.detach() + 0 * x


def wrong_shape(x: Tensor) -> Tensor:
    return 2 * x[:1]


def nan(x: Tensor) -> Tensor:
    return 2 * x * torch.nan


def refuses(x: Tensor) -> Tensor:
    raise NotOfferedError("no doubles here")


def breaks(x: Tensor) -> Tensor:
    raise KeyError("inside")


def toy(**contestants: Any) -> Bench:
    """ "ours" and "naive" are right unless said otherwise. Its name is an operation that has a kernel."""
    return Bench(
        operation="token_logprobs",
        axes="N, V",
        shapes=[(4, 8), (64, 128)],
        quick=[(4, 8)],
        tiny=(2, 4),
        sweeps={"V": {8: (4, 8), 16: (4, 16)}},
        directions=[FORWARD, BOTH],
        inputs=inputs,
        leaves=["x"],
        contestants={"ours": double, "naive": double, **contestants},
        exact=double,
        allowed=1e-6,
        by_row=["x"],
        bytes_moved=lambda case: 8 * torch.Size(case.shape).numel(),
        flops=lambda case: torch.Size(case.shape).numel(),
    )


ROGUES: dict[str, Any] = {
    "wrong": wrong,
    "wrong_gradient": wrong_gradient,
    "wrong_shape": wrong_shape,
    "nan": nan,
    "refuses": refuses,
    "breaks": breaks,
    "absent": Rival(double, package="rlhf-no-such-distribution"),
}
