"""LoRA: a pretrained module stays frozen, and small matrices beside its linear layers learn and travel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fl_lightning.errors import MisconfigurationException

__all__ = ["LoRALinear", "add_lora", "lora", "merge_lora", "merge_lora_state"]

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class LoRALinear(nn.Linear):
    r"""A linear layer with a low-rank correction, :math:`y = W x + b + \frac{\alpha}{r} B A\, \mathrm{dropout}(x)`.

    It takes over the weight and bias of the layer that it replaces, the very same parameters under the same names, so
    that weights of the plain module still load (``strict=False``). :math:`B` starts at zero: nothing changes at first.

    Args:
        base: the layer to replace.
        rank: :math:`r` >= 1.
        alpha: scale :math:`\alpha` > 0.
        dropout: on the input of the correction, in [0, 1).

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``; :math:`A` is ``(rank, in_features)``, :math:`B` is
        ``(out_features, rank)``.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> adapted, x = LoRALinear(layer, rank=2, alpha=4.0), torch.randn(3, 8)
        >>> torch.equal(adapted(x), layer(x)), adapted.weight is layer.weight
        (True, True)

    References:
        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2022, section 4.1.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw a weight that nobody needs
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear and the paper's code do
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:
        low = nn.functional.linear(self.dropout(input), self.lora_a)
        return super().forward(input) + self.scale * nn.functional.linear(low, self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain layer that computes the same."""
        plain = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.weight.device, self.weight.dtype
        )
        plain.weight.copy_(self.weight + self.scale * self.lora_b @ self.lora_a)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain.train(self.training)


def add_lora(
    module: ModuleType,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = ("*",),
    trainable: Sequence[str] = (),
    dropout: float = 0.0,
    freeze_a: bool = False,
) -> ModuleType:
    r"""Freeze a module and give its linear layers low-rank corrections, in place.

    Only parameters that train travel between server and clients, so a round sends :math:`r (d_{in} + d_{out})` numbers
    for a layer instead of :math:`d_{in} d_{out}`; optimizers skip the frozen ones. A server that averages :math:`A` and
    :math:`B` does not average :math:`B A`. With ``freeze_a`` it does: :math:`\sum_k p_k B_k A` is linear in the
    :math:`B_k` (FFA-LoRA), with half of the traffic.

    Models of ``transformers`` can use ``peft`` instead (``get_peft_model`` in the module's ``__init__``): what it
    freezes does not travel either.

    Args:
        module: any module; its ``nn.Linear`` layers can be adapted (subclasses are left alone: some, as in
            ``nn.MultiheadAttention``, are read and never called).
        rank: of the corrections, >= 1.
        alpha: their scale is ``alpha / rank``, > 0.
        targets: name patterns (``fnmatch``) of the layers, ``["encoder.*.query"]`` for example.
        trainable: name patterns of parameters that train as they are, ``["head.*"]`` for example.
        dropout: on the input of the corrections, in [0, 1).
        freeze_a: train :math:`B` only.

    Returns:
        The module itself.

    Raises:
        MisconfigurationException: for values out of range, a pattern that matches nothing, or a module that has
            corrections already.

    Example:
        >>> net = add_lora(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), rank=4, targets=["0"])
        >>> {name: tuple(p.shape) for name, p in net.named_parameters() if p.requires_grad}
        {'0.lora_a': (4, 64), '0.lora_b': (32, 4)}

    References:
        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2022; Sun et al., *Improving LoRA in
        Privacy-preserving Federated Learning*, 2024 (``freeze_a``).
    """
    _check(module, rank, alpha, dropout)
    layers = {name: part for name, part in module.named_modules(remove_duplicate=False) if type(part) is nn.Linear}
    chosen = [name for name in layers if name and any(fnmatchcase(name, pattern) for pattern in targets)]
    _require_matches("targets", targets, layers, "linear layer")
    names = [name for name, _ in module.named_parameters()]
    _require_matches("trainable", trainable, names, "parameter")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trainable))
    adapted: dict[int, LoRALinear] = {}  # a layer that stands in two places stays one layer
    for name in chosen:
        layer = layers[name]
        if id(layer) not in adapted:
            adapted[id(layer)] = LoRALinear(layer, rank, alpha, dropout)
            adapted[id(layer)].lora_a.requires_grad_(not freeze_a)
        _replace(module, name, adapted[id(layer)])
    return module


def merge_lora(module: ModuleType) -> ModuleType:
    """Fold the corrections into the weights, in place: the module is plain again, computes the same, and trains whole.

    Returns:
        The module itself.

    Example:
        >>> net = merge_lora(add_lora(nn.Sequential(nn.Linear(4, 2)), rank=1))
        >>> type(net[0]).__name__, all(p.requires_grad for p in net.parameters())
        ('Linear', True)
    """
    merged: dict[int, nn.Linear] = {}
    for name, part in list(module.named_modules(remove_duplicate=False)):
        if isinstance(part, LoRALinear):
            merged.setdefault(id(part), part.merged())
            _replace(module, name, merged[id(part)])
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


@torch.no_grad()
def merge_lora_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Make a module's state, in place, that of the plain module which computes the same; the module stays.

    Example:
        >>> net = add_lora(nn.Sequential(nn.Linear(4, 2)), rank=1)
        >>> state = net.state_dict()
        >>> merge_lora_state(net, state)
        >>> nn.Sequential(nn.Linear(4, 2)).load_state_dict(state)
        <All keys matched successfully>
    """
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, LoRALinear):
            prefix = f"{name}." if name else ""
            state[f"{prefix}weight"] = part.merged().weight.detach()
            del state[f"{prefix}lora_a"], state[f"{prefix}lora_b"]


