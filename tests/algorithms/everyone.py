"""Every algorithm and every robust rule in every loop, and what one client with one step makes of each."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from algorithm_zoo import ALGORITHMS, Net, clients, weights
from quadratics import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "robust"))

from robust_zoo import RULES

from fl_lightning import FederatedTrainer
from fl_lightning.algorithms import Algorithm
from fl_lightning.algorithms.fltrust import FLTrust
from fl_lightning.algorithms.server_optimizers import ServerAdagrad, ServerAdam, ServerYogi
from fl_lightning.schedules import Sampler

EVERYONE: dict[str, Callable[[], Algorithm]] = {**ALGORITHMS, **RULES}
ASYNCHRONOUS = ("BufferedHeteroFL", "FedAsync", "FedBuff")
ALONE = {  # never in groups, and why
    "AFL": "callback StartPass",
    "APFL": "callback _Mixture",
    "APFL adaptive": "callback _Mixture",
    "Ditto": "several phases",
    "FedAsync": "a round is one client",
    "FedProx adaptive": "callback StartPass",
    "FedRep": "several phases",
    "MimeLite": "callback StartPass",
    "QFedAvg": "callback StartPass",
    "Scaffold I": "callback StartPass",
}
PERSONAL_HEADS = ("FedPer", "FedRep")

LOOPS: dict[str, dict[str, Any]] = {
    "lightning": {"local_loop": "lightning"},
    "lean": {"local_loop": "lean", "group_size": 1},
    "groups": {"local_loop": "lean", "group_size": 4, "num_lanes": 1},  # one lane holds clients enough for a group
}
LR = 0.1


def narrow(client_id: str) -> dict[str, float] | None:
    """Let one client of HeteroFL hold half of the hidden layer."""
    return {"width": 0.5} if client_id == "site-1" else None


def cohort() -> dict[str, DataLoader[Any]]:
    """Return five clients, the fewest that every rule withstands an attacker with."""
    return clients((12, 20, 7, 10, 16))


def some_of(name: str) -> dict[str, int]:
    """Return the argument that draws a part of the clients, if the algorithm is defined for so few."""
    return {} if name in RULES or name in ASYNCHRONOUS else {"clients_per_round": 3}


def train(name: str, module: pl.LightningModule, data: Any = None, rounds: int = 2, **arguments: Any) -> Any:
    """Train by one of everyone, clients by default for an epoch, and return the trainer."""
    pl.seed_everything(5, verbose=False)
    if name in ("BufferedHeteroFL", "HeteroFL"):
        arguments.setdefault("client_overrides", narrow)
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer: FederatedTrainer = quiet_trainer(
        algorithm=arguments.pop("algorithm", None) or EVERYONE[name](), max_rounds=rounds, **arguments
    )
    trainer.fit(module, data if data is not None else cohort(), ckpt_path=ckpt_path)
    return trainer


class Gap(Sampler):
    """Everyone, and nobody in one round."""

    may_draw_nobody = True

    def __init__(self, *empty: int) -> None:
        self.empty = empty

    def cohort(self, population: Any, size: int, seed: int, round: int) -> list[Any]:
        return [] if round in self.empty else list(population.client_ids())


class Seen(pl.Callback):
    """Keeps the weights and what else the server has after each round, and why clients of a lane trained one by one."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Any]] = []
        self.alone: str | None = None
        self.not_lean: str | None = None

    def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        federation = trainer.federated_fit.federation
        self.weights.append(weights(pl_module))
        state = {"algorithm": federation.state, "optimizer": trainer.optimizers[0].state_dict()["state"]}
        self.states.append(copy.deepcopy(state))
        loop = federation.engine.client_half.loop
        self.not_lean = getattr(loop, "reason", "Lightning's own loop")
        together = getattr(loop, "together", None)
        self.alone = None if together is None else together.reason or together.trouble


def assert_same(left: Any, right: Any) -> None:
    """Raise unless nested tensors and primitives are equal, to the bit."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


# ---- one client with one step --------------------------------------------------------------------------------------

Expected = Callable[[Net, Any], Callable[[], None]]
"""From a module and the only batch to a function that does what a round should."""


def plain(module: Net, batch: Any, scale: float = 1.0) -> Callable[[], None]:
    """Centralised training: the module's own optimizer steps once a round."""
    optimizer = torch.optim.SGD(module.parameters(), lr=LR * scale)

    def step() -> None:
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()

    return step


def stepped_by(make: Callable[..., torch.optim.Optimizer]) -> Expected:
    """Centralised training by the server's optimizer, on the client's step as a gradient."""

    def expected(module: Net, batch: Any) -> Callable[[], None]:
        optimizer = make(module.parameters())

        def step() -> None:
            optimizer.zero_grad()
            (LR * module.loss(batch)).backward()
            optimizer.step()

        return step

    return expected


