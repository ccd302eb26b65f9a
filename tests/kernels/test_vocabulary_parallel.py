"""An output layer spread over two processes gives what one process gives."""

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from rlhf_kernels import VocabularySlice, backend, linear_logprobs, linear_policy_loss
from tests.kernels.test_linear_logprobs import close, example, gradients, textbook

CUT = 30  # of 50 rows, the first process holds 30

CASES: list[dict] = [
    {},
    {"softcap": 4.0, "temperature": 0.7, "entropy": True},
    {"lora": True, "entropy": True},
    {"mask": torch.tensor([True, False, True, True, False, True]), "temperature": torch.arange(1.0, 7) / 3},
]


def run(call, tmp_path: Path) -> None:
    """call(rank) in two processes, which raise here what is raised there."""
    torch.multiprocessing.spawn(in_group, (call, f"file://{tmp_path}/store"), nprocs=2)


def in_group(rank: int, call, store: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)  # the same numbers in both processes
    minute = timedelta(minutes=1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=minute)
    try:
        call(rank)
    finally:
        dist.destroy_process_group()


def same_everywhere(x: Tensor) -> None:
    both = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(both, x.contiguous())
    assert torch.equal(*both)


# --------------------------------------------------------------------------------------------- the same as one


def every_case(rank: int) -> None:
    for mode in ("torch", "triton"):
        for options in CASES:
            with backend.using(mode):
                one_case(rank, **options)


def one_case(rank: int, lora: bool = False, **options) -> None:
    hidden, weight, bias, tokens = example(6)
    tokens[:2] = torch.tensor([CUT - 1, CUT])
    up, low = torch.randn(50, 3), torch.randn(3, 16)
    upstreams = torch.randn(2, 6)
    rows = slice(0, CUT) if rank == 0 else slice(CUT, 50)
    whole = [x.clone().requires_grad_() for x in (hidden, weight, bias, low, up)]
    part = [x.clone().requires_grad_() for x in (hidden, weight[rows], bias[rows], low, up[rows])]
    results = []
    for leaves, place in ((whole, None), (part, VocabularySlice(start=rows.start, size=50))):
        x, w, b, low_rank, high = leaves
        result = linear_logprobs(
            x, w, tokens, bias=b, lora=(low_rank, high) if lora else None, vocabulary_parallel=place, **options
        )
        outputs = [y for y in result if y is not None]
        asked = leaves if lora else leaves[:3]
        results.append((outputs, gradients(outputs, upstreams[: len(outputs)], asked)))
    (expected, wanted), (outputs, actual) = results
    for a, b in zip(outputs, expected, strict=True):
        same_everywhere(a)
        close(a, b, 3e-6)
    same_everywhere(actual[0])
    pieces = (None, rows, rows, None, rows)
    for a, b, piece in zip(actual, wanted, pieces, strict=False):
        close(a, b if piece is None else b[piece], 2e-5)
        assert a.any()


def one_small_collective_each_way(rank: int) -> None:
    hidden, weight, _, tokens = example(6)
    rows = slice(0, CUT) if rank == 0 else slice(CUT, 50)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_reduce"):
            real = getattr(dist, name)
            patch.setattr(dist, name, lambda x, *a, real=real, **k: (seen.append(x.shape.numel()), real(x, *a, **k)))
        place = VocabularySlice(start=rows.start, size=50)
        hidden.requires_grad_()
        linear_logprobs(hidden, weight[rows], tokens, entropy=True, vocabulary_parallel=place).logp.sum().backward()
    assert seen == [2 * 4 * 6, hidden.numel()]


