"""Federated learning for people who already have a LightningModule."""

from fl_lightning.algorithms import FedAvg
from fl_lightning.data import IID, Dirichlet, FederatedDataModule, Natural, Quantity, Shards
from fl_lightning.trainer import FederatedTrainer
from fl_lightning.types import ClientTask, ClientUpdate, RoundReport

__version__ = "0.1.0"

__all__ = [
    "IID",
    "ClientTask",
    "ClientUpdate",
    "Dirichlet",
    "FedAvg",
    "FederatedDataModule",
    "FederatedTrainer",
    "Natural",
    "Quantity",
    "RoundReport",
    "Shards",
]
