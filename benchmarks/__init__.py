"""Speed and memory of fl_lightning beside hand-written loops and other libraries: ``python -m benchmarks``."""
