"""Wrong combinations say what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from algorithm_zoo import ALGORITHMS, Net, clients
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel, RandomDataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quadratics import quiet_trainer
from torch.utils.data import DataLoader

from fl_lightning.algorithms import (
    APFL,
    Algorithm,
    FedAsync,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedDyn,
    FedNova,
    FedPer,
    FedProx,
    FedRep,
    MimeLite,
    QFedAvg,
    Scaffold,
)
from fl_lightning.callbacks import ProximalTerm
from fl_lightning.types import ClientTask, ClientUpdate


class WithAdam(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class TwoRates(Net):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.body.parameters(), "lr": 0.1}, {"params": self.head.parameters(), "lr": 0.2}]
        return torch.optim.SGD(groups)


class Climbs(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, maximize=True)


ADAM = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])


def run(algorithm: Algorithm, module: Any, rounds: int = 1, data: Any = None, **arguments: Any) -> None:
    trainer = quiet_trainer(algorithm=algorithm, max_rounds=rounds, **arguments)
    trainer.fit(module, data if data is not None else clients())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedProx(mu=-0.1), r"FedProx expected mu to be a finite number >= 0, got -0.1; mu=0 is FedAvg\."),
        (lambda: FedProx(mu=True), "FedProx expected mu to be a finite number >= 0, got True"),
        (lambda: FedNova(mu=float("inf")), "FedNova expected mu to be a finite number >= 0, got inf"),
        (lambda: FedNova(normalizer="tau"), "expected normalizer='gradients'.*got 'tau'"),
        (lambda: FedDyn(alpha=0.0), r"FedDyn expected alpha to be a finite number > 0, got 0.0; .*FedAvg\(weights="),
        (lambda: MimeLite(momentum=1.0), r"MimeLite expected momentum to be a number in \[0, 1\), got 1.0"),
        (lambda: Scaffold("III"), "Scaffold expected option='I'.*or option='II', got 'III'"),
        (lambda: FedAvg(weights="sizes"), "weights='examples', 'uniform' or a callable.*got 'sizes'"),
        (lambda: FedProx(adaptive="no"), "FedProx expected adaptive to be True or False, got 'no'"),
        (lambda: APFL("a"), r"APFL expected alpha in \(0, 1\], got 'a'"),
        (lambda: FedPer(None), r"FedPer expected patterns.*got None. Write FedPer\(\['head"),
        (lambda: FedRep([3]), r"FedRep expected patterns.*got \[3\]. Write FedRep\(\['head"),
        (lambda: FedPer([]), "FedPer expected patterns.*got none. Write FedPer"),
        (lambda: APFL(adaptive=1), "APFL expected adaptive to be True or False, got 1"),
        (
            lambda: FedAvg("adam"),
            r"server_optimizer to be a function.*got 'adam'. Write server_optimizer=lambda",
        ),
        (lambda: FedNova(server_optimizer=ADAM), r"server_optimizer to be a function that makes one.*got Adam"),
        (lambda: FedAvgM(server_lr_scheduler="cosine"), "server_lr_scheduler to be a function.*lambda optimizer"),
    ],
)
def test_values_out_of_range_are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (WithAdam, "the optimizer is Adam"),
        (TwoRates, "parameter groups differ"),
        (Climbs, r"the optimizer climbs \(maximize=True\)"),
    ],
)
def test_scaffold_says_what_it_is_defined_for(option: Any, module: Any, reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"Scaffold is not defined.*{reason}.*one torch.optim.SGD"):
        run(Scaffold(option), module())


@pytest.mark.parametrize("loop", ["auto", "lightning"])
@pytest.mark.parametrize("algorithm", [MimeLite(0.5), APFL(0.5)], ids=lambda algorithm: type(algorithm).__name__)
def test_mimelite_and_apfl_are_for_sgd(algorithm: Algorithm, loop: Any) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"{type(algorithm).__name__} is defined for.*SGD.*returns Adam"
    ):
        run(algorithm, WithAdam(), local_loop=loop)
    run(algorithm, Net(), local_loop=loop)


def test_a_kept_momentum_is_no_gradient_of_this_round() -> None:
    with pytest.raises(MisconfigurationException, match=r"client_state='keep'.*started anew in each round"):
        run(Scaffold(), Net(momentum=0.9), rounds=2, client_state="keep")
    run(Scaffold(), Net(), rounds=2, client_state="keep")  # without momentum nothing is kept


def test_fednova_says_what_it_is_defined_for() -> None:
    with pytest.raises(MisconfigurationException, match=r"the optimizer is Adam.*FedNova\(normalizer='steps'\)"):
        run(FedNova(), WithAdam())
    run(FedNova(normalizer="steps"), WithAdam())


@pytest.mark.parametrize("loop", ["lean", "lightning"])
def test_fednova_and_scaffold_refuse_a_proximal_term_that_they_do_not_know_of(loop: Any) -> None:
    advice: dict[Algorithm, str] = {
        FedNova(): r"Write FedNova\(mu=2.0\) and leave the ProximalTerm out of client_callbacks\.$",
        Scaffold(): r"wrong. Scaffold is not defined with a proximal term: leave it out.*FedProx\(mu=2.0\)\.$",
        QFedAvg(): r"wrong. Leave it out of client_callbacks: QFedAvg is defined for plain gradients\.$",
    }
    for algorithm, instead in advice.items():
        with pytest.raises(MisconfigurationException, match=r"counts for mu=0.0.*" + instead):
            run(algorithm, Net(), client_callbacks=[ProximalTerm(2.0)], local_loop=loop)


def test_fednova_refuses_a_client_that_took_no_step() -> None:
    update = ClientUpdate("a", {"w": torch.zeros(1)}, {}, num_examples=3, num_steps=0)
    with pytest.raises(MisconfigurationException, match=r"client 'a' took no optimizer step.*more local epochs"):
        FedNova().contribute(update, ClientTask("a", 0, 0, {}, seed=0), {})


@pytest.mark.parametrize("name", ["MimeLite", "Scaffold I", "QFedAvg", "AFL", "FedProx adaptive"])
def test_a_start_pass_needs_automatic_optimization(name: str) -> None:
    data = {"a": DataLoader(RandomDataset(32, 8), batch_size=4)}
    with pytest.raises(MisconfigurationException, match="with manual optimization training_step steps by itself"):
        run(ALGORITHMS[name](), ManualOptimBoringModel(), data=data)


@pytest.mark.parametrize("name", ["FedProx", "FedNova", "Scaffold II", "FedDyn"])
def test_the_others_train_with_manual_optimization(name: str) -> None:
    data = {"a": DataLoader(RandomDataset(32, 8), batch_size=4)}
    run(ALGORITHMS[name](), ManualOptimBoringModel(), rounds=2, data=data)


@pytest.mark.parametrize("name", ["Scaffold II", "FedDyn", "MimeLite", "FedProx"])
def test_an_algorithms_own_correction_may_not_be_doubled(name: str) -> None:
    own: Callback = ALGORITHMS[name]().client_callbacks()[0]
    with pytest.raises(MisconfigurationException, match=r"would correct every gradient twice.*Leave out the one"):
        run(ALGORITHMS[name](), Net(), client_callbacks=[own])


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"weights to return a finite number >= 0, got -1.0"):
        run(FedAvg(weights=lambda update: -1.0), Net())
    zero = r"Expected a positive sum of client weights, got 0.0. The callable that was given as weights returned 0 for"
    with pytest.raises(MisconfigurationException, match=zero):
        run(FedAvg(weights=lambda update: 0.0), Net())


def broken(staleness: int) -> Any:
    raise KeyError(staleness)


def text(staleness: int) -> Any:
    return "0.5"


@pytest.mark.parametrize("kind", [FedBuff, FedAsync])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (text, r"\(staleness=text\) expected to return a finite number >= 0 at 0 rounds for client .*, got '0\.5'"),
        (broken, r"\(staleness=broken\) raised KeyError\(0\) at 0 rounds for client"),
        (
            lambda age: None,
            r"\(staleness=<lambda>\) expected to return a finite number >= 0 .* for client .*, got None",
        ),
        (
            lambda age: -1.0,
            r"\(staleness=<lambda>\) expected to return a finite number >= 0 .* for client .*, got -1\.0",
        ),
    ],
)
def test_a_staleness_function_without_a_number_names_itself_and_the_client(
    kind: Any, function: Any, message: str
) -> None:
    buffer = {"buffer_size": 1} if kind is FedBuff else {}
    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__}{message}"):
        run(kind(staleness=function, concurrency=1, **buffer), Net())
