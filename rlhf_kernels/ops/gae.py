"""Generalised advantage estimation over the counted tokens of each sequence."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _masking, _scan

_BLOCK = 32
_PRECISION = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


class Advantages(NamedTuple):
    """Advantages and returns, in the shape of the rewards and in their unit; exactly 0 at masked positions."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    """Generalised advantage estimation: `A_t = delta_t + gamma * lam * A_t'` and `return_t = A_t + V_t`.

    `delta_t = r_t + gamma * V_t' - V_t`, where t' is the *next counted* token of the same row. Masked positions
    are skipped exactly: the counted tokens get what they would get with the holes cut out, whatever lies
    beneath the holes (NaN too). After a row's last counted token V is `bootstrap`, or 0 if the text ended there.

    The returns are also the TD(lambda) returns: `G_t = r_t + gamma * ((1 - lam) * V_t' + lam * G_t')`.

    The results are targets, so they carry no gradient. On a CPU the mask is looked at: rows that are not plain
    prefixes are packed first, which takes longer. Other devices never wait for the host. On the Triton path a row's
    result depends on no other row; padding that moves where rows begin in memory may round its last bit otherwise.

    Args:
        rewards: `[B, T]` floating, reward of each token; or `[N]`, sequences one after another, with cu_seqlens.
        values: the same shape, floating: the critic's value before each token, in the reward's unit.
        mask: the same shape, bool, True = counts.
        gamma: discount per counted token, in [0, 1].
        lam: lambda, in [0, 1]: 0 gives the TD residual, 1 the return minus the value.
        bootstrap: `[B]` floating, value after the last counted token of a truncated row, 0 for one that ended there;
            None = all ended. With cu_seqlens `[S]`.
        cu_seqlens: `[S + 1]` integer, for packed input: sequence s is made of the tokens from cu_seqlens[s] up to
            cu_seqlens[s + 1], from 0 to N in all. A sequence may be empty. Where a GPU's tensor says otherwise, which
            would take waiting to see, nothing outside is read or written, and tokens of no sequence are undefined.

    Returns:
        In the shape of rewards, float32 (float64 if rewards or values are), 0 where masked.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape does not fit, gamma or lam lies outside [0, 1], or cu_seqlens does not run from 0 to N.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    equations 11-16; TD(lambda): Sutton and Barto 2018, "Reinforcement Learning", equation 12.2.
    """
    _scan.check_layout(cu_seqlens, bootstrap, rewards=rewards, values=values, mask=mask)
    _scan.unit_interval(gamma=gamma, lam=lam)
    floats = (rewards, values) if bootstrap is None else (rewards, values, bootstrap)
    if backend.use_triton("gae", *floats):
        from rlhf_kernels._triton import gae as twin

        run = twin.operator if torch.compiler.is_compiling() else twin.forward
        return Advantages(*run(rewards, values, mask, bootstrap, cu_seqlens, float(gamma), float(lam)))
    dtype = _check.accumulation_dtype(rewards, values)
    values, returns = lambda_returns(
        _in(dtype, rewards), _in(dtype, values), mask, gamma=gamma, lam=lam, bootstrap=bootstrap, cu_seqlens=cu_seqlens
    )
    return Advantages(returns - values, returns)


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The values, 0 where masked, and the returns, on torch; all in the dtype of rewards and values, one for both."""
    if cu_seqlens is None:
        return _of_rows(rewards, values, mask, gamma, lam, bootstrap)
    if rows := _scan.Rows.of(mask, cu_seqlens):
        padded = rows.padded(rewards), rows.padded(values), rows.padded(mask)
        values, returns = _of_rows(*padded, gamma, lam, bootstrap)
        return rows.unpadded(values), rows.unpadded(returns)
    # A token passes gamma * ((1 - lam) * V + lam * G) on to the counted token before it, which adds its reward.
    layout = _scan.Layout.of(mask, cu_seqlens)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    decay = torch.ones_like(rewards).masked_fill_(mask, gamma * lam)
    reaching = layout.reaching(
        decay, gamma * (lam * rewards + (1 - lam) * values), gamma * layout.of_each(bootstrap, rewards.dtype)
    )
    return values, torch.where(mask, rewards + reaching, 0.0)


