"""What a round costs beside its clients, and a client beside its training."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from statistics import median
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset

from benchmarks.contenders import Run
from benchmarks.ours import Clients, Module, federation, silence
from benchmarks.scale.federations import QUIET, Classifier, Same, Samples, TimedEngine, fit, fit_plain
from benchmarks.workloads import WORKLOADS

__all__ = ["client", "evaluation", "outer", "workers"]


def evaluation(num_clients: int) -> dict[str, float]:
    """What ``evaluate_clients=True`` adds to a round."""
    found = []
    for evaluate in (False, True):
        samples = Samples()
        with TemporaryDirectory() as folder:
            fit(
                Same(num_clients, 50, 60), Classifier(nn.Linear(60, 10), 0.1), folder, max_rounds=5,
                clients_per_round=10, evaluate_clients=evaluate, callbacks=[samples], logger=False,
            )  # fmt: skip
        found.append(median(samples.cpu[2:]))
    return {"clients": num_clients, "cpu_ms_a_client": 1e3 * (found[1] - found[0]) / num_clients}


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """A data set that gives one example after the other, as most do."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.inputs[place], self.labels[place]


def workers(num_workers: int, num_clients: int = 2) -> dict[str, float]:
    """Clients a second by the worker processes of their loaders (W1's data and model).

    Tensors are indexed without the loader, so its workers never start; any other data set goes through them.
    """
    workload = replace(WORKLOADS["W1"], num_clients=10 * num_clients, cohort=num_clients)
    found: dict[str, float] = {"workers": num_workers}
    silence()
    for name, data_set in (("tensors", TensorDataset), ("examples", Examples)):
        run = Run()
        with TemporaryDirectory() as folder:
            trainer = federation(workload, 3, run, folder)
            trainer.fit(Module(workload.model(), workload.lr), datamodule=Clients(workload, num_workers, data_set))
        found[f"{name}_clients_a_second"] = num_clients / median(run.wall[1:])
    return found


def outer(count: int) -> dict[str, float]:
    """Milliseconds of a round with TensorBoard and the default checkpoint without those of its one client.

    Beside them stand those of an epoch of one step in Lightning's own Trainer, with the same logger and checkpoints.
    """
    engine, samples, inside = TimedEngine(), Samples(), [0.0]

    class Inside(Samples):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            inside.append(engine.cpu)

    data, module = Same(1, 10, 60), Module(nn.Linear(60, 10), 0.1)
    with TemporaryDirectory() as folder:
        fit(data, module, folder, max_rounds=count, callbacks=[samples, Inside()], engine=engine)
    plain = Samples()
    with TemporaryDirectory() as folder:
        arguments = {"max_epochs": count, "callbacks": [plain], "log_every_n_steps": 1}
        fit_plain(data.client_dataloader(0), module, folder, **arguments)
    clients = [after - before for before, after in pairwise(inside[1:])]
    outside = [whole - own for whole, own in zip(samples.cpu[1:], clients, strict=True)]
    half = count // 2
    return {
        "rounds": count, "outer_cpu_ms": 1e3 * median(outside[half:]), **samples.round_ms(half),
        "plain_epoch_cpu_ms": plain.round_ms(half)["round_cpu_ms"],
    }  # fmt: skip


class Logs(pl.LightningModule):
    """A linear layer with one ``self.log``, or none."""

    def __init__(self, logs: bool) -> None:
        super().__init__()
        self.network = nn.Linear(60, 10)
        self.logs = logs

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.network(batch[0]), batch[1])
        if self.logs:
            self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _plain(data: Same, module: Logs, rounds: int) -> list[float]:
    """The loop that one writes by hand, without logging; CPU seconds of each round."""
    network, seconds = module.network, []
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(rounds):
        begin = time.process_time()
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for client_id in data.client_ids():
            network.load_state_dict(weights)
            optimizer = torch.optim.SGD(network.parameters(), 0.1)
            for inputs, labels in data.client_dataloader(client_id):
                optimizer.zero_grad()
                cross_entropy(network(inputs), labels).backward()
                optimizer.step()
            for name, value in network.state_dict().items():
                total[name] += value - weights[name]
        weights = {name: value + total[name] / len(data.ids) for name, value in weights.items()}
        seconds.append(time.process_time() - begin)
    return seconds


def _ours(data: Same, module: Logs, rounds: int, loop: str) -> list[float]:
    samples = Samples()
    with TemporaryDirectory() as folder:
        fit(data, module, folder, max_rounds=rounds + 1, local_loop=loop, group_size=1, callbacks=[samples], **QUIET)
    return samples.cpu[1:]


def client(num_clients: int, turns: int = 3, rounds: int = 4, few: int = 2, many: int = 22) -> dict[str, float]:
    """CPU microseconds that a loop costs over a plain one, as a fixed part a client and a part a step.

    Every turn runs all loops with few and with many steps; the line through the two is the cost, and the median over
    turns of the difference to the plain loop of the same turn is reported. The outer round is part of the fixed cost.
    """
    cases: dict[tuple[str, bool], list[list[float]]] = {
        (loop, logs): [] for loop in ("lightning", "lean") for logs in (False, True)
    }
    plain_lines = []
    for _ in range(turns):
        lines = {}
        for case in [("plain", False), *cases]:
            loop, logs = case
            seconds = []
            for steps in (few, many):
                data, module = Same(num_clients, 10 * steps, 60), Logs(logs)
                own = _plain(data, module, rounds) if loop == "plain" else _ours(data, module, rounds, loop)
                seconds.append(min(own[1:]) / num_clients)
            step = (seconds[1] - seconds[0]) / (many - few)
            lines[case] = (seconds[0] - few * step, step)
        base = lines.pop(("plain", False))
        plain_lines.append(base)
        for case, line in lines.items():
            cases[case].append([1e6 * (own - plain) for own, plain in zip(line, base, strict=True)])
    fixed, step = (1e6 * median(part) for part in zip(*plain_lines, strict=True))
    found: dict[str, float] = {"clients": num_clients, "plain_us_a_client": fixed, "plain_us_a_step": step}
    for (loop, logs), differences in cases.items():
        name = f"{loop}{'_with_log' if logs else ''}"
        found[f"{name}_us_a_client"] = median(fixed for fixed, _ in differences)
        found[f"{name}_us_a_step"] = median(step for _, step in differences)
    return found
