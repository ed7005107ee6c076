"""The networks of the workloads, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

__all__ = ["CharTransformer", "cnn", "logistic", "resnet18_groupnorm", "two_nn"]


def two_nn() -> nn.Module:
    """The "2NN" of McMahan et al. 2017: 199,210 parameters."""
    return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))


def cnn() -> nn.Module:
    """The CNN of McMahan et al. 2017: 1,663,370 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


def logistic() -> nn.Module:
    """610 parameters: the interpreter is all that costs."""
    return nn.Linear(60, 10)


class CharTransformer(nn.Module):
    """Two causal encoder layers over 80 characters, as long as LEAF's Shakespeare lines.

    Shape:
        ``(batch, length)`` of integers to ``(batch, vocabulary, length)``.
    """

    length, vocabulary, width = 80, 90, 64
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.vocabulary, self.width)
        self.place = nn.Parameter(torch.randn(self.length, self.width) * 0.1)
        layer = nn.TransformerEncoderLayer(self.width, 4, 4 * self.width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(self.width, self.vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(self.length), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(text) + self.place, mask=self.mask, is_causal=True)
        logits: Tensor = self.head(hidden)
        return logits.transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(2, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(2, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(2, outputs))

    def forward(self, image: Tensor) -> Tensor:
        hidden = relu(self.first_norm(self.first(image)))
        return relu(self.second_norm(self.second(hidden)) + self.shortcut(image))


def resnet18_groupnorm() -> nn.Module:
    """ResNet-18 for 32 by 32 images with GroupNorm, as Hsieh et al. 2020 recommend: 11,173,962 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(2, 64), nn.ReLU(), *_stages(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def _stages() -> Iterator[nn.Module]:
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        yield _Block(inputs, outputs, stride)
        yield _Block(outputs, outputs, 1)
        inputs = outputs
