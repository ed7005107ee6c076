"""Programs that run a workload in another library, each started by the Python of that library's own environment."""
