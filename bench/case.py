"""What a `bench_<operation>.py` declares: its cases, its contestants, what is right, and the least work. All the rest,
timing, checking, memory, ceilings, tables and pictures, is shared and knows no operation.

    BENCH = Bench(operation="gae", axes="B, T", shapes=[...], contestants={"ours": ours, "naive": loop, ...}, ...)
    test_gae = pytest_of(BENCH)                     # bench.command

A contestant is a function that takes the inputs by name and returns a tensor or a tuple of tensors; where a value is
not offered, None. "ours" is timed on torch and, where there is a GPU, on its kernel; "naive" is what one writes by
hand, and what torch.compile gets unless `compiled` says otherwise. A `Rival` is somebody's own code, in a package.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward and backward"
Shape = tuple[int, ...]
Function = Callable[..., Any]


class NotOfferedError(Exception):
    """The contestant does not claim to do this, and says so: nothing to score."""


@dataclass(frozen=True)
class Case:
    """One call of an operation: its shape, the dtype of its inputs, what is asked of it."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    direction: str = FORWARD
    form: str = ""

    @property
    def backward(self) -> bool:
        return self.direction == BOTH

    def __str__(self) -> str:
        return " ".join(filter(None, [str(list(self.shape)), name_of(self.dtype), self.direction, self.form]))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Rival:
    """A contestant that is more than a formula restated here: it comes from a package, or needs a GPU."""

    function: Function
    package: str = ""
    """the distribution it comes from; where that is absent, it is skipped and says so"""
    has_kernels: bool = False
    """on a GPU its Triton kernels must run, or there is no time"""
    on_gpu_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything that is special about one operation's bench."""

    operation: str
    axes: str
    """what the numbers of a shape are, such as "B, T, V" """
    shapes: Sequence[Shape]
    """all that are timed where nobody is in a hurry"""
    quick: Sequence[Shape]
    """those of `make bench`"""
    tiny: Shape
    """one that takes milliseconds: CI runs every bench on it once"""
    gpu_shapes: Sequence[Shape] = ()
    """beside the others, where there is a GPU"""
    sweeps: Mapping[str, Mapping[int, Shape]] = field(default_factory=dict)
    """axis -> its size -> shape: time and memory are drawn against it (first dtype and form, last direction)"""
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    forms: Sequence[str] = ("",)
    directions: Sequence[str] = (FORWARD,)

    inputs: Callable[[Case, torch.Generator], dict[str, Any]]
    """the arguments of every contestant, drawn with this generator; its device is torch's default while they are"""
    leaves: Sequence[str] = ()
    """those that ask for a gradient where the case goes backward"""
    contestants: Mapping[str, Function | Rival]
    compiled: Function | str = ""
    """what torch.compile gets, or why it gets nothing"""

    exact: Function
    """what is right: like a contestant, but its floating inputs arrive in float64"""
    allowed: float
    """the largest error of ours in an output, in its unit; relative to the largest where that exceeds `scale`"""
    scale: float = float("inf")
    gradient_allowed: float | None = None
    """of ours in a gradient, relative to the largest; None: what its dtype rounds to"""
    by_row: Sequence[str] = ()
    """inputs whose first axis holds independent rows: of large cases only some rows are checked"""
    widest: Callable[[Case], int] = lambda case: torch.Size(case.shape).numel()
    """elements of the largest tensor that `exact` makes: what makes a case large"""

    bytes_moved: Callable[[Case], float]
    """the least that must go through memory"""
    flops: Callable[[Case], float]
    """the least arithmetic, roughly where it is not a matrix product"""

    def cases(self, shapes: Sequence[Shape]) -> Iterator[Case]:
        product = itertools.product(self.dtypes, shapes, self.forms, self.directions)
        return (Case(shape, dtype, direction, form) for dtype, shape, form, direction in product)

    def sweep_cases(self) -> Iterator[Case]:
        shapes = dict.fromkeys(shape for sizes in self.sweeps.values() for shape in sizes.values())
        for shape in shapes:
            yield Case(shape, self.dtypes[0], self.directions[-1], self.forms[0])


def tensors(result: Any) -> list[Tensor | None]:
    """The outputs of a contestant, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def run(function: Function, inputs: dict[str, Any], leaves: Sequence[str]) -> list[Tensor | None]:
    """One call, and where leaves are named the gradients of the sum of all that it gives: outputs, then gradients."""
    if not leaves:
        return tensors(function(**inputs))
    own = {name: inputs[name].detach().requires_grad_() for name in leaves}
    outputs = tensors(function(**{**inputs, **own}))
    total = sum(x.sum() for x in outputs if x is not None and x.requires_grad)
    gradients = torch.autograd.grad(total, list(own.values()))  # type: ignore[arg-type]
    return [*(None if x is None else x.detach() for x in outputs), *gradients]
