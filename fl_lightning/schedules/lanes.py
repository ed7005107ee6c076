"""Lanes: how a cohort is cut so that 1, 2, 4 and 8 processes add the same floats in the same order.

The cohort is cut into ``num_lanes`` lanes by a pure longest-first rule. A lane adds its clients in a fixed order, and
lanes merge in a fixed binary tree, of which each process owns a subtree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.types import ClientId

__all__ = ["assign_lanes", "assign_waves", "lanes_of_rank", "sort_key"]


def sort_key(client_id: ClientId) -> tuple[bool, ClientId]:
    """Return a key that orders ints before strs, so that a mixed population has one order."""
    return isinstance(client_id, str), client_id


def assign_lanes(client_ids: Sequence[ClientId], sizes: Sequence[float], num_lanes: int = 8) -> list[list[int]]:
    """Cut a cohort into lanes of about equal work.

    Args:
        client_ids: the cohort, in any order.
        sizes: estimated work of each, in any unit.
        num_lanes: a power of two.

    Returns:
        For each lane the positions in ``client_ids``, in the order in which the lane adds them. The lanes depend on
        the set of ``(id, size)`` only, not on the order they came in.

    Example:
        >>> assign_lanes(["a", "b", "c"], [1, 5, 2], num_lanes=2)
        [[1], [2, 0]]
    """
    if num_lanes < 1 or num_lanes & (num_lanes - 1):
        raise MisconfigurationException(f"Expected num_lanes to be a power of two, got {num_lanes}.")
    longest_first = sorted(range(len(client_ids)), key=lambda i: (-sizes[i], sort_key(client_ids[i])))
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    # ties go to lanes in bit-reversed order, so that any left-over clients spread over the processes' subtrees
    loads = [(0.0, _bit_reversed(lane, num_lanes), lane) for lane in range(num_lanes)]
    heapq.heapify(loads)
    for position in longest_first:
        load, tie, lane = heapq.heappop(loads)
        lanes[lane].append(position)
        heapq.heappush(loads, (load + max(float(sizes[position]), 1e-9), tie, lane))
    return lanes


def assign_waves(client_ids: Sequence[ClientId], sizes: Sequence[float], num_lanes: int = 8) -> list[list[list[int]]]:
    """Cut dispatches into lanes, and each lane into waves in which no client stands twice.

    A client that is dispatched twice stays in one lane, and its second dispatch starts after its first is done: it
    goes on with the memory that the first one left. A cohort without doubles has one wave in each lane.

    Args:
        client_ids: the clients of the dispatches; of one client's, the earlier dispatch stands first.
        sizes: estimated work of each dispatch, in any unit.
        num_lanes: a power of two.

    Returns:
        For each lane its waves, each with positions in ``client_ids``.

    Example:
        >>> assign_waves(["a", "b", "a"], [1, 5, 1], num_lanes=2)
        [[[1]], [[0], [2]]]
    """
    own: dict[ClientId, list[int]] = {}
    for position, client_id in enumerate(client_ids):
        own.setdefault(client_id, []).append(position)
    each = list(own)
    lanes = assign_lanes(each, [sum(sizes[position] for position in own[c]) for c in each], num_lanes)
    return [_waves([own[each[index]] for index in lane]) for lane in lanes]


def _waves(positions: Sequence[Sequence[int]]) -> list[list[int]]:
    longest = max((len(own) for own in positions), default=0)
    return [[own[turn] for own in positions if turn < len(own)] for turn in range(longest)]


def lanes_of_rank(rank: int, world_size: int, num_lanes: int = 8) -> range:
    """Return the lanes that a process owns: one subtree of the merge.

    Raises:
        MisconfigurationException: when the processes cannot share the lanes evenly.

    Example:
        >>> lanes_of_rank(1, 2), lanes_of_rank(0, 1)
        (range(4, 8), range(0, 8))
    """
    if world_size < 1 or num_lanes % world_size:
        raise MisconfigurationException(
            f"{world_size} processes cannot share {num_lanes} lanes evenly, and the result would depend on their "
            f"number. Use 1, 2, 4 or 8 processes, or set num_lanes to a power of two that {world_size} divides."
        )
    share = num_lanes // world_size
    return range(rank * share, (rank + 1) * share)


def _bit_reversed(lane: int, num_lanes: int) -> int:
    width = num_lanes.bit_length() - 1
    return int(format(lane, f"0{width}b")[::-1], 2) if width else 0
