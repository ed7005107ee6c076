"""What travels between server and clients, what stays with a client, and what never changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from fl_lightning.algorithms.base import Algorithm

__all__ = ["BatchNormPolicy", "Traveling", "batch_norm_buffers", "batch_norm_parameters"]

BatchNormPolicy: TypeAlias = Literal["average", "local", "recalibrate"]


@dataclass(frozen=True, slots=True)
class Traveling:
    """Names, sorted into what travels and what does not.

    Args:
        parameters: trainable parameters that are sent and averaged; tied weights once.
        buffers: running statistics that are sent and averaged.
        local: parameters and buffers that stay with their client.
    """

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    local: tuple[str, ...]

    @classmethod
    def of(cls, module: pl.LightningModule, algorithm: Algorithm, batch_norm: BatchNormPolicy) -> Traveling:
        """Sort the tensors of a module.

        Raises:
            MisconfigurationException: for parameters without a shape yet, or a module with nothing to train.
        """
        user_class = getattr(module, "_user_class", type(module)).__name__
        for name, parameter in module.named_parameters():
            if is_lazy(parameter):
                raise MisconfigurationException(
                    f"Parameter {name!r} of {user_class} has no shape yet. Run one batch through the module "
                    "before fit, so that the server has weights to send."
                )
        trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        local = set(algorithm.local_parameters(module))
        statistics = batch_norm_buffers(module)
        if batch_norm == "local":
            local |= batch_norm_parameters(module) | set(statistics)
        traveling = tuple(name for name in trainable if name not in local)
        if not traveling:
            raise MisconfigurationException(
                f"{user_class} has no trainable parameter that travels to the clients. Unfreeze some "
                "(requires_grad=True), or keep fewer of them local."
            )
        buffers = tuple(name for name in statistics if batch_norm == "average" and name not in local)
        known = [*trainable, *(name for name, _ in module.named_buffers())]
        return cls(traveling, buffers, tuple(name for name in known if name in local))

    def static(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the values that neither travel nor stay with a client: frozen parameters and other buffers."""
        moving = {*self.parameters, *self.buffers}
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {name: tensor.detach() for name, tensor in tensors.items() if name not in moving}


def batch_norm_buffers(module: nn.Module) -> list[str]:
    """Return the names of running statistics, found by the type of their module."""
    return [
        _joined(prefix, name)
        for prefix, part in module.named_modules()
        if isinstance(part, _NormBase)
        for name, _ in part.named_buffers(recurse=False)
    ]


def batch_norm_parameters(module: nn.Module) -> set[str]:
    """Return the names of scales and shifts of BatchNorm layers."""
    return {
        _joined(prefix, name)
        for prefix, part in module.named_modules()
        if isinstance(part, _NormBase)
        for name, _ in part.named_parameters(recurse=False)
    }


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
