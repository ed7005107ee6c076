"""Wrong values and cohorts that are too small say what to do instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from robust_zoo import Net, clients, cohort_of, joined, quiet_trainer, root, train

from fl_lightning.algorithms import FedAvg, FedBuff, Scaffold
from fl_lightning.algorithms.fltrust import FLTrust
from fl_lightning.algorithms.robust import (
    ALittleIsEnough,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
)
from fl_lightning.callbacks.attacks import LabelFlip, LittleIsEnough, SignFlip
from fl_lightning.transforms import RandomK
from fl_lightning.types import ClientTask


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoordinateMedian(-1), "expected f to be an integer >= 0, got -1"),
        (lambda: TrimmedMean(), "one of fraction and f, got fraction=None and f=None"),
        (lambda: TrimmedMean(0.1, 1), "one of fraction and f, got fraction=0.1 and f=1"),
        (lambda: TrimmedMean("a"), r"fraction to be in \[0, 0.5\), got 'a'"),
        (lambda: TrimmedMean(0.5), r"fraction to be in \[0, 0.5\), got 0.5"),
        (lambda: GeometricMedian(smoothing=0.0), "smoothing to be a finite number > 0"),
        (lambda: GeometricMedian(max_iterations=0), "max_iterations to be an integer >= 1, got 0"),
        (lambda: MultiKrum(1, 0), "expected m to be an integer >= 1, got 0"),
        (lambda: NormClipping(0.0), "max_norm to be a finite number > 0"),
        (lambda: FLTrust(root(), num_examples=25).root_data(), "at least num_examples=25 examples, got 24"),
        (lambda: FLTrust(lambda: None).root_data(), "root data as a train loader.*got NoneType"),
        (lambda: ALittleIsEnough(FedAvg(), []), r"list of the attackers' ids, got \[\]"),
        (lambda: ALittleIsEnough(FedAvg(), "site-1"), "list of the attackers' ids, got 'site-1'"),
        (lambda: ALittleIsEnough(FedAvg(), ["a"], z=float("nan")), "z to be a finite number, got nan; None takes the"),
        (lambda: ALittleIsEnough(FedAvg, ["a"]), r"the algorithm that is attacked, such as FedAvg\(\), got <class"),
        (lambda: ALittleIsEnough(FedBuff(2), ["a"]), r"those of FedBuff arrive one by one.*FedAvg\(\)"),
        (lambda: LittleIsEnough(["a"], z=float("inf")), "LittleIsEnough expected z to be a finite number, got inf"),
        (lambda: LittleIsEnough(["a"], omniscient="no"), "omniscient to be True or False, got 'no'"),
        (
            lambda: quiet_trainer(algorithm=CoordinateMedian(), transforms=[RandomK(0.5, shared=True)]),
            r"RandomK.* is decoded on the sum of a round, and CoordinateMedian combines .*linear = False.*shared=False",
        ),
        (
            lambda: quiet_trainer(client_callbacks=[LittleIsEnough(["a"])], transforms=[RandomK(0.5, shared=True)]),
            "is decoded on the sum of a round, and ALittleIsEnough combines",
        ),
        (
            lambda: quiet_trainer(algorithm=FedBuff(2), transforms=[RandomK(0.5, shared=True)]),
            "is decoded on the sum of a round, and FedBuff looks at when each arrived",
        ),
        (lambda: SignFlip([]), r"list of the attackers' ids, got \[\]"),
        (lambda: SignFlip("site-1"), "list of the attackers' ids, got 'site-1'"),
        (lambda: LabelFlip(["a"]), "num_classes >= 2 or a mapping"),
    ],
)
def test_values_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (CoordinateMedian(3), r"f=3 .*f < n/2.*at least 7 clients, got 5.*clients_per_round=7.*smaller f"),
        (TrimmedMean(f=3), r"at least 7 clients, got 5"),
        (TrimmedMean(0.1), r"trims nobody of so few.*at least 10 clients, got 5.*larger fraction"),
        (GeometricMedian(3), r"at least 7 clients, got 5"),
        (Krum(2), r"f=2 needs 2 f \+ 3 clients: expected a cohort of at least 7 clients, got 5"),
        (MultiKrum(1, 3), r"m=3 needs.*at least 6 clients, got 5"),
    ],
)
def test_a_cohort_that_is_too_small(rule: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        train(rule, Net())


@pytest.mark.parametrize("count", [49, 93, 98, 161])
def test_a_fraction_of_one_client_trims_one(count: int) -> None:
    """``1 / n * n`` is a bit less than one in floating-point numbers for some of them."""
    rule = TrimmedMean(1 / count)
    assert rule.fewest_clients == count
    numbers = np.arange(count * 7.0).reshape(count, 7)
    numbers[0], numbers[-1] = -1e9, 1e9
    expected = numbers[1:-1].mean(axis=0)
    assert np.allclose(joined(rule.aggregate(cohort_of(numbers))), expected, rtol=1e-14)
    with pytest.raises(MisconfigurationException, match=f"trims nobody of so few.*at least {count}"):
        rule.check_cohort(count - 1)


def test_a_fraction_just_below_one_half_leaves_the_middle() -> None:
    numbers = np.arange(70.0).reshape(10, 7)
    kept = joined(TrimmedMean(0.4999999999999999).aggregate(cohort_of(numbers)))
    assert np.allclose(kept, numbers[4:6].mean(axis=0))


def test_an_attack_on_what_it_does_not_know() -> None:
    with pytest.raises(MisconfigurationException, match="those of Scaffold contribute"):
        train(ALittleIsEnough(Scaffold(), ["site-1"]), Net())


@pytest.mark.parametrize(
    "arguments",
    [{"client_callbacks": [SignFlip(["site-1", 1])]}, {"algorithm": ALittleIsEnough(FedAvg(), ["site-1", 1], z=1.0)}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_attackers_that_do_not_exist_are_named(arguments: Any) -> None:
    settings = {"algorithm": FedAvg(), **arguments}
    with pytest.warns(UserWarning, match=r"names the attackers \[1\], which are none of the 5 clients.*'site-0'"):
        train(settings.pop("algorithm"), Net(), **settings)


def test_labels_that_cannot_be_exchanged() -> None:
    with pytest.raises(MisconfigurationException, match="labels at 'label', got list"):
        train(FedAvg(), Net(), clients(), client_callbacks=[LabelFlip(["site-0"], 3, target="label")])


def test_more_labels_than_classes_are_the_attacks_fault() -> None:
    wrong = r"^LabelFlip\(num_classes=2\) flips labels from 0 to 1, and a batch of an attacker has labels from 0 to 2\."
    with pytest.raises(MisconfigurationException, match=wrong):
        train(FedAvg(), Net(), clients(), client_callbacks=[LabelFlip(["site-0"], 2)])


def test_labels_of_a_tuple_or_of_a_dict_without_them() -> None:
    flip = LabelFlip(["site-0"], 3)
    flip.begin(ClientTask("site-0", 0, 0, {}, seed=0), {})
    module = Net()
    with pytest.raises(MisconfigurationException, match=r"labels at -1, got tuple.*let collate_fn return a list"):
        flip.on_train_batch_start(None, module, (torch.zeros(1), torch.zeros(1)), 0)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"labels at -1, got dict.*target='label'"):
        flip.on_train_batch_start(None, module, {"x": torch.zeros(1)}, 0)  # type: ignore[arg-type]
