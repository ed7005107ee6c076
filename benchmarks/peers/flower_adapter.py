"""The workloads in Flower's simulation (``flwr[simulation]==1.42``): ``run_simulation`` with Ray, one CPU a client.

The client app holds the training loop that its tutorial shows; the server app is ``FedAvg`` of ``flwr.serverapp``. CPU
seconds are those of this process, of Ray's own processes and of its actors together.
"""

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.contenders import Run, Stopwatch, cpu_of_processes
from benchmarks.peers.adapter import CountingLoss
from benchmarks.program import run_program
from benchmarks.workloads import WORKLOADS, Workload


@cache
def _data(name: str, num_clients: int) -> tuple[Tensor, Tensor]:
    """Return the examples, made once in each of Ray's actors, which live as long as the simulation."""
    workload = WORKLOADS[name]
    return workload.make(num_clients * workload.examples, torch.Generator().manual_seed(0))


def _train(message: Message, context: Context, name: str) -> Message:
    torch.set_num_threads(1)
    workload, loss, client = WORKLOADS[name], CountingLoss(), int(context.node_config["partition-id"])
    inputs, labels = _data(name, int(context.node_config["num-partitions"]))
    part = slice(client * workload.examples, (client + 1) * workload.examples)
    model = workload.model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)
    model.train()
    for batch in DataLoader(TensorDataset(inputs[part], labels[part]), workload.batch_size, shuffle=True):
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    steps, losses, accuracies = loss.sums()
    metrics: dict[str, Any] = {
        "num-examples": workload.examples, "steps": steps, "loss": losses / steps, "acc": accuracies / steps,
    }  # fmt: skip
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


def _counted(run: Run, replies: list[RecordDict], key: str) -> MetricRecord:
    """Note a round's sums; the strategy calls it where it would average the clients' metrics."""
    found = [reply["metrics"] for reply in replies]
    run.steps.append(sum(int(metrics["steps"]) for metrics in found))
    run.losses.append(sum(metrics["loss"] for metrics in found) / len(found))
    run.accuracies.append(sum(metrics["acc"] for metrics in found) / len(found))
    return MetricRecord({"loss": run.losses[-1], "acc": run.accuracies[-1]})


def flower(workload: Workload, rounds: int, processes: int) -> Run:
    run, client_app, server_app = Run(), ClientApp(), ServerApp()
    client_app.train()(partial(_train, name=workload.name))

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        clock: list[Stopwatch] = []

        def lap(server_round: int, arrays: ArrayRecord) -> None:
            if clock:
                clock[0].lap(run)
            else:  # before the first round
                clock.append(Stopwatch(cpu_of_processes))

        strategy = FedAvg(
            fraction_train=0.5 / workload.num_clients,  # the cohort is the least that trains, ...
            min_train_nodes=workload.cohort,
            min_available_nodes=workload.num_clients,  # ... and the first round waits until everyone is there
            fraction_evaluate=0.0,
            train_metrics_aggr_fn=partial(_counted, run),
        )
        arrays = ArrayRecord(workload.model().state_dict())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds, evaluate_fn=lap)

    backend: Any = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": processes, "logging_level": "ERROR", "log_to_driver": False},
    }
    run_simulation(server_app, client_app, workload.num_clients, backend_config=backend)
    return run


if __name__ == "__main__":
    # Ray's actors look the training function up by name, and their `__main__` is another program
    from benchmarks.peers.flower_adapter import flower as importable

    run_program(importable)
