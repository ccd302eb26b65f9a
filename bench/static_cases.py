"""The Triton kernels as `bench/static.py` compiles them: each at the block sizes and dtypes that it runs with."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf_kernels._triton import (
    _groups,
    _mean,
    _moments,
    _rows,
    _scan,
    exact_kl,
    gae,
    importance_weights,
    kl_estimate,
    linear_logprobs,
    masked_mean,
    masked_whiten,
    policy_loss,
    shaped_gae,
    token_logprobs,
    value_loss,
    vtrace,
)

# Six programs of four warps then fit a multiprocessor, with 48 KiB of loads in flight: twice what the memory needs.
MOST_REGISTERS = 80
# The numbers that a kernel does not annotate. The sizes among them, such as 151,936, are multiples of 16.
NUMBERS = {
    **dict.fromkeys(("inverse", "softcap", "gamma", "lam", "beta", "clip", "rho_clip", "c_clip"), "fp32"),
    **dict.fromkeys(("cap", "first", "second", "dual", "kl_coefficient", "entropy_coefficient"), "fp32"),
    **dict.fromkeys(("vocabulary", "columns", "stride", "count", "programs", "tokens", "length"), "i32"),
}
POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Case:
    """One kernel at the block sizes and dtypes that it runs with."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    bytes_moved: float
    """per element of the wide axis, by the kernel's own loads and stores"""
    bytes_least: float
    wide: bool = True
    """whether its accesses must be 128 bits wide"""
    warps_of_64: int | None = None
    """where warps have 64 threads and the kernel then takes fewer of them"""
    most_registers: int = MOST_REGISTERS


def cases() -> Iterator[Case]:
    """Every kernel, at a vocabulary of 151,936, in bfloat16 and float32, with all that can be asked of it."""
    for dtype in (torch.bfloat16, torch.float32):
        yield from token_logprobs_cases(dtype)
        yield from exact_kl_cases(dtype)
        yield from kl_estimate_cases(dtype)
        yield from linear_logprobs_cases(dtype)
        yield from masked_mean_cases(dtype)
        yield from masked_whiten_cases(dtype)
        yield from value_loss_cases(dtype)
        yield from group_cases(dtype)
        yield from scan_cases(dtype)
        yield from policy_loss_cases(dtype)
        yield from importance_weights_cases(dtype)


def token_logprobs_cases(dtype: torch.dtype, vocabulary: int = 151_936) -> Iterator[Case]:
    cut = _rows.Cut.of(vocabulary, dtype.itemsize)
    constants = cut.constants()
    warps = constants.pop("num_warps")
    shared = {"MASKED": True, "ROW_TEMPERATURE": True, "ALIGNED": True, "UNIT_STRIDE": True, "ITEMSIZE": dtype.itemsize}
    pointers = {"logits": dtype, "gradient": dtype, "tokens": torch.int64, "mask": torch.bool}
    name = str(dtype).removeprefix("torch.")
    for entropy in (False, True):
        label = f"{name}{', entropy' if entropy else ''}"
        yield case(
            f"token_logprobs forward ({label})",
            token_logprobs.pieces_kernel,
            pointers,
            {**shared, **constants, "ENTROPY": entropy},
            warps,
            moved=dtype.itemsize,
            least=dtype.itemsize,
        )
        flags = {"LOGP_GRADIENT": True, "ENTROPY_GRADIENT": entropy, "TOKENS": 1}
        yield case(
            f"token_logprobs backward ({label})",
            token_logprobs.backward_kernel,
            pointers,
            {**shared, **constants, **flags},
            warps,
            moved=2 * dtype.itemsize,
            least=2 * dtype.itemsize,
        )
    flags = {"ENTROPY": True, "MASKED": True, "ROW_TEMPERATURE": True, "PIECES": cut.pieces, "TOKENS": 1, "ROWS": 64}
    yield case(
        f"token_logprobs rows ({name})",
        token_logprobs.rows_kernel,
        pointers,
        flags,
        warps,
        moved=0,
        least=0,
        wide=False,
    )


