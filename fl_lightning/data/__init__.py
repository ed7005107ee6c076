"""Data and who owns them: partitioners, the federated data module, populations, and data sets without a download."""

from fl_lightning.data.datamodule import FederatedDataModule
from fl_lightning.data.loaders import require_batches
from fl_lightning.data.partitioners import IID, Dirichlet, Natural, Partitioner, Quantity, Shards
from fl_lightning.data.picture import partition_figure
from fl_lightning.data.population import ClientPopulation, MappingPopulation, as_population, client_size

__all__ = [
    "IID",
    "ClientPopulation",
    "Dirichlet",
    "FederatedDataModule",
    "MappingPopulation",
    "Natural",
    "Partitioner",
    "Quantity",
    "Shards",
    "as_population",
    "client_size",
    "partition_figure",
    "require_batches",
]
