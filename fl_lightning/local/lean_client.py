"""One client's local training without a Trainer: the module's own methods in Lightning's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from lightning.pytorch.core.optimizer import (
    _configure_optimizers,
    _configure_schedulers_automatic_opt,
    _validate_optimizers_attached,
    _validate_scheduler_api,
)
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fl_lightning.callbacks.base import GradientCorrection, dense_gradient
from fl_lightning.local.lean_data import Batches, TensorBatches
from fl_lightning.local.lean_log import Log, Points, ResultLog, ScalarLog
from fl_lightning.local.lean_plain import lightning_module, overrides
from fl_lightning.local.lean_step import step_function
from fl_lightning.local.lean_trainer import LeanTrainer, NotPlain, Progress
from fl_lightning.local.recorder import ClientLogger

__all__ = ["Facts", "Fit", "configure"]

Hook = Callable[..., Any]
_BEFORE_STEP = "on_before_optimizer_step"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is the same for every client of a federation.

    Args:
        module: the worker's module.
        precision: Lightning's precision plugin of the clients.
        device: where clients train.
        clip: ``gradient_clip_val``.
        clip_algorithm: ``gradient_clip_algorithm``.
        hooks: the hooks of local training that the module overrides.
        takes_index: whether ``training_step`` takes the index of the batch.
        plain_precision: whether ``training_step`` runs outside of any context.
    """

    module: pl.LightningModule
    precision: Precision
    device: torch.device
    clip: float | None
    clip_algorithm: Any
    hooks: frozenset[str]
    takes_index: bool
    plain_precision: bool

    @classmethod
    def of(cls, module: pl.LightningModule, trainer: pl.Trainer, device: torch.device) -> Facts:
        """Look once at a module and at the Trainer that LightningLoop would use."""
        base = lightning_module(module)
        return cls(
            module,
            trainer.precision_plugin,
            device,
            trainer.gradient_clip_val,
            trainer.gradient_clip_algorithm or GradClipAlgorithmType.NORM,
            frozenset() if base is None else frozenset(overrides(module, base)),
            is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2),
            type(trainer.precision_plugin) is Precision,
        )