def exact_kl_cases(dtype: torch.dtype, vocabulary: int = 151_936) -> Iterator[Case]:
    cut = _rows.Cut.of(vocabulary, dtype.itemsize, exact_kl.VECTORS)
    constants = cut.constants()
    warps = constants.pop("num_warps")
    flags = {"MASKED": True, "ROW_TEMPERATURE": True}
    reading = {"ALIGNED": True, "UNIT_STRIDE": True, "ITEMSIZE_P": dtype.itemsize, "ITEMSIZE_Q": dtype.itemsize}
    pointers = {"logits_p": dtype, "logits_q": dtype, "gradient_p": dtype, "gradient_q": dtype, "mask": torch.bool}
    name = str(dtype).removeprefix("torch.")
    size = 2 * dtype.itemsize
    yield case(
        f"exact_kl forward ({name})",
        exact_kl.pieces_kernel,
        pointers,
        {**flags, **reading, **constants, "GROUP": exact_kl.group_of(vocabulary, dtype.itemsize)},
        warps,
        moved=size,
        least=size,
    )
    for label, wants_p, wants_q in (("p", True, False), ("q", False, True), ("p and q", True, True)):
        moved = size + dtype.itemsize * (wants_p + wants_q)
        yield case(
            f"exact_kl backward to {label} ({name})",
            exact_kl.backward_kernel,
            pointers,
            {**flags, **reading, **constants, "WANTS_P": wants_p, "WANTS_Q": wants_q},
            warps,
            moved=moved,
            least=moved,
        )
    yield case(
        f"exact_kl rows ({name})",
        exact_kl.rows_kernel,
        pointers,
        {**flags, "PIECES": cut.pieces, "ROWS": 64},
        warps,
        moved=0,
        least=0,
        wide=False,
    )


def kl_estimate_cases(dtype: torch.dtype) -> Iterator[Case]:
    pointers = dict.fromkeys(("logp", "ref_logp", "gradient", "ref_gradient"), dtype)
    constants = {"KIND": "k3", "BLOCK": kl_estimate.BLOCK}
    wants = {"WANTS": True, "WANTS_REF": True}
    name, size = str(dtype).removeprefix("torch."), 2 * dtype.itemsize + 4
    yield case(
        f"kl_estimate forward (k3, {name})",
        kl_estimate.forward_kernel,
        pointers,
        constants,
        _rows.WARPS,
        moved=size,
        least=size,
    )
    size += 2 * dtype.itemsize
    yield case(
        f"kl_estimate backward (k3, {name})",
        kl_estimate.backward_kernel,
        pointers,
        {**constants, **wants},
        _rows.WARPS,
        moved=size,
        least=size,
    )


def linear_logprobs_cases(dtype: torch.dtype, vocabulary: int = 151_936) -> Iterator[Case]:
    """The tiles are float32 whatever the dtype, which is that of the bias and of the gradient of the logits."""
    constants = {"BIASED": True, "CAPPED": True, "ROW_TEMPERATURE": True, **linear_logprobs.block(vocabulary)}
    warps = constants.pop("num_warps")
    pointers = {"bias": dtype, "gradient": dtype, "tokens": torch.int64, "picked": torch.int64}
    name = str(dtype).removeprefix("torch.")
    for entropy in (False, True):
        label = f"{name}{', entropy' if entropy else ''}"
        yield case(
            f"linear_logprobs fold ({label})",
            linear_logprobs.fold_kernel,
            pointers,
            {**constants, "ENTROPY": entropy},
            warps,
            moved=4,
            least=4,
        )
        for operation, picked in (("linear_logprobs", False), ("linear_policy_loss", True)):
            yield case(
                f"{operation} gradient ({label})",
                linear_logprobs.gradient_kernel,
                pointers,
                {**constants, "LOGP_GRADIENT": True, "ENTROPY_GRADIENT": entropy, "PICKED": picked},
                warps,
                moved=4 + dtype.itemsize,
                least=4 + dtype.itemsize,
            )


def masked_mean_cases(dtype: torch.dtype) -> Iterator[Case]:
    """x and its gradient in this dtype, and a mask of one byte."""
    pointers = {
        "x": dtype,
        "gradient": dtype,
        "mask": torch.bool,
        **dict.fromkeys(("figures", "divisor"), torch.float64),
    }
    name, size = str(dtype).removeprefix("torch."), dtype.itemsize + 1
    for what, kernel, block in (
        ("forward", masked_mean.sums_kernel, _moments.BLOCK),
        ("backward", masked_mean.gradient_kernel, masked_mean.GRADIENT_BLOCK),
    ):
        label = f"masked_mean {what} ({name})"
        yield case(label, kernel, pointers, {"BLOCK": block}, _rows.WARPS, moved=size, least=size)
    yield case(
        f"masked_mean end ({name})",
        _mean.mean_kernel,
        {**pointers, "normalizer": dtype},
        {"BY": "tensor", "PROGRAMS": _moments.MOST_PROGRAMS},
        _rows.WARPS,
        moved=0,
        least=0,
        wide=False,
    )


