"""`python -m bench`: what `rlhf bench` does, with nothing but torch installed."""

import sys

from .command import from_command_line

sys.exit(from_command_line())
