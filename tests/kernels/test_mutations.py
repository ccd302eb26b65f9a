"""The kernels' tests can fail: each of these changes to a kernel turns one of them red.

A copy of the package is changed in one place, and a few quick tests, which are green without the change, run on it in
a process of their own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """`before`, which stands in the file, becomes `after`; the tests of the operation on that path must notice."""

    file: str
    what: str
    before: str
    after: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"

    @property
    def tests(self) -> tuple[str, str]:
        """The test file, and the expression that picks from it."""
        name = SHARED.get(Path(self.file).stem, Path(self.file).stem)
        path = self.path or ("triton" if "_triton" in self.file else "host")
        return f"tests/kernels/test_{name}.py", QUICK.format(path=path)


# Whose tests notice a change to a file that several operations share.
SHARED = {
    "_rows": "token_logprobs",
    "_scan": "gae",
    "_moments": "masked_whiten",
    "_mean": "masked_mean",
    "_groups": "group_advantages",
    "_linear_gradients": "linear_policy_loss",
    "_masking": "policy_loss",
    "_policy_formula": "policy_loss",
    "_policy_on_host": "policy_loss",
}
QUICK = (
    "{path} and (textbook or temperature or junk or several or unlikely or dtypes)"
    + " and not (32000 or 129920 or 151936 or 262147)"
)

TRITON, TORCH = "rlhf_kernels/_triton/", "rlhf_kernels/ops/"
MUTATIONS = [
    Mutation(TRITON + "token_logprobs.py", "sign of the gradient", "d = -over_total", "d = over_total"),
    Mutation(TRITON + "token_logprobs.py", "no mask", "MASKED=mask is not None", "MASKED=False"),
    Mutation(TRITON + "token_logprobs.py", "no temperature in the gradient", "= inverse / total", "= 1.0 / total"),
    Mutation(
        TRITON + "token_logprobs.py",
        "maximum and log-sum change places",
        "(own - largest) * inverse - log_total",
        "(own - log_total) * inverse - largest",
    ),
    Mutation(TRITON + "_rows.py", "the sum is not rescaled", "total = total * rescale +", "total = total +"),
    Mutation(TORCH + "token_logprobs.py", "sign of the gradient", "bracket / -_rows", "bracket / _rows"),
    Mutation(
        TORCH + "token_logprobs.py",
        "no temperature in the log-prob",
        "(logp if inverse is None else logp * inverse) - log_total",
        "logp - log_total",
    ),
    Mutation(TORCH + "token_logprobs.py", "no temperature in a small sum", "z = z * inverse", "z = z * 1"),
    Mutation(
        TORCH + "token_logprobs.py",
        "an impossible token spoils the entropy",
        "_rows.sums(z * exponential, of_numbers=True)",
        "_rows.sums(z * exponential)",
    ),
    Mutation(TORCH + "token_logprobs.py", "no mask", "        logp.masked_fill_(masked, 0)\n", ""),
    Mutation(
        TRITON + "exact_kl.py",
        "sign of the gradient",
        "d = factor_q * (tl.exp2(d_q) -",
        "d = -factor_q * (tl.exp2(d_q) -",
    ),
    Mutation(TRITON + "exact_kl.py", "no mask", '"MASKED": mask is not None', '"MASKED": False'),
    Mutation(
        TRITON + "exact_kl.py", "no temperature in the gradient", "g * inverse / total_p, g * inverse", "g / total_p, g"
    ),
    Mutation(
        TRITON + "exact_kl.py",
        "the log-sums change places",
        "(tl.log2(total_q) - tl.log2(total_p))) * _rows.LN_2",
        "(tl.log2(total_p) - tl.log2(total_q))) * _rows.LN_2",
    ),
    Mutation(TRITON + "linear_logprobs.py", "sign of the gradient", "d = -inverse / total", "d = inverse / total"),
    Mutation(
        TRITON + "linear_logprobs.py",
        "no temperature in the log-prob",
        "((result.own - result.shift) * inverse - log_total)",
        "((result.own - result.shift) - log_total)",
    ),
    Mutation(
        TRITON + "linear_logprobs.py",
        "maximum and log-sum change places",
        "((result.own - result.shift) * inverse - log_total)",
        "((result.own - log_total) * inverse - result.shift)",
    ),
    Mutation(TORCH + "linear_logprobs.py", "no mask", "else x.masked_fill(~self.mask, 0)", "else x", path="triton"),
    Mutation(
        TRITON + "linear_policy_loss.py",
        "rows come back in another's place",
        "_(0, picked, p",
        "_(0, picked.flip(0), p",
    ),
    Mutation(
        TRITON + "linear_policy_loss.py",
        "sums keep the scale of another lot",
        "x.mul_(self._unscale / unscale)",
        "pass",
    ),
    Mutation(
        TORCH + "linear_policy_loss.py", "a sequence is not averaged", "one / lengths.clamp(min=1)", "one + 0 * lengths"
    ),
    Mutation(TORCH + "_linear_gradients.py", "each lot starts anew", "is_first = self._is_empty and", "is_first ="),
    Mutation(TRITON + "gae.py", "no bootstrap", "BOOTSTRAP=bootstrap is not None", "BOOTSTRAP=False"),
    Mutation(
        TRITON + "gae.py", "masked tokens decay", "tl.where(counts, gamma * lam, 1.0)", "gamma * lam + 0.0 * reward"
    ),
    Mutation(
        TRITON + "_scan.py", "left and right change places", "decay_l * term_r + term_l", "decay_r * term_l + term_r"
    ),
    Mutation(TRITON + "_scan.py", "no carry between pieces", "range(tiles - end)", "range(0)"),
    Mutation(
        TORCH + "_scan.py",
        "a sequence takes from the next",
        "else flow.masked_fill_(closed, 0.0)",
        "else flow",
        path="device",
    ),
    Mutation(TRITON + "shaped_gae.py", "the score is not clipped", "score > clip, clip", "score > clip, score"),
    Mutation(TRITON + "shaped_gae.py", "a score in every piece", "passed_on == 0", "passed_on >= 0"),
    Mutation(TRITON + "returns_to_go.py", "no discount", "beta, kind, gamma, 1.0", "beta, kind, 1.0, 1.0"),
    Mutation(TRITON + "discounted_returns.py", "no bootstrap", "mask, bootstrap, cu", "mask, None, cu"),
    Mutation(TRITON + "vtrace.py", "rho is not clipped", "ratio > rho_clip, rho_clip", "ratio > rho_clip, ratio"),
    Mutation(TRITON + "vtrace.py", "the value beyond the piece is lost", "(found == 0)", "(found > 0)"),
    Mutation(
        TORCH + "vtrace.py", "advantages from V, not vs", "gamma * reaching - values", "gamma * next_value - values"
    ),
    Mutation(TRITON + "policy_loss.py", "no mask", "tl.where(counted, new - old, 0.0), tl", "new - old, tl"),
    Mutation(
        TRITON + "policy_loss.py",
        "GSPO's gradient is not shared out",
        "ratio, (rising + falling) / count",
        "ratio, rising + falling",
    ),
    Mutation(
        TRITON + "policy_loss.py",
        "no length in the entropy's gradient",
        "value = value / tl.load(counts",
        "tl.load(counts",
    ),
    Mutation(
        TORCH + "_policy_formula.py",
        "the gate's temperatures change places",
        "advantages > 0, form.positive",
        "advantages < 0, form.positive",
        path="formula",
    ),
    Mutation(TORCH + "_policy_on_host.py", "clipped, with a gradient", "clipped, value=-1", "clipped, value=0"),
    Mutation(TORCH + "_policy_on_host.py", "no length", "share[:, None] / -normalizer", "-1 / normalizer"),
    Mutation(TORCH + "_masking.py", "junk stays", "x.view(bits.dtype).bitwise_and_(bits)", "pass"),
    Mutation(TRITON + "importance_weights.py", "no mask", "tl.where(counted, new - old, 0.0)", "new - old"),
    Mutation(TRITON + "importance_weights.py", "no cap", "weight > cap, cap", "weight > cap, weight"),
    Mutation(TRITON + "kl_estimate.py", "sign of the gradient", "(-value).to(ref_gradient", "value.to(ref_gradient"),
    Mutation(TRITON + "_moments.py", "blocks of other means", "+ apart * apart * count_a * share", ""),
    Mutation(TRITON + "masked_whiten.py", "the mean gets no gradient", "scale * upstream_mean", "0.0 * upstream_mean"),
    Mutation(
        TORCH + "masked_whiten.py",
        "the masked are not zeroed again",
        "keep_(centred.sub_(mean), bits)",
        "kept(centred.sub_(mean), bits)",
    ),
    Mutation(TORCH + "masked_whiten.py", "the mean's rounding stays", "-rest * scale if", "0.0 if"),
    Mutation(
        TORCH + "group_advantages.py", "an abstention votes", "(~abstained).double()", "scores.new_ones(len(scores))"
    ),
    Mutation(TRITON + "_mean.py", "0 over 0", "tl.where((count == 0) & (by == 0), 1.0, by)", "by"),
    Mutation(TRITON + "_groups.py", "an abstention votes", "(at < end) & (score == score)", "at < end"),
    Mutation(TRITON + "_groups.py", "only one block of a group", "while found == BLOCK:", "if True:"),
    Mutation(
        TORCH + "leave_one_out.py",
        "relative to the mean of all",
        "centred * votes / (votes - 1)",
        "centred / (votes - votes)",
    ),
    Mutation(TRITON + "value_loss.py", "the smaller error", "tl.where(square < clipped", "tl.where(square > clipped"),
    Mutation(
        TORCH + "value_loss.py",
        "junk comes back",
        "values = torch.where(mask, values.to(dtype), 0.0)",
        "values = values.to(dtype)",
        path="device",
    ),
    Mutation(TORCH + "value_loss.py", "a clipped value moves", "held, value=-1", "held, value=0"),
]


# What every process would import first, and what takes most of its time, is imported once; each process is a fork.
SERVER = """
import json, os, sys
import hypothesis, numpy, pytest, torch
try:
    import triton, triton.language
except ImportError:
    pass
for line in sys.stdin:
    *arguments, output = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    code = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(code)
"""


@pytest.fixture(scope="module")
def verdict(copy: Path) -> Iterator[Callable[[str, str], tuple[int, str]]]:
    """Runs the tests of a file that an expression picks, in a fresh process: (pytest's exit code, what it printed)."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None

    def ask(file: str, expression: str) -> tuple[int, str]:
        output = copy / "output"
        output.unlink(missing_ok=True)
        request = ["-x", "-q", "-p", "no:cacheprovider", file, "-k", expression, str(output)]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), output.read_text("utf-8")

    yield ask
    server.stdin.close()
    server.wait(timeout=60)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mutated")
    for name in ("rlhf_kernels", "tests/kernels"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_change_for_the_worse_turns_a_test_red(copy: Path, verdict: Callable, mutation: Mutation) -> None:
    file = copy / mutation.file
    text = file.read_text("utf-8")
    assert mutation.before in text, "the source has moved on: mend this list"
    try:
        file.write_text(text.replace(mutation.before, mutation.after), "utf-8")
        code, output = verdict(*mutation.tests)
    finally:
        file.write_text(text, "utf-8")
    assert code == 1, output[-3000:]
    assert " failed" in output