def masked_whiten_cases(dtype: torch.dtype) -> Iterator[Case]:
    """x and its gradient in this dtype, the result and what comes back in float32, and a mask of one byte."""
    figures = dict.fromkeys(("figures", "statistics"), torch.float64)
    pointers = {"x": dtype, "gradient": dtype, "mask": torch.bool, **figures}
    name, size = str(dtype).removeprefix("torch."), dtype.itemsize
    block = {"BLOCK": _moments.BLOCK}
    ending = {**block, "SHIFT_MEAN": False, "PROGRAMS": _moments.MOST_PROGRAMS}
    for what, kernel, constants, moved in (
        ("moments", masked_whiten.moments_kernel, block, size + 1),
        ("forward", masked_whiten.whiten_kernel, {**ending, "UNBIASED": True}, size + 5),
        ("gradient sums", masked_whiten.gradient_sums_kernel, block, size + 5),
        ("backward", masked_whiten.gradient_kernel, ending, 2 * size + 5),
    ):
        label = f"masked_whiten {what} ({name})"
        yield case(label, kernel, pointers, constants, _rows.WARPS, moved=moved, least=moved)


def value_loss_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Three tensors and the gradient in this dtype, and a mask of one byte."""
    pointers = dict.fromkeys(("values", "old_values", "returns", "gradient"), dtype)
    pointers |= {"mask": torch.bool, **dict.fromkeys(("figures", "divisor"), torch.float64)}
    name, size, block = str(dtype).removeprefix("torch."), dtype.itemsize, {"BLOCK": _moments.BLOCK}
    for what, kernel, moved in (
        ("forward", value_loss.sums_kernel, 3 * size + 1),
        ("backward", value_loss.gradient_kernel, 4 * size + 1),
    ):
        label = f"value_loss {what} ({name})"
        yield case(label, kernel, pointers, block, _rows.WARPS, moved=moved, least=moved)


def group_cases(dtype: torch.dtype) -> Iterator[Case]:
    """A group's rows lie anywhere, so that no access is wide."""
    pointers = {"scores": dtype, **dict.fromkeys(("ordered", "order"), torch.int64)}
    kinds = {"group_advantages": "std", "leave_one_out": "leave_one_out"}
    for operation, kind in kinds.items():
        yield case(
            f"{operation} ({str(dtype).removeprefix('torch.')})",
            _groups.groups_kernel,
            pointers,
            {"KIND": kind, "UNBIASED": True, "BLOCK": _groups.BLOCK},
            _groups.WARPS,
            moved=0,
            least=0,
            wide=False,
        )


