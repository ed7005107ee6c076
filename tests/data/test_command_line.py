"""The command line builds partitioners and data modules from class_path and init_args."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from fl_lightning.data import FederatedDataModule


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("IID", {"num_clients": 4}),
        ("Dirichlet", {"num_clients": 10, "alpha": 0.3, "min_size": 5}),
        ("Shards", {"num_clients": 10, "per_client": 3}),
        ("Quantity", {"num_clients": 10, "exponent": 1.0, "seed": 7}),
        ("Natural", {"key": "site"}),
    ],
)
def test_partitioners_from_a_config(name: str, arguments: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    config = {
        "class_path": "fl_lightning.data.FederatedDataModule",
        "init_args": {
            "datamodule": {"class_path": "fl_lightning.data.DigitsDataModule", "init_args": {"batch_size": 5}},
            "partitioner": {"class_path": f"fl_lightning.data.{name}", "init_args": arguments},
            "client_val_fraction": 0.25,
        },
    }
    data = parser.instantiate(parser.parse_object({"data": config})).data
    assert isinstance(data, FederatedDataModule)
    assert type(data.partitioner).__name__ == name
    assert {key: getattr(data.partitioner, key) for key in arguments} == arguments
    assert data.datamodule.batch_size == 5
    assert data.client_val_fraction == 0.25
