"""The bench of the kernels inside TRL's trainer, once, at toy size."""

import re
import sys

import pytest

from bench import embed_trl


@pytest.mark.slow
def test_it_compares_measures_and_says_so(monkeypatch, capsys):
    pytest.importorskip("trl")
    sizes = ["--rows", "4", "--prompt", "4", "--response", "8", "--vocabulary", "64", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["embed_trl", *sizes])
    embed_trl.main()
    printed = capsys.readouterr().out
    for name in ("TRL", "ours"):
        assert re.search(rf"^{name} +[0-9.]+ ms +[0-9]+ MiB", printed, re.MULTILINE), printed
    ratio = float(re.search(r"round by round: ([0-9.]+)", printed)[1])
    assert ratio > 0
