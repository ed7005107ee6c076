"""How a data set is cut into clients: one law a file, each pure in its seed."""

from fl_lightning.data.partitioners.base import Partitioner
from fl_lightning.data.partitioners.dirichlet import Dirichlet
from fl_lightning.data.partitioners.iid import IID
from fl_lightning.data.partitioners.natural import Natural
from fl_lightning.data.partitioners.quantity import Quantity
from fl_lightning.data.partitioners.shards import Shards

__all__ = ["IID", "Dirichlet", "Natural", "Partitioner", "Quantity", "Shards"]
