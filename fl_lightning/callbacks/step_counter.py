"""Counts what an optimizer did, in the units in which FedNova and SCAFFOLD need it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from fl_lightning.callbacks.base import ClientCallback
from fl_lightning.callbacks.checks import has_gradient, non_negative
from fl_lightning.callbacks.proximal import ProximalTerm

__all__ = ["StepCounter", "UnitGradient"]


class UnitGradient:
    r"""Follows SGD on a gradient that is always one.

    A local update of SGD is a sum of gradients with fixed coefficients, :math:`\delta = -\eta \sum_k a_k g_k`. With
    every :math:`g_k = 1` the distance moved is the sum of the coefficients, :math:`\eta \lVert a \rVert_1`, whatever
    momentum, dampening, Nesterov's look-ahead, proximal term or learning-rate schedule made them:

    ========================  =============================================================
    plain, :math:`\tau` steps :math:`\tau`
    momentum :math:`\rho`     :math:`[\tau - \rho(1 - \rho^\tau)/(1 - \rho)]/(1 - \rho)`
    proximal :math:`\mu`      :math:`[1 - (1 - \eta\mu)^\tau]/(\eta\mu)`
    varying :math:`\eta_k`    :math:`\sum_k \eta_k / \eta_0`
    ========================  =============================================================

    Args:
        mu: strength of a proximal term, >= 0.

    Example:
        >>> walk = UnitGradient()
        >>> for _ in range(3):
        ...     walk.step(lr=0.1, momentum=0.5)
        >>> walk.a_norm  # 1 + 1.5 + 1.75
        4.25

    References:
        Wang et al., *Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization*, 2020,
        section 4 and appendix D.
    """

    def __init__(self, mu: float = 0.0) -> None:
        self.mu = mu
        self.a_norm = 0.0
        self.first_lr = 0.0
        self._buffer: float | None = None

    def step(self, lr: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> None:
        """Take one step as ``torch.optim.SGD`` takes it."""
        gradient = 1.0 - self.mu * self.distance  # the pull back towards the start
        if momentum:
            before = self._buffer
            self._buffer = gradient if before is None else momentum * before + (1 - dampening) * gradient
            gradient = gradient + momentum * self._buffer if nesterov else self._buffer
        if lr == 0:
            return  # a warm-up may start from a rate of zero: the gradient enters the momentum and moves nothing
        self.first_lr = self.first_lr or lr
        # in units of the first rate, so that n plain steps are n and not nearly n
        self.a_norm += lr / self.first_lr * gradient

    @property
    def distance(self) -> float:
        r""":math:`\eta_0 \lVert a \rVert_1`: how far a gradient of one would have moved each parameter."""
        return self.first_lr * self.a_norm


class StepCounter(ClientCallback):
    r"""Counts the optimizer steps that really happened, and FedNova's :math:`\lVert a \rVert_1`.

    A step that a gradient scaler skipped, one that gradient accumulation put off, and one without any gradient, because
    ``training_step`` returned None, do not count. The normaliser is followed step by step (:class:`UnitGradient`), so
    momentum and any learning-rate schedule are right without being told; only the strength of a proximal term cannot be
    seen from the optimizer. Gradients are those that the optimizer is given: clipped or noisy ones count as any other.
    With ``maximize=True`` an update is no descent along the gradients, and the normaliser is not defined.

    After a fit ``num_steps`` holds the steps, ``a_norm`` the normaliser (``None`` where it is not defined, with
    ``reason`` saying why), ``lr`` the first learning rate and ``distance`` their product.

    Args:
        mu: strength of the proximal term that runs beside the counter, >= 0.

    Raises:
        MisconfigurationException: for ``mu < 0``, or a :class:`ProximalTerm` of another strength beside it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> counter = StepCounter()
        >>> trainer = Trainer(max_steps=3, accelerator="cpu", callbacks=[counter], logger=False, barebones=True)
        >>> trainer.fit(BoringModel())
        >>> counter.num_steps, counter.a_norm
        (3, 3.0)
    """

    beside_a_proximal_term: str = "Write StepCounter(mu={mu})."
    """What to do about a proximal term of another strength; an algorithm that brings the counter knows better."""

    def __init__(self, mu: float = 0.0) -> None:
        super().__init__()
        self.mu = non_negative("StepCounter", "mu", mu)
        self._restart()

    def _restart(self) -> None:
        self.num_steps = 0
        self.reason: str | None = None
        self._walk = UnitGradient(self.mu)
        self._handles: list[RemovableHandle] = []

    @property
    def a_norm(self) -> float | None:
        r"""FedNova's :math:`\lVert a \rVert_1`, or ``None`` when the optimizer's step is no sum of gradients."""
        return None if self.reason is not None else self._walk.a_norm

    @property
    def lr(self) -> float:
        """The learning rate of the first step."""
        return self._walk.first_lr

    @property
    def distance(self) -> float:
        r""":math:`\eta \lVert a \rVert_1`: how far a gradient of one would have moved each parameter."""
        return self._walk.distance

    def watch(self, optimizers: list[Optimizer]) -> None:
        """Count the steps of these optimizers from now on; Lightning's hooks and other loops call it."""
        self._restart()
        if len(optimizers) > 1:
            self.reason = f"the module has {len(optimizers)} optimizers, and one normaliser cannot stand for all"
        for optimizer in optimizers:
            # a post hook runs for the steps that happened: a gradient scaler may skip one
            self._handles.append(optimizer.register_step_post_hook(self._stepped))
            if any("momentum_buffer" in state for state in optimizer.state.values()):
                self.reason = "the momentum of earlier rounds is still in the optimizer (client_state='keep')"

    def unwatch(self) -> None:
        """Stop counting; the numbers stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if has_gradient(optimizer):  # without, torch's optimizers leave weights and momentum alone
            self.count(optimizer)

    def count(self, optimizer: Optimizer) -> None:
        """Count a step that this optimizer took, with the rates that it has now."""
        self.num_steps += 1
        if self.reason is not None:
            return
        if not isinstance(optimizer, SGD):
            self.reason = f"the optimizer is {type(optimizer).__name__}, whose step is no sum of gradients"
            return
        if any(group["maximize"] for group in optimizer.param_groups):
            self.reason = "the optimizer climbs (maximize=True), and the update is no descent along the gradients"
            return
        keys = ("lr", "momentum", "dampening", "nesterov")
        settings = {tuple(float(group[key]) for key in keys) for group in optimizer.param_groups}
        if len(settings) > 1:
            self.reason = "the optimizer's parameter groups differ in learning rate or momentum"
            return
        lr, momentum, dampening, nesterov = settings.pop()
        self._walk.step(lr, momentum, dampening, bool(nesterov))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a proximal term that the normaliser does not know of.

        Raises:
            MisconfigurationException: when one of another strength runs beside the counter.
        """
        for term in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(term, ProximalTerm) and term.mu != self.mu:
                raise MisconfigurationException(
                    f"StepCounter counts for mu={self.mu}, and a ProximalTerm with mu={term.mu} runs beside it: the "
                    f"normaliser would be wrong. {self.beside_a_proximal_term.format(mu=term.mu)}"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch([getattr(optimizer, "_optimizer", optimizer) for optimizer in trainer.optimizers])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.unwatch()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.unwatch()

    def report(self) -> dict[str, Any]:
        numbers: dict[str, Any] = {"a_norm": self.a_norm, "lr": self.lr, "distance": self.distance}
        if self.reason is not None:
            numbers["no_a_norm"] = self.reason
        return numbers