def by_hand(rule: Callable[[list[Tensor], dict[str, Any], float], list[Tensor]]) -> Expected:
    """Centralised gradients, from which a rule makes the step of the round; it may remember something."""

    def expected(module: Net, batch: Any) -> Callable[[], None]:
        kept: dict[str, Any] = {}

        def step() -> None:
            loss = module.loss(batch)
            grads = torch.autograd.grad(loss, list(module.parameters()))
            moves = rule(list(grads), kept, float(loss.detach()))
            for parameter, move in zip(module.parameters(), moves, strict=True):
                parameter.data.add_(move)

        return step

    return expected


def _squared(tensors: list[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors))


def _mimelite(grads: list[Tensor], kept: dict[str, Any], loss: float) -> list[Tensor]:
    """Momentum as an exponential mean, beta = .7: the client's step has the gradient that the server learns as well."""
    old = kept.get("mean", [torch.zeros_like(g) for g in grads])
    kept["mean"] = [0.7 * m + 0.3 * g for m, g in zip(old, grads, strict=True)]
    return [-LR * m for m in kept["mean"]]


def _qfedavg(grads: list[Tensor], kept: dict[str, Any], loss: float) -> list[Tensor]:
    """A step that is shorter by 1 + q L |delta|^2 / F with q = 1.5 and L = 1 / lr."""
    moves = [-LR * g for g in grads]
    shorter = 1 + 1.5 / LR * _squared(moves) / loss
    return [move / shorter for move in moves]


def _feddyn(grads: list[Tensor], kept: dict[str, Any], loss: float) -> list[Tensor]:
    """With alpha = .5: the client steps along g - h and takes alpha delta from h, and the server adds -h / alpha."""
    old = kept.get("h", [torch.zeros_like(g) for g in grads])
    deltas = [-LR * (g - h) for g, h in zip(grads, old, strict=True)]
    kept["h"] = [h - 0.5 * d for h, d in zip(old, deltas, strict=True)]
    return [d - h / 0.5 for d, h in zip(deltas, kept["h"], strict=True)]


def _clipped(grads: list[Tensor], kept: dict[str, Any], loss: float) -> list[Tensor]:
    """The step at no more than .05 in norm."""
    moves = [-LR * g for g in grads]
    return [move * min(1.0, 0.05 / _squared(moves) ** 0.5) for move in moves]


def _alternating(module: Net, batch: Any) -> Callable[[], None]:
    """Three steps of the head, then one of the body."""
    head = torch.optim.SGD(module.head.parameters(), lr=LR)
    body = torch.optim.SGD(module.body.parameters(), lr=LR)

    def step() -> None:
        for optimizer in (head, head, head, body):
            module.zero_grad()
            module.loss(batch).backward()
            optimizer.step()

    return step


ONE_STEP: dict[str, tuple[str, Expected]] = {
    "FedAdagrad": ("server optimizer", stepped_by(partial(ServerAdagrad, beta1=0.0))),
    "FedAdam": ("server optimizer", stepped_by(ServerAdam)),
    "FedAdam of torch": ("server optimizer", stepped_by(partial(torch.optim.Adam, lr=0.01))),
    "FedAsync": ("mixes", partial(plain, scale=0.6)),
    "FedAvgM": ("server optimizer", stepped_by(partial(torch.optim.SGD, lr=0.5, momentum=0.9))),
    "FedDyn": ("memory", by_hand(_feddyn)),
    "FedRep": ("alternates", _alternating),
    "FedYogi": ("server optimizer", stepped_by(ServerYogi)),
    "MimeLite": ("momentum", by_hand(_mimelite)),
    "NormClipping": ("clips", by_hand(_clipped)),
    "QFedAvg": ("shorter", by_hand(_qfedavg)),
}
"""Where one client with one step is no centralised SGD: why in a word, and what it is instead."""


def one_batch(num_clients: int) -> dict[str, DataLoader[Any]]:
    """Return clients that all have the same twenty examples, in one batch."""
    dataset = clients((20,))["site-0"].dataset
    return {f"site-{k}": DataLoader(dataset, batch_size=20) for k in range(num_clients)}


def in_one_step(name: str, num_clients: int) -> Algorithm:
    """Return an algorithm for clients that all have the same data; what FLTrust trusts is the same data, too."""
    return FLTrust(one_batch(1)["site-0"]) if name == "FLTrust" else EVERYONE[name]()


def expected_after(name: str, module: Net, rounds: int) -> dict[str, Tensor]:
    """Return what the parameters are after some rounds of one client with one step."""
    twin = copy.deepcopy(module)
    step = ONE_STEP.get(name, ("", plain))[1](twin, one_batch(1)["site-0"].dataset.tensors)
    for _ in range(rounds):
        step()
    return {n: p.detach() for n, p in twin.named_parameters()}
