"""Data and who owns them: partitioners, the federated data module, populations, and data sets without a download."""

from fl_lightning.data.datamodule import FederatedDataModule
from fl_lightning.data.digits import DigitsDataModule
from fl_lightning.data.heart import HeartDiseaseDataModule
from fl_lightning.data.loaders import require_batches
from fl_lightning.data.loans import LoansDataModule
from fl_lightning.data.mnist import MNISTDataModule
from fl_lightning.data.partitioners import IID, Dirichlet, Natural, Partitioner, Quantity, Shards
from fl_lightning.data.picture import partition_figure
from fl_lightning.data.population import ClientPopulation, MappingPopulation, as_population, client_size
from fl_lightning.data.shakespeare import ShakespeareDataModule

__all__ = [
    "IID",
    "ClientPopulation",
    "DigitsDataModule",
    "Dirichlet",
    "FederatedDataModule",
    "HeartDiseaseDataModule",
    "LoansDataModule",
    "MNISTDataModule",
    "MappingPopulation",
    "Natural",
    "Partitioner",
    "Quantity",
    "ShakespeareDataModule",
    "Shards",
    "as_population",
    "client_size",
    "partition_figure",
    "require_batches",
]
