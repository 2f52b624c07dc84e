"""The masks of secure aggregation, from a stream cipher.

Flower 1.42 draws SecAgg+'s masks from a Mersenne twister that is seeded with 32 bits (the 256-bit
secret, folded by XOR), which can be tried out. Its key agreement, secret sharing and message flow
are used as they are; its generator is replaced on both sides by ChaCha20 under the whole secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

_about: ContextVar[bytes] = ContextVar("about", default=b"")


@contextmanager
def masks_for(request: bytes) -> Iterator[None]:
    """While this lasts, masks are those of this request: they cancel only among clients that were
    asked the same."""
    token = _about.set(hashlib.sha256(request).digest())
    try:
        yield
    finally:
        _about.reset(token)


def keystream(
    seed: bytes, num_range: int, dimensions_list: list[tuple[int, ...]]
) -> list[NDArray[np.int64]]:
    """Uniform integers below `num_range` (a power of two, at most 2^32) of given shapes; the same
    for the same secret.

    Raises:
        ValueError: another range.
    """
    if not 0 < num_range <= 1 << 32 or num_range & (num_range - 1):
        raise ValueError(f"masks are uniform below a power of two of at most 2^32, not {num_range}")
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in dimensions_list]
    key = hashlib.sha256(b"fedvpa secure aggregation mask" + _about.get() + seed).digest()
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    raw = np.frombuffer(cipher.update(bytes(4 * sum(sizes))), dtype="<u4").astype(np.int64) & (
        num_range - 1
    )
    parts = np.split(raw, np.cumsum(sizes)[:-1]) if sizes else []
    return [part.reshape(shape) for part, shape in zip(parts, dimensions_list)]


def replace_generator(*modules: Any) -> None:
    """Let these modules of Flower draw their masks from `keystream`.

    Raises:
        AttributeError: this version of Flower has no such generator to replace: nothing would be
            protected.
    """
    for module in modules:
        if not hasattr(module, "pseudo_rand_gen"):
            raise AttributeError(
                f"{module.__name__} draws its masks in another way than the Flower that fedvpa"
                " knows"
            )
        module.pseudo_rand_gen = keystream
