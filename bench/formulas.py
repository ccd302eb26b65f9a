"""What three trainers compute for log-probs, entropy and k3, restated in plain torch: their formulas, not their code.

They are always here to be scored, whether those trainers are installed or not. Each docstring names the function that
it restates: TRL 1.16.0, verl at commit 33ddc71, OpenRLHF at commit 02a2605 (its entropy: the release after that).
logits [N, V], tokens [N]; results [N] in nats, in the dtype that the trainer gives.
"""

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)


def at_token(table: Tensor, tokens: Tensor) -> Tensor:
    return table.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def softmax_in_own_dtype(logits: Tensor, tokens: Tensor) -> Tensor:
    """verl `logprobs_from_logits_naive`: the whole log-softmax, in the dtype of the logits."""
    return at_token(torch.log_softmax(logits, -1), tokens)


def logit_less_logsumexp_by_row(logits: Tensor, tokens: Tensor) -> Tensor:
    """TRL `selective_log_softmax` and verl `logprobs_from_logits_v2`: one row after the other; the token's logit less
    the row's logsumexp, or for 16-bit logits a log-softmax in their own dtype."""
    if logits.dtype in WIDE:
        return at_token(logits, tokens) - torch.stack([row.logsumexp(-1) for row in logits])
    rows = [softmax_in_own_dtype(row, token) for row, token in zip(logits, tokens, strict=True)]
    return torch.stack(rows)


def logit_less_logsumexp_by_chunk(logits: Tensor, tokens: Tensor) -> Tensor:
    """OpenRLHF `log_probs_from_logits` without flash-attn: the same, 1024 rows at a time."""
    if logits.dtype not in WIDE:
        return logit_less_logsumexp_by_row(logits, tokens)
    total = torch.zeros(logits.shape[:-1], dtype=logits.dtype, device=logits.device)
    for start in range(0, len(logits), 1024):
        total[start : start + 1024] = logits[start : start + 1024].logsumexp(-1)
    return at_token(logits, tokens) - total


def entropy_by_logs(logits: Tensor) -> Tensor:
    """TRL `entropy_from_logits`, 128 rows at a time: -sum p log p, with p = exp(log p)."""
    parts = []
    for chunk in logits.split(128):
        logs = torch.log_softmax(chunk, -1)
        parts.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(parts)


def entropy_by_mean_logit(logits: Tensor) -> Tensor:
    """verl `entropy_from_logits` and OpenRLHF `compute_entropy`: logsumexp less the expected logit."""
    mean = (torch.softmax(logits, -1) * logits).sum(-1)
    return logits.logsumexp(-1) - mean


def k3_by_exp(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """TRL `GRPOTrainer` (per-token KL) and OpenRLHF `compute_approx_kl`: exp(d) - d - 1 with d = ref - own."""
    d = ref_logp.float() - logp.float()
    return d.exp() - d - 1


def k3_by_clamped_exp(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """verl `kl_penalty("low_var_kl")`: the same with d clamped to 20 and the result to 10 on either side."""
    d = (ref_logp - logp).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)