class Fit:
    """What ``Trainer.fit`` does for a plain module.

    Args:
        facts: what is the same for all clients.
        batches: opens the client's data.
        callbacks: the client's callbacks.
        progress: epochs, steps and accumulation of this fit.
        logger: where the client's curve goes, or ``None``.
        offset: steps of the client's earlier rounds.
        num_examples: size of the client's data; ``None`` counts the first epoch's.
        any_log: take Lightning's own collection for what is logged.
        loader: the client's train loader, for callbacks that look at it.
    """

    def __init__(
        self,
        facts: Facts,
        batches: Callable[[], Batches],
        callbacks: list[Callback],
        progress: Progress,
        logger: ClientLogger | None,
        offset: int,
        num_examples: int | None,
        any_log: bool,
        loader: Any = None,
    ) -> None:
        self.facts = facts
        self.module = facts.module
        self.callbacks = callbacks
        self.progress = progress
        self.num_examples = num_examples or 0
        curve = logger if logger is not None and logger.enabled else None
        self.log: Log = ResultLog(curve) if any_log else ScalarLog(curve)
        self.trainer = LeanTrainer(
            progress, callbacks, [] if logger is None else [logger], facts.device, facts.precision, loader
        )
        self._count_examples = num_examples is None
        self._open = batches
        self._batches: Batches | None = None
        self._iterator: Iterator[Any] | None = None
        self._points = Points(offset, progress.log_every)
        progress.open_data = self._open_data

    # ---- from setup to teardown ----------------------------------------------------------------------------------

    def run(self, load: Callable[[nn.Module], None], optimizers: Callable[[list[Optimizer], list[Any]], None]) -> None:
        """Train.

        Args:
            load: puts the client's start into the module, after its ``setup``.
            optimizers: adjusts what ``configure_optimizers`` returned.
        """
        module, progress = self.module, self.progress
        module.trainer = self.trainer  # type: ignore[assignment]
        if isinstance(self.log, ScalarLog):
            vars(module)["log"] = self.log.log
        elif isinstance(self.log, ResultLog):
            self.trainer.take_results(self.log.results, self.log)
        self._call("setup", stage="fit")
        load(module)
        progress.optimizers, progress.schedulers = configure(module)
        optimizers(progress.optimizers, progress.schedulers)
        self._prepare()
        self._call("on_fit_start")
        self._open_data()
        self._call("on_train_start")
        while not self._done():
            self._epoch()
            progress.epoch += 1
        self._call("on_train_end")
        self._call("on_fit_end")
        self._call("teardown", stage="fit")
        if progress.refused is not None:  # the module swallowed the refusal and went on without an answer
            raise NotPlain(progress.refused)

    def _prepare(self) -> None:
        self._optimizer = self.progress.optimizers[0]
        self._step = step_function(self._optimizer)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._batch_start = self._hooks("on_train_batch_start")
        self._callback_batch_end = self._hooks("on_train_batch_end", of_module=False)
        self._module_batch_end = self._hooks("on_train_batch_end", of_callbacks=False)
        self._before_step = self._corrections()

    def _open_data(self) -> int:
        """Open the client's data and start its first epoch, as Lightning does before ``on_train_start``."""
        if self._batches is None:
            self._batches = self._open()
            self.progress.num_batches = self._batches.num_batches
            self._iterator = self._batches.begin(0)
            self._of_tensors = isinstance(self._batches, TensorBatches)
        return self._batches.num_batches

    def _done(self) -> bool:
        progress = self.progress
        if not progress.num_batches or (progress.steps is not None and progress.global_step >= progress.steps):
            return True
        return progress.epochs is not None and progress.epoch >= progress.epochs

    # ---- an epoch and a batch -------------------------------------------------------------------------------------

    def _epoch(self) -> None:
        progress, batches = self.progress, self._batches
        assert batches is not None
        self._call("on_train_epoch_start")
        iterator = self._iterator if progress.epoch == 0 else batches.begin(progress.epoch)
        assert iterator is not None
        self.module._current_fx_name = "training_step"
        num_batches = batches.num_batches
        for index in range(num_batches):
            try:
                batch = next(iterator)
            except StopIteration:
                raise NotPlain(f"a loader of {num_batches} batches gave {index}") from None
            progress.is_last_batch = index + 1 == num_batches
            self._batch(batch, index)
            if progress.steps is not None and progress.global_step >= progress.steps:
                break
        batches.end(iterator)
        self._end_epoch()

    def _end_epoch(self) -> None:
        self.log.end_batches()
        self._call("on_train_epoch_end")
        self.log.close_epoch(self.num_examples)
        self.log.end_epoch(self._points.stepped - 1)

    def _batch(self, batch: Any, index: int) -> None:
        progress, log = self.progress, self.log
        if batch is None:
            raise NotPlain("its loader gives None for a batch")
        if self.facts.device.type != "cpu":
            batch = move_data_to_device(batch, self.facts.device)
        size = len(batch[0]) if self._of_tensors else None
        log.begin_batch(batch, size)
        accumulates = (index + 1) % progress.accumulate != 0 and not progress.is_last_batch
        point = self._points.next(progress.is_last_batch, accumulates)
        for hook in self._batch_start:
            if hook(batch, index) == -1:
                raise NotPlain("on_train_batch_start skips the rest of an epoch")
        if _count(self._optimizer) != len(self._parameters):  # a hook unfroze something
            self._prepare()
        if self._count_examples and progress.epoch == 0:
            self.num_examples += extract_batch_size(batch) if size is None else size
        outputs = self._optimize(batch, index, accumulates)
        self._schedule(index, accumulates)
        for hook in self._callback_batch_end:
            hook(outputs, batch, index)
        log.observe()
        for hook in self._module_batch_end:
            hook(outputs, batch, index)
        log.end_batch(point)
        if not accumulates:
            self._points.stepped += 1

    def _optimize(self, batch: Any, index: int, accumulates: bool) -> Any:
        facts = self.facts
        arguments = (batch, index) if facts.takes_index else (batch,)
        if facts.plain_precision:
            output = self.module.training_step(*arguments)
        else:
            with facts.precision.train_step_context():
                output = self.module.training_step(*arguments)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise NotPlain("training_step returned no loss")
        if index % self.progress.accumulate == 0:
            for parameter in self._parameters:
                parameter.grad = None
        accumulate = self.progress.accumulate
        (loss if accumulate == 1 else loss / accumulate).backward()  # type: ignore[no-untyped-call]
        if not accumulates:
            for hook in self._before_step:
                hook()
            if facts.clip:
                facts.precision.clip_gradients(self._optimizer, facts.clip, facts.clip_algorithm)
            self._step()
            self.progress.global_step += 1
        if not (self._callback_batch_end or self._module_batch_end):
            return None
        extra = {k: v for k, v in output.items() if k != "loss"} if isinstance(output, Mapping) else {}
        return {"loss": (loss / accumulate).detach().clone(), **extra}

    def _schedule(self, index: int, accumulates: bool) -> None:
        for config in self.progress.schedulers:
            if config.interval == "step":
                due = not accumulates and (index + 1) % config.frequency == 0
            else:
                due = self.progress.is_last_batch and (self.progress.epoch + 1) % config.frequency == 0
            if due:
                config.scheduler.step()

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def _hooks(self, name: str, of_callbacks: bool = True, of_module: bool = True) -> list[Hook]:
        """Return the versions of a hook that do something: callbacks first, then the module, as in Lightning."""
        found: list[Hook] = []
        if of_callbacks:
            found += [
                _of_callback(getattr(callback, name), self.trainer, self.module)
                for callback in self.callbacks
                if getattr(type(callback), name) is not getattr(Callback, name)
            ]
        if of_module and name in self.facts.hooks:
            found.append(_of_module(self.module, name))
        return found

    def _call(self, name: str, **arguments: Any) -> None:
        for hook in self._hooks(name):
            hook(**arguments)

    def _corrections(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        for callback in self.callbacks:
            own = getattr(type(callback), _BEFORE_STEP)
            if own is GradientCorrection.on_before_optimizer_step:
                assert isinstance(callback, GradientCorrection)
                found.append(self._correction(callback))
            elif own is not Callback.on_before_optimizer_step:
                found.append(_before(callback, self.trainer, self.module, self._optimizer))
        return found

    def _correction(self, callback: GradientCorrection) -> Callable[[], None]:
        mine = {id(p) for p in self._parameters}
        named = [(name, p) for name, p in self.module.named_parameters() if id(p) in mine]
        task = callback.task
        assert task is not None

        @torch.no_grad()
        def correct() -> None:
            params = {name: p for name, p in named if p.grad is not None}
            if not params:
                return
            grads: dict[str, Tensor] = {name: dense_gradient(p) for name, p in params.items()}
            corrected = callback.correct(grads, {name: p.detach() for name, p in params.items()}, task)
            for name, p in params.items():
                if corrected[name] is not p.grad:
                    p.grad.copy_(corrected[name])  # type: ignore[union-attr]
            callback.num_corrections += 1

        return correct


def _count(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def configure(module: pl.LightningModule) -> tuple[list[Optimizer], list[Any]]:
    """Call ``configure_optimizers`` and read what it returns as Lightning does.

    Raises:
        NotPlain: for anything but one of torch's own optimizers, or a scheduler that looks at a metric.
    """
    module._current_fx_name = "configure_optimizers"
    optimizers, schedulers, monitor = _configure_optimizers(module.configure_optimizers())  # type: ignore[arg-type]
    configs = _configure_schedulers_automatic_opt(schedulers, monitor)
    _validate_optimizers_attached(optimizers, configs)
    _validate_scheduler_api(configs, module)
    if len(optimizers) != 1:
        raise NotPlain(f"configure_optimizers returns {len(optimizers)} optimizers")
    kind = type(optimizers[0])
    if not kind.__module__.startswith("torch.optim.") or kind is LBFGS:
        raise NotPlain(f"its optimizer is {kind.__name__}, which may call for the gradient more than once")
    if any(config.reduce_on_plateau for config in configs):
        raise NotPlain("its learning-rate scheduler looks at a metric")
    return optimizers, configs


def _of_callback(hook: Hook, trainer: LeanTrainer, module: pl.LightningModule) -> Hook:
    return lambda *arguments, **named: hook(trainer, module, *arguments, **named)


def _of_module(module: pl.LightningModule, name: str) -> Hook:
    hook = getattr(module, name)

    def call(*arguments: Any, **named: Any) -> Any:
        before = module._current_fx_name
        module._current_fx_name = name
        # numbers of training_step alone go to plain lists
        quick = vars(module).pop("log", None)
        try:
            return hook(*arguments, **named)
        finally:
            module._current_fx_name = before
            if quick is not None:
                vars(module)["log"] = quick

    return call


def _before(
    callback: Callback, trainer: LeanTrainer, module: pl.LightningModule, optimizer: Optimizer
) -> Callable[[], None]:
    return lambda: callback.on_before_optimizer_step(trainer, module, optimizer)  # type: ignore[arg-type]
