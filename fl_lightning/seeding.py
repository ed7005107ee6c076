"""Every random number of a federation has an address: ``(root, round, client, purpose)``.

Seeds are hashes of that address, never of arrival order, so a client draws the same numbers on one process and on
eight, in an uninterrupted run and after a resume.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states

from fl_lightning.types import ClientId

__all__ = ["forked_rng", "rng_states", "root_seed", "seed_everywhere", "seed_for"]


def seed_for(root: int, round: int, client_id: ClientId | None, purpose: str) -> int:
    """Return the 63-bit seed of one purpose of one client in one round.

    Args:
        root: the federation's seed.
        round: 0-based round; -1 for what happens before the first one (a partition, say).
        client_id: the client, or ``None`` for the server. ``1`` and ``"1"`` are different clients.
        purpose: what the numbers are for, ``"training"`` or ``"cohort"`` for example.

    Returns:
        An integer in ``[0, 2**63)``.

    Example:
        >>> seed_for(0, 3, "site-a", "training") == seed_for(0, 3, "site-a", "training")
        True
        >>> seed_for(0, 3, 1, "training") == seed_for(0, 3, "1", "training")
        False
    """
    address = f"{root!r}|{round!r}|{client_id!r}|{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "big") >> 1


def root_seed() -> int:
    """Return the seed that ``lightning.seed_everything`` set, or a fresh one."""
    chosen = os.environ.get("PL_GLOBAL_SEED")
    return int(chosen) if chosen is not None else int.from_bytes(os.urandom(7), "big")


def seed_everywhere(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, of the CPU and of every accelerator in use."""
    cuda: Any = torch.cuda
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 users' code draws from the global generator. NumPy's legacy generator takes 32 bits
    # `torch.manual_seed` formats a stack trace for lazy CUDA seeding; once per client that trebled a small step's cost
    torch.default_generator.manual_seed(seed)
    if cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seed the global generators inside the block and put them back as they were after it.

    Example:
        >>> before = torch.rand(1, generator=torch.default_generator.clone_state())
        >>> with forked_rng(1):
        ...     _ = torch.rand(3)
        >>> bool(torch.rand(1) == before)
        True
    """
    cuda: Any = torch.cuda
    accelerated = cuda.is_initialized()
    # on a CPU at half the cost of Lightning's collection, which turns NumPy's state into a list of 624 integers
    states = _collect_rng_states(include_cuda=True) if accelerated else rng_states()
    seed_everywhere(seed)
    try:
        yield
    finally:
        if accelerated:
            _set_rng_states(states)
        else:
            torch.default_generator.set_state(states["torch"])
            np.random.set_state(states["numpy"])  # noqa: NPY002 (the global one, as in seed_everywhere)
            random.setstate(states["python"])


def rng_states() -> dict[str, Any]:
    """Return the states of the global generators on the CPU: torch's, NumPy's and Python's."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}  # noqa: NPY002 (the global one)
