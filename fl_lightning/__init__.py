"""Federated learning for people who already have a LightningModule."""

from fl_lightning.algorithms import (
    AFL,
    APFL,
    BufferedHeteroFL,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAsync,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedDyn,
    FedNova,
    FedPer,
    FedProx,
    FedRep,
    FedYogi,
    HeteroFL,
    MimeLite,
    QFedAvg,
    Scaffold,
)
from fl_lightning.algorithms.fltrust import FLTrust
from fl_lightning.algorithms.robust import (
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
)
from fl_lightning.data import IID, Dirichlet, FederatedDataModule, Natural, Quantity, Shards
from fl_lightning.devices import DeviceFleet
from fl_lightning.personal_models import load_personal_model
from fl_lightning.trainer import FederatedTrainer
from fl_lightning.transforms import ErrorFeedback, Quantize, RandomK, TopK, chain
from fl_lightning.types import ClientTask, ClientUpdate, RoundReport

__version__ = "0.1.0"

__all__ = [
    "AFL",
    "APFL",
    "IID",
    "BufferedHeteroFL",
    "ClientTask",
    "ClientUpdate",
    "CoordinateMedian",
    "DeviceFleet",
    "Dirichlet",
    "Ditto",
    "ErrorFeedback",
    "FLTrust",
    "FedAdagrad",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedDyn",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedYogi",
    "FederatedDataModule",
    "FederatedTrainer",
    "GeometricMedian",
    "HeteroFL",
    "Krum",
    "MimeLite",
    "MultiKrum",
    "Natural",
    "NormClipping",
    "QFedAvg",
    "Quantity",
    "Quantize",
    "RandomK",
    "RoundReport",
    "Scaffold",
    "Shards",
    "TopK",
    "TrimmedMean",
    "chain",
    "load_personal_model",
]