def scan_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Dense and packed, as for few long sequences. Results are float32, and set how many tokens a thread has: it reads
    64 bits of bfloat16. A packed sequence begins anywhere, so no access to it can be wide; its kernels have twice the
    warps, of which the 16 that then fit a multiprocessor at the least still have 13 KiB of loads in flight. vtrace does
    two scans a tile, and may take as many registers."""
    name, size = str(dtype).removeprefix("torch."), dtype.itemsize
    tokens = dict.fromkeys(("rewards", "values"), dtype)
    off_policy = {**tokens, **dict.fromkeys(("logp", "old_logp"), dtype)}
    shaped = {**dict.fromkeys(("logp", "ref_logp", "values"), dtype), "figures": torch.float64, "counting": torch.int32}
    kernels = (
        ("gae", gae.kernel, tokens, {"VALUES": True, "BOOTSTRAP": True}, 2 * size + 9),
        ("discounted_returns", gae.kernel, tokens, {"VALUES": False, "BOOTSTRAP": True}, size + 5),
        ("vtrace", vtrace.kernel, off_policy, {"BOOTSTRAP": True}, 4 * size + 9),
        ("shaped_gae", shaped_gae.kernel, shaped, {"KIND": "k3", "VALUES": True, "WHITEN": True}, 3 * size + 17),
        ("returns_to_go", shaped_gae.kernel, shaped, {"KIND": "k3", "VALUES": False, "WHITEN": True}, 2 * size + 13),
    )
    for packed in (False, True):
        layout = {"PACKED": packed, "ALIGNED": not packed, "BLOCK": _scan.BLOCK, "SUMMARY": False, "SPLIT": True}
        for kind, kernel, pointers, flags, moved in kernels:
            made = case(
                f"{kind} ({name}{', packed' if packed else ''})",
                kernel,
                {"mask": torch.bool, "cu_seqlens": torch.int64, **pointers},
                {**flags, **layout},
                _scan.warps(aligned=not packed, hip=False),
                moved=moved,
                least=moved,
                wide=size == 4 and not packed,
            )
            most = 96 if packed or kind == "vtrace" else MOST_REGISTERS
            yield replace(made, warps_of_64=_scan.warps(aligned=not packed, hip=True), most_registers=most)
    yield case(
        f"shaped_gae whitening ({name})",
        shaped_gae.whiten_kernel,
        {"mask": torch.bool, "figures": torch.float64},
        {"EPS": 1e-8, "COLUMNS": _moments.MOST_PROGRAMS, "BLOCK": _moments.BLOCK},
        _rows.WARPS,
        moved=9,
        least=9,
    )


def policy_loss_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Log-probs, entropies and weights in the dtype, advantages in float32, as everything that is written."""
    names = ("logp", "old_logp", "ref_logp", "entropy", "weights", "entropy_gradient")
    pointers = {**dict.fromkeys(names, dtype), "mask": torch.bool}
    shared = {"WEIGHTED": True, "ADVANTAGE_OF_ROW": False, "WEIGHT_OF_ROW": False, "BLOCK": policy_loss.TILE}
    terms = {"KL": "k3", "ENTROPY": True, "GRADIENT": True, "ROWS": 1, "STEP": policy_loss.STEP}
    label, size = str(dtype).removeprefix("torch."), 5 * dtype.itemsize + 9
    # Three programs then fit a multiprocessor: with all terms 56 KiB of loads are in flight, as much as elsewhere.
    most_registers = 160
    forms = [("Clip", False), ("CISPO", False), ("GSPO", True), ("SAPO", False)]
    for form, sequences in forms if dtype == torch.float32 else [("Clip", True)]:
        # A row of one tile is read once; the sums of a longer one come from a reading before.
        flags = {"FORM": form, "SEQUENCES": sequences, "PIECES": form == "GSPO"}
        made = case(
            f"policy_loss forward ({form}{', sequences' if sequences else ''}, {label})",
            policy_loss.forward_kernel,
            pointers,
            {**shared, **terms, **flags},
            _rows.WARPS,
            moved=size,
            least=size,
        )
        yield replace(made, most_registers=most_registers)
    yield case(
        f"policy_loss rows ({label})",
        policy_loss.rows_kernel,
        pointers,
        shared,
        _rows.WARPS,
        moved=3 * dtype.itemsize + 5,
        least=3 * dtype.itemsize + 5,
    )
    yield case(
        f"policy_loss merge ({label})",
        policy_loss.merge_kernel,
        {"normalizer_tensor": torch.int64},
        {"HOW": "tensor", "SEQUENCES": True, "STEP": policy_loss.MERGED},
        _rows.WARPS,
        moved=0,
        least=0,
        wide=False,
    )
    yield case(
        f"policy_loss backward ({label})",
        policy_loss.backward_kernel,
        {**pointers, "gradient": dtype},
        {"SEQUENCES": True, "GRADIENT": True, "ENTROPY": True, "ROWS": 1, "BLOCK": policy_loss.TILE},
        _rows.WARPS,
        moved=2 * dtype.itemsize + 5,
        least=2 * dtype.itemsize + 5,
    )


def importance_weights_cases(dtype: torch.dtype) -> Iterator[Case]:
    pointers = {"logp": dtype, "rollout_logp": dtype, "mask": torch.bool}
    label, size = str(dtype).removeprefix("torch."), 2 * dtype.itemsize + 1
    for level, kernel, written in (
        ("token", importance_weights.tokens_kernel, 4),
        ("sequence", importance_weights.sequences_kernel, 0),
    ):
        yield case(
            f"importance_weights {level} ({label})",
            kernel,
            pointers,
            {"BLOCK": importance_weights.BLOCK},
            _rows.WARPS,
            moved=size + written,
            least=size + written,
        )


def case(
    name: str,
    kernel: Any,
    pointers: dict[str, torch.dtype],
    constants: dict[str, Any],
    warps: int,
    *,
    moved: float,
    least: float,
    wide: bool = True,
) -> Case:
    """Types of the arguments: constants as given, numbers as annotated or named, else pointers (float32 by default)."""
    signature = {}
    for parameter in kernel.params:
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
        elif parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
        elif parameter.name in NUMBERS and parameter.name not in pointers:
            signature[parameter.name] = NUMBERS[parameter.name]
        else:
            signature[parameter.name] = POINTER[pointers.get(parameter.name, torch.float32)]
    return Case(name, kernel, signature, constants, warps, moved, least, wide)
