"""Byzantine clients, for research and tests: what an attacker does in its own local training.

Each attack is a client callback that acts in chosen clients only::

    FederatedTrainer(algorithm=CoordinateMedian(f=2), client_callbacks=[SignFlip(clients=[3, 7], scale=10.0)])

Honest clients train to the same bits as without an attack, in every loop and in groups, where attackers train beside
them. An attack of your own keeps that when it overrides ``UpdateAttack.forged`` and no hook; with another one all
clients train one by one, which without it they do with ``group_size=1``. Attacks can be combined: label flips with
model replacement are the usual backdoor. :class:`LittleIsEnough` is the attack of clients that know each other's
updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.callbacks.base import ClientCallback
from fl_lightning.callbacks.checks import finite, flag, non_negative, positive
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId, ClientTask, Memory, Tree

__all__ = ["Attack", "LabelFlip", "LittleIsEnough", "ModelReplacement", "NoiseAttack", "SignFlip", "UpdateAttack"]


class Attack(ClientCallback):
    """Base of attacks: knows whether it is at an attacker.

    In a plain ``lightning.Trainer``, which has no clients, it does nothing.

    Args:
        clients: ids of the attackers, as ``client_ids()`` gives them; 1 and ``"1"`` are different clients.

    Raises:
        MisconfigurationException: for no attacker.
    """

    def __init__(self, clients: Sequence[ClientId]) -> None:
        super().__init__()
        if isinstance(clients, str) or not clients:
            raise MisconfigurationException(
                f"{type(self).__name__} expected a list of the attackers' ids, got {clients!r}. Write clients=[3, 7]."
            )
        self.clients = list(clients)
        self.task: ClientTask | None = None

    def begin(self, task: ClientTask, memory: Memory) -> None:
        self.task = task if task.client_id in self.clients else None


class LittleIsEnough(Attack):
    r"""The attackers train honestly, tell each other what came out, and all send the same small lie.

    .. math:: \delta_k \leftarrow \mu - z\,\sigma \qquad \text{for every attacker } k

    with mean and standard deviation, by coordinate, of the attackers' own honest updates of the round, which is what
    the paper's attackers know; two or more of them must be in the cohort. It stays inside the spread of honest clients
    and does not average out.

    A callback of one client cannot know what another one has trained: the attackers' channel is the simulation, which
    replaces their updates where they are side by side. ``FederatedTrainer`` therefore takes this callback off the
    clients and wraps its algorithm as :class:`~fl_lightning.algorithms.robust.ALittleIsEnough` does; the two ways to
    write it give the same bits, in every loop and engine.

    Args:
        clients: ids of the attackers, as ``client_ids()`` gives them.
        z: size of the shift in standard deviations; ``None`` takes the paper's for the size of the cohort.
        omniscient: attackers know everyone's updates.

    Raises:
        MisconfigurationException: for no attacker, or a ``z`` that is not finite.

    Example:
        >>> LittleIsEnough(clients=[3, 7], z=1.5).z
        1.5

    References:
        Baruch et al., *A Little Is Enough: Circumventing Defenses For Distributed Learning*, 2019, section 3 and
        algorithm 3, on updates of several local steps instead of gradients.
    """

    def __init__(self, clients: Sequence[ClientId], z: float | None = None, omniscient: bool = False) -> None:
        super().__init__(clients)
        hint = "None takes the paper's for the size of the cohort"
        self.z = None if z is None else finite("LittleIsEnough", "z", z, hint)
        self.omniscient = flag("LittleIsEnough", "omniscient", omniscient)


class LabelFlip(Attack):
    r"""The attackers train on wrong labels.

    .. math:: y \leftarrow C - 1 - y, \qquad \text{or } y \leftarrow \text{mapping}(y)

    The loss and the gradient at the start of a round, which some algorithms ask for, are those of the wrong labels too.
    What a client answers to a sampler before the round (``PowerOfChoiceSampler``) is honest.

    Args:
        clients: ids of the attackers.
        num_classes: :math:`C` >= 2; give this or ``mapping``.
        mapping: label to label, for some labels only: ``{7: 1}`` makes every 7 a 1.
        target: where the labels are in a batch: an index or a key.

    Raises:
        MisconfigurationException: for none or both of ``num_classes`` and ``mapping``, or a batch whose labels cannot
            be exchanged.

    Example:
        >>> flip = LabelFlip(clients=["a"], num_classes=10)
        >>> flip.flipped(torch.tensor([0, 3, 9])).tolist()
        [9, 6, 0]

    References:
        Fang et al., *Local Model Poisoning Attacks to Byzantine-Robust Federated Learning*, 2020, section 5.
    """

    def __init__(
        self,
        clients: Sequence[ClientId],
        num_classes: int | None = None,
        mapping: Mapping[int, int] | None = None,
        target: int | str = -1,
    ) -> None:
        super().__init__(clients)
        if (num_classes is None) == (mapping is None) or (num_classes is not None and num_classes < 2):
            raise MisconfigurationException(
                f"LabelFlip expected num_classes >= 2 or a mapping of labels, got num_classes={num_classes!r} and "
                f"mapping={mapping!r}. Write LabelFlip(clients, num_classes=10) or mapping={{7: 1}}."
            )
        self.num_classes = num_classes
        self.mapping = None if mapping is None else dict(mapping)
        self.target = target

    def flipped(self, labels: Tensor) -> Tensor:
        """Return the labels that the attackers train on.

        Raises:
            MisconfigurationException: for a label that is none of ``num_classes``.
        """
        if self.num_classes is not None:
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise MisconfigurationException(
                    f"LabelFlip(num_classes={self.num_classes}) flips labels from 0 to {self.num_classes - 1}, and a "
                    f"batch of an attacker has labels from {int(labels.min())} to {int(labels.max())}. Give the number "
                    "of classes of the data, or say which labels to exchange: mapping={7: 1}."
                )
            return self.num_classes - 1 - labels
        wrong = labels.clone()
        for label, other in (self.mapping or {}).items():
            wrong[labels == label] = other
        return wrong

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.task is not None:
            self.flip(batch)

    def on_start_pass_batch(self, batch: Any) -> None:
        if self.task is not None:
            self.flip(batch)

    def flip(self, batch: Any) -> None:
        """Exchange the labels of a batch, whose tensors stay as they are.

        Raises:
            MisconfigurationException: for a batch in which there are none, or none that can be exchanged.
        """
        labels = None
        if isinstance(batch, list | dict):
            try:
                labels = batch[self.target]  # type: ignore[index]
            except (IndexError, KeyError, TypeError):  # the last: a key for a list
                labels = None
        if not isinstance(labels, Tensor):
            raise MisconfigurationException(
                f"LabelFlip expected a batch that is a list or a dict with labels at {self.target!r}, got "
                f"{type(batch).__name__}. Say where they are (target='label'), or let collate_fn return a list: what a "
                "tuple holds cannot be exchanged, and the tensor itself may be the client's data."
            )
        batch[self.target] = self.flipped(labels)


class UpdateAttack(Attack):
    """Base of attacks that train honestly and then send something else; a subclass defines :meth:`forged`.

    Running statistics, what is logged, and what is reported beside the update (the gradient at the start of a round,
    say) stay as training left them.
    """

    def forged(self, delta: Tree, task: ClientTask) -> Mapping[str, Tensor]:
        """Return what the attacker sends instead of its honest update.

        Args:
            delta: ``local - global`` after training.
            task: the attacker's task.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forged(delta, task).")

    def sent(self, delta: Tree) -> Tree:
        """Return the update of the model that the attacker pretends to have trained."""
        assert self.task is not None
        start = self.task.broadcast["model"]
        forged = self.forged(delta, self.task)
        # rounded as a model that holds it is
        return {**delta, **{n: start[n].to(v.dtype) + v - start[n].to(v.dtype) for n, v in forged.items()}}

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.task is None:
            return
        start = self.task.broadcast["model"]
        own = {name: p for name, p in pl_module.named_parameters() if name in start}
        delta = {name: p.detach() - start[name].to(p.dtype) for name, p in own.items()}
        for name, value in self.forged(delta, self.task).items():
            own[name].copy_(start[name].to(value.dtype) + value)


