"""Federated algorithms: one file each, both halves in it."""

from fl_lightning.algorithms.afl import AFL
from fl_lightning.algorithms.apfl import APFL
from fl_lightning.algorithms.base import Algorithm
from fl_lightning.algorithms.bufferedheterofl import BufferedHeteroFL
from fl_lightning.algorithms.fedasync import FedAsync
from fl_lightning.algorithms.fedavg import FedAvg
from fl_lightning.algorithms.fedbuff import FedBuff
from fl_lightning.algorithms.feddyn import FedDyn
from fl_lightning.algorithms.fednova import FedNova
from fl_lightning.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fl_lightning.algorithms.fedprox import FedProx
from fl_lightning.algorithms.fedrep import FedRep
from fl_lightning.algorithms.heterofl import HeteroFL
from fl_lightning.algorithms.mimelite import MimeLite
from fl_lightning.algorithms.personal import Ditto, FedPer
from fl_lightning.algorithms.qfedavg import QFedAvg
from fl_lightning.algorithms.scaffold import Scaffold

__all__ = [
    "AFL",
    "APFL",
    "Algorithm",
    "BufferedHeteroFL",
    "Ditto",
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
    "HeteroFL",
    "MimeLite",
    "QFedAvg",
    "Scaffold",
]