def far_apart_and_impossible(rank: int) -> None:
    """One slice far below the other, or impossible as a whole; rows of nothing but -inf; NaN stays where it is."""
    rows = slice(0, CUT) if rank == 0 else slice(CUT, 50)
    place = VocabularySlice(start=rows.start, size=50)
    hidden, weight, bias, tokens = example(4)
    for offsets in ((-math.inf, 0.0), (0.0, -math.inf), (-300.0, 0.0), (-1e4, 1e4), (-math.inf, -math.inf)):
        shifted = torch.cat([bias[:CUT] + offsets[0], bias[CUT:] + offsets[1]])
        for mode in ("torch", "triton"):
            with backend.using(mode):
                leaves = [x.clone().requires_grad_() for x in (hidden, weight[rows])]
                arguments = {"bias": shifted[rows], "entropy": True, "vocabulary_parallel": place}
                logp, entropy = linear_logprobs(*leaves, tokens, **arguments)
                whole = [x.clone().requires_grad_() for x in (hidden, weight)]
                expected = linear_logprobs(*whole, tokens, bias=shifted, entropy=True)
            torch.testing.assert_close(logp, expected.logp, rtol=1e-6, atol=5e-6)
            close(entropy, expected.entropy, 5e-6)
            upstream = torch.randn(2, 4).masked_fill(logp == -math.inf, 0)
            actual = gradients([logp, entropy], upstream, leaves)
            wanted = gradients(list(expected), upstream, whole)
            close(actual[0], wanted[0], 2e-5)
            close(actual[1], wanted[1][rows], 2e-5)
    hidden[1] = math.nan
    with backend.using("triton"):
        logp = linear_logprobs(hidden, weight[rows], tokens, vocabulary_parallel=place).logp
    assert logp.isnan().tolist() == [False, True, False, False]


def the_policy_loss_too(rank: int) -> None:
    hidden, weight, _, tokens = example(6)
    rows = slice(0, CUT) if rank == 0 else slice(CUT, 50)
    old, advantages, mask = torch.randn(6) - 3, torch.randn(6), torch.ones(6, dtype=torch.bool)
    whole = linear_policy_loss(hidden, weight, tokens, old, advantages, mask).loss
    place = VocabularySlice(start=rows.start, size=50)
    close(
        linear_policy_loss(hidden, weight[rows], tokens, old, advantages, mask, vocabulary_parallel=place).loss,
        whole,
        2e-6,
    )


def all_of_it(rank: int) -> None:
    every_case(rank)
    one_small_collective_each_way(rank)
    far_apart_and_impossible(rank)
    the_policy_loss_too(rank)
    a_weight_sharded_for_storage(rank)


def a_weight_sharded_for_storage(rank: int) -> None:
    """As FSDP2 does: each process stores some rows, and all of them are gathered for the product."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, bias, tokens = example(6)
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    with pytest.raises(TypeError, match=r"weight is a DTensor.*pass weight\.full_tensor\(\)"):
        linear_logprobs(hidden, sharded, tokens)
    linear_logprobs(hidden, sharded.full_tensor(), tokens, bias=bias).logp.sum().backward()
    whole = weight.double().requires_grad_()
    textbook(hidden, whole, bias, tokens)[0].sum().backward()
    close(sharded.grad.to_local(), whole.grad.chunk(2)[rank], 1e-5)


def test_two_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # gloo's processes share no GPU
    run(all_of_it, tmp_path)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("start", [-1, 1])
def test_rows_outside_the_vocabulary_are_refused(start: int) -> None:
    hidden, weight, _, tokens = example(3)
    with pytest.raises(ValueError, match=rf"starts at {start}, and weight has 50 rows: they must lie in \[0, 50\)"):
        linear_logprobs(hidden, weight, tokens, vocabulary_parallel=VocabularySlice(start=start, size=50))


def test_without_a_process_group_it_is_refused() -> None:
    hidden, weight, _, tokens = example(3)
    with pytest.raises(RuntimeError, match="init_process_group"):
        linear_logprobs(hidden, weight, tokens, vocabulary_parallel=VocabularySlice(start=0, size=50))


def test_under_torch_compile_it_is_refused() -> None:
    hidden, weight, _, tokens = example(3)
    place = VocabularySlice(start=0, size=50)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: linear_logprobs(hidden, weight, tokens, vocabulary_parallel=place), fullgraph=True)
    with pytest.raises(Exception, match="vocabulary_parallel does not run under torch.compile"):
        compiled()
