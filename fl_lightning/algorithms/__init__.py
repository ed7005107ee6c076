"""Federated algorithms: one file each, both halves in it."""

from fl_lightning.algorithms.base import Algorithm
from fl_lightning.algorithms.fedavg import FedAvg

__all__ = ["Algorithm", "FedAvg"]
