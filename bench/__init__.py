"""The benchmarks: `rlhf bench`, or from a checkout `python -m bench`. Installed, this folder's name is rlhf_bench."""
