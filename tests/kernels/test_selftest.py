import torch

import rlhf_kernels
from rlhf_kernels import backend, selftest
from rlhf_kernels.ops.token_logprobs import LogProbs


def test_every_operation_is_right_in_every_dtype() -> None:
    findings = list(selftest.selftest("cpu"))
    assert {(f.operation, f.dtype) for f in findings} == {
        (name, dtype) for name in backend.operations() for dtype in selftest.ALLOWED
    }
    assert [str(f) for f in findings if not f.right] == []


def test_a_wrong_operation_is_noticed(monkeypatch) -> None:
    right = rlhf_kernels.token_logprobs

    def nan_where_there_is_a_number(*arguments, **others):
        logp, entropy = right(*arguments, **others)
        return LogProbs(logp, entropy * torch.nan if arguments[0].dtype != torch.float64 else entropy)

    def rounds(*arguments, **others):
        logp, entropy = right(*arguments, **others)
        return LogProbs(logp.bfloat16().float() if arguments[0].dtype != torch.float64 else logp, entropy)

    def raises(*arguments, **others):
        raise RuntimeError("as asked")

    for wrong in (nan_where_there_is_a_number, rounds, raises):
        monkeypatch.setattr(rlhf_kernels, "token_logprobs", wrong)
        faults = {f.operation for f in selftest.selftest("cpu") if not f.right}
        assert faults == {"token_logprobs"}, wrong