def lora(
    module: LightningModule,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = ("*",),
    trainable: Sequence[str] = (),
    dropout: float = 0.0,
    freeze_a: bool = False,
    weights: str | None = None,
) -> LightningModule:
    """Return a LightningModule with pretrained weights and corrections, for a configuration file.

    It is a ``class_path`` like that of a module::

        model:
          class_path: fl_lightning.models.adapters.lora
          init_args:
            module: {class_path: my_project.MyModule}
            rank: 4

    Args:
        module: any LightningModule.
        rank, alpha, targets, trainable, dropout, freeze_a: as in :func:`add_lora`.
        weights: a checkpoint of the plain module, loaded first; ``None`` starts from the module as it is.

    Raises:
        MisconfigurationException: as in :func:`add_lora`.

    Example:
        >>> from fl_lightning.models import DigitsClassifier
        >>> module = lora(DigitsClassifier(), rank=2)
        >>> type(module).__name__, sum(p.numel() for p in module.parameters() if p.requires_grad)
        ('DigitsClassifier', 404)
    """
    if weights is not None:
        checkpoint: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)
        module.load_state_dict(checkpoint["state_dict"])
    return add_lora(module, rank, alpha, targets, trainable, dropout, freeze_a)


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)


def _check(module: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise MisconfigurationException(f"LoRA expected rank to be an integer >= 1, got {rank!r}.")
    if not alpha > 0:
        raise MisconfigurationException(f"LoRA expected alpha to be > 0, got {alpha!r}; alpha=rank is a scale of 1.")
    if not 0 <= dropout < 1:
        raise MisconfigurationException(f"LoRA expected dropout to be in [0, 1), got {dropout!r}.")
    found = next((name for name, part in module.named_modules() if isinstance(part, LoRALinear)), None)
    if found is not None:
        raise MisconfigurationException(
            f"{type(module).__name__} has low-rank corrections already (in {found!r}). Fold them in first by "
            "merge_lora(module)."
        )


def _require_matches(argument: str, patterns: Sequence[str], names: Any, what: str) -> None:
    names = [name for name in names if name]
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if isinstance(patterns, str) or not any(fnmatchcase(name, pattern) for name in names):
            raise MisconfigurationException(
                f"LoRA expected {argument} to be a list of patterns that match a {what} each, got {pattern!r}. There "
                f"are {', '.join(names[:6]) or 'none'}{', ...' if len(names) > 6 else ''}."
            )
