"""Federated learning for people who already have a LightningModule."""

__version__ = "0.1.0"