class SignFlip(UpdateAttack):
    r"""The attackers send the opposite of what they learned, :math:`\delta \leftarrow -s\,\delta`.

    Args:
        clients: ids of the attackers.
        scale: :math:`s` > 0.

    Example:
        >>> task = ClientTask("a", 0, 0, {}, seed=0)
        >>> SignFlip(clients=["a"], scale=2.0).forged({"w": torch.tensor([1.0])}, task)["w"].tolist()
        [-2.0]

    References:
        Li et al., *RSA: Byzantine-Robust Stochastic Aggregation Methods*, 2019, section 5.
    """

    def __init__(self, clients: Sequence[ClientId], scale: float = 1.0) -> None:
        super().__init__(clients)
        self.scale = positive("SignFlip", "scale", scale)

    def forged(self, delta: Tree, task: ClientTask) -> Mapping[str, Tensor]:
        return {name: -self.scale * tensor for name, tensor in delta.items()}


class ModelReplacement(UpdateAttack):
    r"""The attackers boost their update so that it survives the mean, :math:`\delta \leftarrow s\,\delta`.

    With :math:`s = n` (equal weights, server learning rate one) the new model is the attacker's own, up to the honest
    updates. Together with :class:`LabelFlip` it is a backdoor.

    Args:
        clients: ids of the attackers.
        scale: :math:`s` > 0; the number of clients in a round, usually.

    Example:
        >>> task = ClientTask("a", 0, 0, {}, seed=0)
        >>> ModelReplacement(clients=["a"], scale=10.0).forged({"w": torch.tensor([0.5])}, task)["w"].tolist()
        [5.0]

    References:
        Bagdasaryan et al., *How To Backdoor Federated Learning*, 2020, equation 3.
    """

    def __init__(self, clients: Sequence[ClientId], scale: float) -> None:
        super().__init__(clients)
        self.scale = positive("ModelReplacement", "scale", scale)

    def forged(self, delta: Tree, task: ClientTask) -> Mapping[str, Tensor]:
        return {name: self.scale * tensor for name, tensor in delta.items()}


