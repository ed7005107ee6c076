"""Trains every algorithm for three rounds on the processes that ``torchrun`` started, and saves the weights.

Of algorithms that leave clients a model or layers of their own it also saves what these are worth: the metrics of all
clients, which live in the memory of the process that trained them last.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parent))

from algorithm_zoo import ALGORITHMS, WITH_OWN_MODELS, Judged, Net, Normalised, Sites, clients, drawn, weights
from everyone import Gap, train
from quadratics import quiet_trainer

from fl_lightning.schedules import PowerOfChoiceSampler

if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    results = {}
    for name, make in ALGORITHMS.items():
        pl.seed_everything(5, verbose=False)
        trainer = quiet_trainer(
            algorithm=make(), max_rounds=3, devices=processes, strategy="ddp", local_epochs=2, **drawn(name, 4)
        )
        module = Net()
        trainer.fit(module, clients((12, 20, 7, 9, 16)))
        results[name] = weights(module)
    for name in WITH_OWN_MODELS:
        pl.seed_everything(5, verbose=False)
        trainer = quiet_trainer(
            algorithm=ALGORITHMS[name](), max_rounds=3, devices=processes, strategy="ddp", evaluate_clients=True,
            clients_per_round=2,
        )  # fmt: skip
        trainer.fit(Judged(), Sites(shuffle=True))
        metrics = trainer.round_history[-1].metrics
        results[f"{name}: own models"] = {k: torch.tensor(v) for k, v in metrics.items() if k.startswith("clients/")}
    pl.seed_everything(5, verbose=False)
    trainer = quiet_trainer(
        max_rounds=3, devices=processes, strategy="ddp", clients_per_round=2, batch_norm="recalibrate",
        sampler=PowerOfChoiceSampler(4),
    )  # fmt: skip
    trainer.fit(module := Normalised(), clients((12, 20, 7, 10, 16)))  # no batch of one, which BatchNorm refuses
    told = [[r.num_bytes_down, r.num_bytes_up, *sorted(int(c[-1]) for c in r.cohort)] for r in trainer.round_history]
    results["power of choice"] = {**weights(module), "reports": torch.tensor(told)}
    for name in ("FedAdam", "FLTrust"):  # one that sums and one that sees every update, with rounds without clients
        torch.manual_seed(0)
        module = Net()
        trainer = train(name, module, rounds=4, sampler=Gap(0, 2), devices=processes, strategy="ddp")
        sizes = torch.tensor([len(report.cohort) for report in trainer.round_history])
        results[f"{name}: empty rounds"] = {**weights(module), "sizes": sizes}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[1])
