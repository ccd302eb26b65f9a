"""`python -m rlhf_kernels` prints what would run each operation on this machine, and why."""

from rlhf_kernels import backend

if __name__ == "__main__":
    print(backend.report())
