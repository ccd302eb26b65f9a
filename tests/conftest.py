"""What all tests share: the same random numbers in whatever order they run."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
