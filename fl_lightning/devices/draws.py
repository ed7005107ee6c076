"""A uniform number for every client and purpose, at any time and in any order: a hash of (seed, purpose, id, slot).

A population of a million devices has no table. A device's number is computed when somebody asks for it, a vector of ids
at a time, and is the same alone and in a crowd.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId

__all__ = ["client_keys", "uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = 2**64 - 1


def client_keys(client_ids: Sequence[ClientId]) -> NDArray[np.uint64]:
    """Return one 64-bit key for each id; ``1`` and ``"1"`` are different clients.

    Args:
        client_ids: strings, integers, or a ``range``, which is never spread out into objects.

    Shape:
        ``(clients,)``

    Example:
        >>> bool(client_keys([3])[0] == client_keys(range(5))[3]), bool(client_keys(["3"])[0] == client_keys([3])[0])
        (True, False)
    """
    if isinstance(client_ids, range):
        return np.arange(client_ids.start, client_ids.stop, client_ids.step, dtype=np.int64).view(np.uint64)
    if set(map(type, client_ids)) == {int}:
        try:
            return np.array(client_ids, dtype=np.int64).view(np.uint64)
        except OverflowError:  # an id beyond 64 bits is hashed below
            pass
    return np.array([_key(client_id) for client_id in client_ids], dtype=np.uint64)


def _key(client_id: ClientId) -> int:
    if isinstance(client_id, int) and -(2**63) <= client_id < 2**63:
        return client_id & _MASK
    return int.from_bytes(hashlib.blake2b(repr(client_id).encode(), digest_size=8).digest(), "big")


def uniforms(
    keys: NDArray[np.uint64], seed: int, purpose: str, slot: int | NDArray[np.int64] = 0
) -> NDArray[np.float64]:
    """Return one number in ``(0, 1)`` for each key.

    Args:
        keys: of :func:`client_keys`.
        seed: root of the fleet.
        purpose: what the numbers are for, ``"speed"`` for example.
        slot: a further address, the hour of a coin flip for example; one number or one for each key.

    Shape:
        ``(clients,)``

    Example:
        >>> together = uniforms(client_keys(range(1000)), 7, "speed")
        >>> bool(together[600] == uniforms(client_keys([600]), 7, "speed")[0]), round(float(together.mean()), 1)
        (True, 0.5)
    """
    root = np.uint64(seed_for(seed, -1, None, purpose))
    address = np.asarray(slot, dtype=np.int64).astype(np.uint64)
    mixed = _mix(_mix(_mix(keys ^ root) + address * _GOLDEN) + root)
    # 53 bits, and half a step, so that neither 0 nor 1 comes out and every quantile function stays finite
    return ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, 2014)."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
