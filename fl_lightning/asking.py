"""What the server asks clients before a round: the loss of the global model on their data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fl_lightning.aggregation import gather_objects
from fl_lightning.federation import Federation, portable_failure, raise_failure
from fl_lightning.local.client import Failure
from fl_lightning.schedules import assign_lanes
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId, ClientTask, Work
from fl_lightning.wire import pack

__all__ = ["ask_losses"]


def ask_losses(federation: Federation, client_ids: Sequence[ClientId], round: int) -> dict[ClientId, float]:
    """Return the loss of the global model on the training data of each client; each process asks those of its lanes.

    Everyone who is asked downloads the model for it, without transforms, and uploads its loss; those bytes count in
    ``bytes_asked`` and ``bytes_answered``.

    Args:
        federation: the federation, between two rounds.
        client_ids: who is asked.
        round: 0-based round that is about to begin.

    Raises:
        ClientError: when a client cannot answer.
    """
    broadcast = {"model": federation.model(), "buffers": federation.buffers()}
    size = len(pack(broadcast))
    for client_id in client_ids:
        federation.bytes_asked[client_id] += size
    seed = federation.settings.seed
    tasks = [
        # the loss is measured before the first step, and what the step makes of the model is thrown away
        ClientTask(c, round, -1, broadcast, seed_for(seed, round, c, "start loss"), Work(None, 1))
        for c in client_ids
    ]
    lanes = assign_lanes(list(client_ids), [1.0] * len(tasks), federation.settings.num_lanes)
    own: dict[ClientId, float] = {}
    failed: list[tuple[ClientId, Failure]] = []
    for lane in federation.lanes:
        for client_id, loss in federation.engine.start_losses([tasks[position] for position in lanes[lane]]):
            if isinstance(loss, Failure):
                failed.append((client_id, loss))
            else:
                own[client_id] = loss
    # every process learns of a failure before one of them waits for another
    for some in [failed, *gather_objects([(c, portable_failure(f)) for c, f in failed])]:
        for client_id, failure in some:
            raise_failure(client_id, round, failure)
    losses = {client_id: loss for some in gather_objects(own) for client_id, loss in some.items()}
    answer = len(pack({"loss": torch.zeros((), dtype=torch.float64)}))  # as long for one number as for another
    for client_id in client_ids:
        federation.bytes_answered[client_id] += answer
    return losses
