"""What clients do with the new global model after a round: evaluate it, and measure its running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fl_lightning.aggregation import PartialSum, TreeSum, gather_objects, reduce_over_processes
from fl_lightning.errors import MisconfigurationException
from fl_lightning.federation import Federation, portable_failure, raise_failure, scalars
from fl_lightning.federation_settings import FederationSettings
from fl_lightning.local.client import Failure
from fl_lightning.local.recalibration import combined_statistics
from fl_lightning.schedules import UniformSampler, assign_lanes, cohort_size
from fl_lightning.schedules.lanes import sort_key
from fl_lightning.seeding import seed_for
from fl_lightning.traveling import batch_norm_buffers
from fl_lightning.types import ClientId, ClientTask, Tree, Work

__all__ = ["evaluate", "recalibrate"]


def evaluate(
    federation: Federation, round: int, at_most: int | None = None
) -> tuple[dict[str, float], dict[str, dict[ClientId, float]]]:
    """Evaluate the global model on clients' own validation data, and beside it their personal models if they have any.

    Returns:
        The exact value over all examples of all evaluated clients by metric name, and each client's own value.
    """
    ids = federation.population.client_ids()
    size = cohort_size(_as_cohort(federation.settings.evaluate_clients), len(ids))
    if at_most is not None:
        size = min(size, at_most)
    seed = seed_for(federation.settings.seed, -1 if size == len(ids) else round, None, "evaluation")
    cohort = sorted(UniformSampler().cohort(federation.population, size, seed, round), key=sort_key)
    tasks = _evaluation_tasks(federation, cohort, round)
    lanes = assign_lanes(cohort, [1.0] * len(cohort), federation.settings.num_lanes)
    merged = TreeSum()
    own: dict[ClientId, dict[str, float]] = {}
    failed: list[tuple[ClientId, Failure]] = []
    for lane in federation.lanes:
        partial = PartialSum()
        for client_id, sums in federation.engine.evaluate(tasks[position] for position in lanes[lane]):
            if isinstance(sums, Failure):
                failed.append((client_id, sums))
            elif sums is not None:
                own[client_id] = scalars(sums.compute(federation.module))
                partial.metrics = partial.metrics.merge(sums)
                partial.num_clients += 1
        merged.push(partial)
    # every process learns of a failure before one of them waits for another in the reduction
    for some in [failed, *gather_objects([(c, portable_failure(f)) for c, f in failed])]:
        for client_id, failure in some:
            raise_failure(client_id, round, failure)
    total = reduce_over_processes(merged.total(), federation.device)
    if not total.num_clients:
        raise MisconfigurationException(
            "evaluate_clients needs validation data, but no evaluated client has any. Give the data module "
            "client_val_dataloader(id), use FederatedDataModule(..., client_val_fraction=0.1), or a val_dataloader."
        )
    values: dict[str, dict[ClientId, float]] = {}
    everyone = {client_id: named for some in gather_objects(own) for client_id, named in some.items()}
    for client_id in cohort:
        for name, value in everyone.get(client_id, {}).items():
            values.setdefault(name, {})[client_id] = value
    return scalars(total.metrics.compute(federation.module)), values


@torch.no_grad()
def recalibrate(federation: Federation, cohort: Sequence[ClientId], round: int) -> None:
    """Measure BatchNorm's running statistics of the new model on the cohort's data; without a cohort they stay."""
    if not cohort:
        return
    names = batch_norm_buffers(federation.module)
    own = dict(federation.module.named_buffers())
    broadcast: dict[str, Tree] = {"model": federation.model(), "buffers": {}}
    tasks = [
        ClientTask(c, round, -1, broadcast, seed_for(federation.settings.seed, round, c, "recalibration"))
        for c in cohort
    ]
    merged = TreeSum()
    work = [federation.dispatcher.estimated_work(task.client_id, task.work) for task in tasks]
    lanes = assign_lanes(cohort, work, federation.settings.num_lanes)
    with torch.enable_grad():
        for lane in federation.lanes:
            partial = PartialSum()
            for _, contribution in federation.engine.recalibrate((tasks[p] for p in lanes[lane]), names):
                partial.add(contribution, None)
            merged.push(partial)
    total = reduce_over_processes(merged.total(), federation.device)
    for name, value in combined_statistics(total.as_contribution(), own).items():
        own[name].copy_(value)


def _evaluation_tasks(federation: Federation, cohort: Sequence[ClientId], round: int) -> list[ClientTask]:
    broadcast = {"model": federation.model(), "buffers": federation.buffers()}
    settings = federation.settings
    return [
        ClientTask(
            c, round, -1, broadcast, seed_for(settings.seed, round, c, "evaluation"), _tuning(settings, c, round)
        )
        for c in cohort
    ]


def _tuning(settings: FederationSettings, client_id: ClientId, round: int) -> Work:
    """Return the training of a client's personal model before it is evaluated (``personalize_epochs``)."""
    override, schedule = settings.override_of(client_id), settings.client_lr_schedule
    factor = 1.0 if schedule is None else float(schedule(round))
    rate, batch_size = override.get("lr"), override.get("batch_size")
    return Work(settings.personalize_epochs or 1, None, factor, lr=rate, batch_size=batch_size)


def _as_cohort(evaluate_clients: bool | int | float) -> int | float | None:
    return None if evaluate_clients is True else evaluate_clients