def _of_rows(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for `[B, T]`."""
    full, prefix = _look_at(mask)
    if full:
        terms = rewards.clone()
    else:
        bits = _masking.bits(mask, rewards.dtype)
        terms, values = _masking.kept(rewards, bits), _masking.kept(values, bits)
    if prefix:
        returns = _lambda_returns(terms, values, mask, gamma, lam, bootstrap)
    else:
        order, packed_mask = _packing(mask)
        packed_terms, packed_values = (torch.zeros_like(x).scatter_(1, order, x) for x in (terms, values))
        returns = _lambda_returns(packed_terms, packed_values, packed_mask, gamma, lam, bootstrap).gather(1, order)
    return values, returns


def _look_at(mask: Tensor) -> tuple[bool, bool]:
    """Whether every token counts, and whether in every row nothing counts after a masked position."""
    if not _check.on_host(mask) or torch.compiler.is_compiling():
        return False, False  # to look would wait for the device or break the graph; packing is right for any mask
    if mask.numel() == 0 or mask.view(torch.uint8).min():
        return True, True
    rests = mask.shape[1] - 1
    rises = mask.narrow(1, 1, rests) > mask.narrow(1, 0, rests)
    return False, rests == 0 or not rises.view(torch.uint8).max()


def _packing(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where each position goes when counted tokens move to the front in order, and the mask after the move."""
    counted = mask.cumsum(1)
    position = torch.arange(mask.shape[1], device=mask.device)
    total = counted[:, -1:]
    return torch.where(mask, counted - 1, total + position - counted), position < total


def _lambda_returns(
    terms: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None
) -> Tensor:
    """`G_t = r_t + gamma * ((1 - lam) * V_t+1 + lam * G_t+1)`, which is `A_t + V_t`; G is the bootstrap at the end.

    Takes the rewards as `terms` and adds the values to them in place. Needs rows whose counted tokens come first
    and whose other entries are 0; these stay 0.
    """
    if lam < 1.0 and terms.shape[1]:
        rests = terms.shape[1] - 1
        terms.narrow(1, 0, rests).add_(values.narrow(1, 1, rests), alpha=gamma * (1 - lam))
    if bootstrap is not None:
        last = mask.clone()
        last[:, :-1] &= ~mask[:, 1:]
        terms += torch.where(last, gamma * bootstrap.to(terms.dtype)[:, None], 0.0)
    sums = _discounted_sums(_in(_product_dtype(terms), terms), gamma * lam, 0)
    return _in(terms.dtype, sums)


def _product_dtype(x: Tensor) -> torch.dtype:
    """float64 wherever a float32 matrix product might be computed in TF32 or bfloat16."""
    plain = (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _PRECISION.fp32_precision in ("none", "ieee")
    )
    return x.dtype if plain else torch.float64


def _discounted_sums(x: Tensor, decay: float, first: int) -> Tensor:
    """`y[:, t] = sum over j >= t + first of decay^(j - t - first) * x[:, j]`, for `[B, T]` and first 0 or 1.

    A matrix product inside blocks, to which the same sums over the blocks on the right are added. Only
    non-negative powers of the decay occur, so nothing overflows, and what underflows weighs nothing.
    """
    batch, length = x.shape
    weights = _cached_weights if not torch.compiler.is_compiling() else _weights
    if length <= _BLOCK:
        return _rows_times(x, weights(length, decay, first, x.dtype, x.device).inside)
    blocks = -(-length // _BLOCK)
    if length % _BLOCK:
        x = torch.nn.functional.pad(x, (0, blocks * _BLOCK - length))
    x = x.reshape(batch * blocks, _BLOCK)
    inside, beyond = weights(_BLOCK, decay, first, x.dtype, x.device)
    sums = x @ inside
    whole = sums[:, 0] if first == 0 else torch.add(x[:, 0], sums[:, 0], alpha=decay)
    right = _discounted_sums(whole.reshape(batch, blocks), decay**_BLOCK, 1)
    sums.addcmul_(right.reshape(-1, 1), beyond)
    sums = sums.view(batch, blocks * _BLOCK)
    return sums if length % _BLOCK == 0 else sums[:, :length]


def _rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix`, each row's result independent of the others: BLAS sums a lone row in another order."""
    return x @ matrix if len(x) != 1 else (x.expand(2, -1) @ matrix)[:1]


class _Weights(NamedTuple):
    """How much each entry of a block (row) adds to each sum (column), and what a unit from the right adds."""

    inside: Tensor
    beyond: Tensor


def _weights(length: int, decay: float, first: int, dtype: torch.dtype, device: torch.device) -> _Weights:
    step = torch.arange(length, device=device)
    powers = torch.tensor(decay, dtype=torch.float64, device=device) ** torch.arange(length + 1, device=device)
    inside = powers[(step[:, None] - step - first).clamp(min=0)].tril(-first)
    return _Weights(inside.to(dtype), powers[length - first - step][None].to(dtype))


_cached_weights = functools.lru_cache(maxsize=128)(_weights)
