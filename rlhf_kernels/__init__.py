"""The hot paths of reinforcement learning from human feedback: tensors in, tensors out.

Log-probabilities, KL divergences, advantages and policy losses; usable on its own (only torch is needed). What an
operation means stands in its docstring, `rlhf_kernels/ops/<name>.py`. What runs it here, and why:
`python -m rlhf_kernels`, or `rlhf_kernels.backend.report()`.
"""

from rlhf_kernels._vocabulary_parallel import VocabularySlice
from rlhf_kernels.ops._policy_terms import CISPO, GSPO, SAPO, EntropyTerm, KLTerm
from rlhf_kernels.ops.discounted_returns import discounted_returns
from rlhf_kernels.ops.exact_kl import exact_kl
from rlhf_kernels.ops.gae import Advantages, gae
from rlhf_kernels.ops.group_advantages import group_advantages
from rlhf_kernels.ops.importance_weights import importance_weights
from rlhf_kernels.ops.kl_estimate import kl_estimate
from rlhf_kernels.ops.leave_one_out import leave_one_out
from rlhf_kernels.ops.linear_logprobs import linear_logprobs
from rlhf_kernels.ops.linear_policy_loss import linear_policy_loss
from rlhf_kernels.ops.masked_mean import masked_mean
from rlhf_kernels.ops.masked_whiten import masked_whiten
from rlhf_kernels.ops.policy_loss import PolicyLoss, policy_loss
from rlhf_kernels.ops.returns_to_go import ShapedReturns, returns_to_go
from rlhf_kernels.ops.shaped_gae import ShapedAdvantages, shaped_gae
from rlhf_kernels.ops.token_logprobs import LogProbs, token_logprobs
from rlhf_kernels.ops.value_loss import value_loss
from rlhf_kernels.ops.vtrace import vtrace

__all__ = [
    "CISPO",
    "GSPO",
    "SAPO",
    "Advantages",
    "EntropyTerm",
    "KLTerm",
    "LogProbs",
    "PolicyLoss",
    "ShapedAdvantages",
    "ShapedReturns",
    "VocabularySlice",
    "discounted_returns",
    "exact_kl",
    "gae",
    "group_advantages",
    "importance_weights",
    "kl_estimate",
    "leave_one_out",
    "linear_logprobs",
    "linear_policy_loss",
    "masked_mean",
    "masked_whiten",
    "policy_loss",
    "returns_to_go",
    "shaped_gae",
    "token_logprobs",
    "value_loss",
    "vtrace",
]
