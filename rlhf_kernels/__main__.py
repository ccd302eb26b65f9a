"""`python -m rlhf_kernels` prints what would run each operation on this machine, and why.

`python -m rlhf_kernels --check` also runs each of them against float64, and ends with status 1 if one is wrong.
"""

import argparse
import sys

from rlhf_kernels import backend


def main() -> int:
    """Print the report, and check if asked. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_kernels", description=__doc__)
    parser.add_argument("--check", action="store_true", help="run every operation against float64")
    arguments = parser.parse_args()
    print(backend.report())
    if not arguments.check:
        return 0
    from rlhf_kernels.selftest import selftest

    print()
    wrong = 0
    for finding in selftest():
        print(finding)
        wrong += not finding.right
    print(f"{wrong} wrong" if wrong else "all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
