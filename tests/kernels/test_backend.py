import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import backend

ROOT = Path(rlhf_kernels.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts before the environment variable was read, and leaves no trace."""
    monkeypatch.setattr(backend, "_mode", None)
    monkeypatch.delenv("RLHF_KERNELS", raising=False)


def an_operation() -> torch.Tensor:
    return rlhf_kernels.kl_estimate(torch.zeros(2), torch.ones(2))


def test_the_mode_is_auto_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.mode() == "auto"
    monkeypatch.setattr(backend, "_mode", None)
    monkeypatch.setenv("RLHF_KERNELS", "torch")
    assert backend.mode() == "torch"
    an_operation()


def test_the_environment_is_read_at_the_first_operation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    an_operation()
    monkeypatch.setenv("RLHF_KERNELS", "triton")
    an_operation()


def test_an_unknown_mode_is_refused_at_the_first_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_KERNELS", "tritn")
    with pytest.raises(ValueError, match="RLHF_KERNELS is 'tritn'; allowed are auto, triton, torch"):
        an_operation()


CALLS = {
    "token_logprobs": lambda f, x, i, m: f(x, i),
    "linear_logprobs": lambda f, x, i, m: f(x, x, i),
    "kl_estimate": lambda f, x, i, m: f(x, x),
    "exact_kl": lambda f, x, i, m: f(x, x),
    "linear_policy_loss": lambda f, x, i, m: f(x, x.clone().requires_grad_(), i, x[0], x[0], m),
    "policy_loss": lambda f, x, i, m: f(x[0], x[0], x[0], m),
    "importance_weights": lambda f, x, i, m: f(x[0], x[0], m),
    "value_loss": lambda f, x, i, m: f(x[0], x[0], x[0], m),
    "gae": lambda f, x, i, m: f(x, x, x > 0),
    "shaped_gae": lambda f, x, i, m: f(x[0], x, x, x, x > 0, beta=0.1),
    "discounted_returns": lambda f, x, i, m: f(x, x > 0),
    "vtrace": lambda f, x, i, m: f(x, x, x, x, x > 0),
    "returns_to_go": lambda f, x, i, m: f(x[0], x, x, x > 0, beta=0.1),
    "group_advantages": lambda f, x, i, m: f(x[0], i),
    "leave_one_out": lambda f, x, i, m: f(x[0], i),
    "masked_mean": lambda f, x, i, m: f(x[0], m),
    "masked_whiten": lambda f, x, i, m: f(x[0], m),
}


def arguments() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 3), torch.arange(3), torch.ones(3, dtype=torch.bool)


def test_no_operation_runs_on_torch_where_triton_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(backend.has_kernel(name) for name in backend.operations())
    monkeypatch.setattr(backend, "_KERNELS", backend._KERNELS - {"gae"})
    CALLS["gae"](rlhf_kernels.gae, *arguments())
    with (
        backend.using("triton"),
        pytest.raises(RuntimeError, match="RLHF_KERNELS=triton, but gae has no Triton kernel"),
    ):
        CALLS["gae"](rlhf_kernels.gae, *arguments())


# What of its twin an operation calls first, where that is not `forward`.
ENTRIES = {"linear_policy_loss": "Lots"}


@pytest.mark.parametrize("name", backend.operations())
def test_a_kernel_runs_where_triton_was_asked_for_or_says_why_not(name: str, monkeypatch) -> None:
    function = getattr(rlhf_kernels, name)
    twin = importlib.import_module(f"rlhf_kernels._triton.{name}")
    called = []
    entry = ENTRIES.get(name, "forward")
    real = getattr(twin, entry)
    monkeypatch.setattr(twin, entry, lambda *a: called.append(name) or real(*a))
    with backend.using("triton"):
        CALLS[name](function, *arguments())
        assert called == [name]
        with pytest.raises(TypeError, match=f"{name} got float64, which its kernel has not"):
            CALLS[name](function, arguments()[0].double(), *arguments()[1:])
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(RuntimeError, match=f"{name} got a tensor on cpu. Move it to a GPU"):
            CALLS[name](function, *arguments())
    CALLS[name](function, *arguments())
    assert called == [name], "without being asked, a tensor on a CPU runs on torch"


def test_using_lasts_as_long_as_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_KERNELS", "triton")
    with backend.using("torch"):
        assert backend.mode() == "torch"
        an_operation()
        with backend.using("auto"):
            assert backend.mode() == "auto"
        assert backend.mode() == "torch"
    with pytest.raises(RuntimeError), backend.using("torch"):
        raise RuntimeError
    assert backend.mode() == "triton"


def test_triton_is_refused_at_once_where_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_KERNELS", backend._KERNELS - {"gae"})
    with pytest.raises(RuntimeError, match="gae.* have no Triton kernel in this version"):
        backend.require("triton")
    monkeypatch.setattr(backend, "_TRITON_IS_INSTALLED", False)
    with pytest.raises(RuntimeError, match="triton is not installed"), backend.using("triton"):
        raise AssertionError("the block must not run")
    with pytest.raises(RuntimeError, match="triton is not installed"):
        backend.require("triton")
    backend.require("torch")
    assert backend.mode() == "auto"
    assert backend.report().operations["token_logprobs"] == ("torch", "triton is not installed: pip install triton")


@pytest.mark.parametrize("call", [backend.require, lambda mode: backend.using(mode).__enter__()])
def test_an_unknown_name_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*allowed are"):
        call("cuda")


def test_the_operations_are_the_public_functions() -> None:
    functions = {name for name in rlhf_kernels.__all__ if name.islower()}
    assert set(backend.operations()) == functions == set(CALLS)
    for name in functions:
        assert getattr(rlhf_kernels, name).__module__ == f"rlhf_kernels.ops.{name}"


def test_the_report_says_what_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_KERNELS", backend._KERNELS - {"gae"})
    report = backend.report()
    assert report.mode == "auto"
    assert report.versions["torch"] == metadata.version("torch")
    assert report.operations["gae"] == ("torch", "it has no Triton kernel in this version")
    lines = str(report).splitlines()
    assert f"device        {report.device}" in lines
    for name in backend.operations():
        assert any(line.split()[:2] == [name, "torch"] for line in lines)
    monkeypatch.setattr(backend, "_mode", "triton")
    assert backend.report().operations["gae"][0] == "refused"
    if not torch.cuda.is_available():
        assert backend.report().operations["token_logprobs"][0] == "triton"  # in the interpreter
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert backend.report().operations["token_logprobs"] == (
            "refused",
            "RLHF_KERNELS=triton, and there is no GPU",
        )


def test_the_report_names_the_trainers_that_the_operations_serve_in() -> None:
    assert "embedded in   nothing in this process" in str(backend.report()).splitlines()
    take_back = [backend.embedded_in("SomeTrainer: loss") for _ in range(2)]
    assert backend.report().embedded == ("SomeTrainer: loss",) * 2
    assert str(backend.report()).splitlines().count("embedded in   SomeTrainer: loss") == 2
    for function in (take_back[0], take_back[0], take_back[1]):  # a second call takes nothing else back
        function()
        assert len(backend.report().embedded) == (0 if function is take_back[1] else 1)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_module_prints_the_report_and_imports_no_triton() -> None:
    code = (
        "import runpy, sys; sys.modules['triton'] = None; sys.modules['transformers'] = None;"
        "runpy.run_module('rlhf_kernels', run_name='__main__')"
    )
    done = run_python("-c", code, RLHF_KERNELS="torch")
    assert done.returncode == 0, done.stderr
    with backend.using("torch"):
        assert done.stdout.split() == str(backend.report()).split()
