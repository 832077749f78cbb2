"""Random draws as functions of (seed, step), so that no generator's state need be saved."""

import torch

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One 63-bit number from several: splitmix64's finaliser over each in turn (Steele et al., OOPSLA 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_torch(*numbers: int) -> None:
    """Seeds torch's global generators, on every device, alike on every process."""
    torch.manual_seed(mix(*numbers))
