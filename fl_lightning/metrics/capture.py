"""From Lightning's result collection to mergeable sums."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from fl_lightning.metrics.parts import LeftOut, Max, Mean, Min, Part, TorchmetricPart, Total
from fl_lightning.metrics.states import metric_state
from fl_lightning.metrics.step_sums import StepSums, logged_name
from fl_lightning.metrics.sums import MetricSums

__all__ = ["capture", "reset_metric_attributes"]


def capture(results: Any, step_sums: StepSums | None = None, num_examples: float = 0) -> MetricSums:
    """Return what a module logged, as parts that merge over clients.

    Call it at the end of the client's last local epoch (or evaluation), after the module's own epoch-end hook and
    before Lightning resets the results: in ``on_train_epoch_end`` of a ``lightning.pytorch.callbacks.Checkpoint``.

    ============================================  ============================================================
    logged                                        federated value
    ============================================  ============================================================
    a number, ``on_epoch=True``                   mean over examples of the last epoch (``reduce_fx`` otherwise)
    a number, ``on_epoch=True``, in a hook of     mean over clients, weighted by ``num_examples``, or by the
    the epoch (``on_train_epoch_end``)            ``batch_size=`` it was logged with
    a number for steps only                       mean over examples of all steps of the round (``StepSums``)
    a torchmetrics object                         the metric over the examples of all clients
    ============================================  ============================================================

    A number that the module took from ``metric.compute()`` is a number: log the metric object for the exact value.
    Values logged for steps and epochs appear as ``name`` and ``name_epoch``, as in ``trainer.callback_metrics``.
    What cannot be merged (``Running``, one metric object for several dataloaders) becomes a
    :class:`~fl_lightning.metrics.LeftOut` with its reason.

    Args:
        results: the ``_ResultCollection`` of a loop, of ``lightning`` or ``pytorch_lightning``.
        step_sums: what was observed of the values logged for steps only.
        num_examples: the weight of this client's values from epoch hooks.

    Example:
        >>> import torch
        >>> from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
        >>> results = _ResultCollection(training=True)
        >>> results.log("training_step", "loss", torch.tensor(0.5), on_step=True, on_epoch=True, batch_size=4)
        >>> capture(results)["loss_epoch"]
        Mean(total=2.0, weight=4.0)
    """
    parts: dict[str, Part] = step_sums.parts() if step_sums is not None else {}
    shared = _metrics_of_several_loaders(results)
    for result in results.values():
        meta = result.meta
        if result.has_reset or (result.is_tensor and not meta.on_epoch):
            continue
        if not result.is_tensor:
            part = _metric_part(result, shared)
        elif meta.is_mean_reduction:
            part = _mean(result, num_examples)
        elif meta.is_sum_reduction:
            part = Total(result.value.item())
        else:
            part = Max(result.value.item()) if meta.is_max_reduction else Min(result.value.item())
        name = logged_name(meta)
        parts[name] = part
        if meta.on_step and meta.on_epoch:
            suffix = name.removeprefix(meta.name)
            parts[f"{meta.name}_epoch{suffix}"] = part
    return MetricSums(parts)


def reset_metric_attributes(module: nn.Module) -> None:
    """Make a copied LightningModule find its own metrics again.

    Lightning remembers metrics by object id, and a deep copy remembers those of the original: the copy then fails with
    "Could not find the `LightningModule` attribute".
    """
    for part in module.modules():
        if "_metric_attributes" in vars(part):
            part._metric_attributes = None  # type: ignore[assignment]


def _mean(result: Any, num_examples: float) -> Mean:
    total, weight = result.value.item(), result.cumulated_batch_size.item()
    # outside of batches Lightning counts 1 for each call, whatever the size of the client
    if weight and weight == result._update_count and _is_epoch_hook(result.meta.fx):
        return Mean(total / weight * num_examples, float(num_examples))
    return Mean(total, float(weight))


def _is_epoch_hook(fx: str) -> bool:
    hook = fx.split(".")[0]  # Lightning appends the dataloader
    return hook.endswith(("_start", "_end")) and "batch" not in hook


def _metric_part(result: Any, shared: set[str]) -> Part:
    attribute = result.meta.metric_attribute
    if attribute in shared:
        return LeftOut(
            f"the metric {attribute!r} is logged for several dataloaders, whose examples it mixes; use one metric "
            "object for each dataloader"
        )
    try:
        return TorchmetricPart(attribute, metric_state(result.value))
    except MisconfigurationException as error:
        return LeftOut(str(error))  # the module trains all the same, as it does in a plain Trainer


def _metrics_of_several_loaders(results: Any) -> set[str]:
    loaders: dict[str, set[int | None]] = {}
    for result in results.values():
        if not result.is_tensor and not result.has_reset:
            loaders.setdefault(result.meta.metric_attribute, set()).add(result.meta.dataloader_idx)
    return {attribute for attribute, indices in loaders.items() if len(indices) > 1}
