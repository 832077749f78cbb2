"""Random draws as functions of (seed, step), so that no generator's state need be saved."""

import numpy as np
import torch


def seed_torch(*numbers: int) -> None:
    """Seeds torch's global generators, on every device, alike on every process, by a hash of the numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))
