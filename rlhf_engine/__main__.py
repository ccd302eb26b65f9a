"""`python -m rlhf_engine` is the `rlhf` command."""

from rlhf_engine.cli import main

main()
