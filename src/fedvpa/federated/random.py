"""Named streams of random numbers.

A stream is named by a seed and a purpose, for example (seed, "local", round, client). Its numbers
do not depend on what was drawn before or on which clients are trained side by side, so that a run
resumes bit for bit without any generator state.
"""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *name: object) -> torch.Generator:
    """A generator for one named purpose."""
    digest = hashlib.blake2b("|".join(map(str, (seed, *name))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
