"""Published results, reproduced through ``FederatedTrainer``: ``python -m benchmarks.papers``."""
