"""Federated learning for people who already have a LightningModule."""

from fl_lightning.algorithms import (
    AFL,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FedNova,
    FedPer,
    FedProx,
    FedYogi,
    MimeLite,
    QFedAvg,
    Scaffold,
)
from fl_lightning.data import IID, Dirichlet, FederatedDataModule, Natural, Quantity, Shards
from fl_lightning.devices import DeviceFleet
from fl_lightning.trainer import FederatedTrainer
from fl_lightning.transforms import ErrorFeedback, Quantize, RandomK, TopK, chain
from fl_lightning.types import ClientTask, ClientUpdate, RoundReport

__version__ = "0.1.0"

__all__ = [
    "AFL",
    "IID",
    "ClientTask",
    "ClientUpdate",
    "DeviceFleet",
    "Dirichlet",
    "Ditto",
    "ErrorFeedback",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedDyn",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedYogi",
    "FederatedDataModule",
    "FederatedTrainer",
    "MimeLite",
    "Natural",
    "QFedAvg",
    "Quantity",
    "Quantize",
    "RandomK",
    "RoundReport",
    "Scaffold",
    "Shards",
    "TopK",
    "chain",
]
