"""Memory against sequence length, up to where each contestant runs out: log-probs from hidden states, forward and
backward, V = 151,936, each contestant in a process of its own.

    python -m bench.memory_limit FILE.json [--dry]
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from .bench_linear_logprobs import BENCH
from .case import BOTH, Case
from .harness import contestants, make_inputs
from .peak_memory import peak, peak_on_gpu

HIDDEN, VOCABULARY = 896, 151_936
LENGTHS = [2**k for k in range(11, 20)]
SECONDS = 14  # of one contestant; the longest lengths take seconds each


def grow(name: str, dry: bool) -> None:
    """Print a line `length bytes` for each length, until it raises or is killed."""
    device = torch.device("cpu" if dry else "cuda")
    one = next(one for one in contestants(BENCH, device) if one.name == name)
    if one.missing:
        print(one.missing)
        return
    for length in (8, 16, 32) if dry else LENGTHS:
        shape = (length, 16, 100) if dry else (length, HIDDEN, VOCABULARY)
        case = Case(shape, torch.float32 if dry else torch.bfloat16, BOTH)
        call = one.call(BENCH, case, make_inputs(BENCH, case, device))
        try:
            call()
            taken = peak(call) if dry else peak_on_gpu(call)
        except torch.OutOfMemoryError:
            print(f"out of memory at {length}", flush=True)
            return
        except Exception as error:  # a limit of its own, such as 32-bit offsets
            print(f"{type(error).__name__} at {length}: {str(error).strip().splitlines()[0][:100]}", flush=True)
            return
        print(length, taken, flush=True)
    print("none of these lengths is too long", flush=True)


def measure(file: Path, dry: bool) -> None:
    """Of each contestant: bytes by length, and how it ended; written at once, in case the rest is cut off."""
    device = torch.device("cpu" if dry else "cuda")
    found: dict[str, dict[str, object]] = {}
    for one in contestants(BENCH, device):
        if one.missing or one.wants == "compile" or (dry and not (one.is_ours or one.name == "naive")):
            continue
        command = [sys.executable, "-m", f"{__package__}.memory_limit", "--one", one.name, *(["--dry"] if dry else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 if dry else SECONDS)
            lines, end = done.stdout.splitlines(), ""
            if done.returncode:
                end = f"ended with status {done.returncode}"
        except subprocess.TimeoutExpired as late:
            printed = late.stdout or b""
            lines, end = (printed.decode() if isinstance(printed, bytes) else printed).splitlines(), "out of time"
        taken = {line.split()[0]: int(line.split()[1]) for line in lines if line.split()[0].isdigit()}
        end = end or next((line for line in lines if not line.split()[0].isdigit()), "no answer")
        found[one.name] = {"bytes": taken, "end": end}
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(f"{one.name:16}{len(taken)} lengths, the longest {max(map(int, taken), default=0)}: {end}", flush=True)


def main() -> None:
    arguments = [word for word in sys.argv[1:] if word != "--dry"]
    dry = "--dry" in sys.argv
    if arguments[0] == "--one":
        grow(arguments[1], dry)
        return
    measure(Path(arguments[0]), dry)


if __name__ == "__main__":
    main()
