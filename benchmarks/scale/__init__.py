"""What must not grow, and what rounds and clients cost beside their training: ``python -m benchmarks.scale``."""
