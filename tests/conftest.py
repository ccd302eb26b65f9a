"""What all tests share: the same random numbers in whatever order they run."""

import os
import random

import numpy as np
import pytest
import torch

# Triton reads this once, when it is first imported, which some test's import may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