class NoiseAttack(UpdateAttack):
    r"""The attackers send noise, :math:`\delta \leftarrow \mathcal{N}(0, \text{std}^2)`, or add it to their update.

    Args:
        clients: ids of the attackers.
        std: standard deviation of each coordinate, >= 0.
        add: add the noise to the honest update instead of sending it alone.

    Example:
        >>> task = ClientTask("a", 0, 0, {}, seed=0)
        >>> sent = NoiseAttack(clients=["a"], std=200.0).forged({"w": torch.zeros(1000)}, task)["w"]
        >>> 180 < sent.std() < 220
        tensor(True)

    References:
        Blanchard et al., *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*, 2017, section 6,
        with a standard deviation of 200.
    """

    def __init__(self, clients: Sequence[ClientId], std: float, add: bool = False) -> None:
        super().__init__(clients)
        self.std = non_negative("NoiseAttack", "std", std)
        self.add = add

    def forged(self, delta: Tree, task: ClientTask) -> Mapping[str, Tensor]:
        draw = torch.Generator().manual_seed(seed_for(task.seed, task.round, task.client_id, "noise attack"))
        forged = {}
        for name, tensor in delta.items():
            noise = torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype).to(tensor.device) * self.std
            forged[name] = tensor + noise if self.add else noise
        return forged
