"""The laws of all algorithms and robust rules, in every loop and in a process that hears nothing but bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_zoo import Net, Normalised, Still, identical, on_one_process_and_on_two, weights
from everyone import (
    ALONE,
    ASYNCHRONOUS,
    EVERYONE,
    LOOPS,
    ONE_STEP,
    PERSONAL_HEADS,
    RULES,
    Seen,
    assert_same,
    cohort,
    expected_after,
    in_one_step,
    one_batch,
    some_of,
    train,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from one_process import OneProcess

from fl_lightning.local.client import ClientHalf
from fl_lightning.schedules import PowerOfChoiceSampler

everyone = pytest.mark.parametrize("name", EVERYONE)
every_loop = pytest.mark.parametrize("loop", LOOPS)


@everyone
@every_loop
def test_when_no_client_moves_the_model_stays(name: str, loop: str) -> None:
    module = Still()
    before = weights(module)
    trainer = train(name, module, local_steps=1, **LOOPS[loop])
    assert identical(weights(module), before)
    assert all(report.num_steps > 0 for report in trainer.round_history)


@everyone
@every_loop
def test_the_order_of_the_clients_changes_no_bit(name: str, loop: str) -> None:
    module = Net()
    other = copy.deepcopy(module)
    before = weights(module)
    train(name, module, local_steps=2, **LOOPS[loop])
    train(name, other, dict(reversed(cohort().items())), local_steps=2, **LOOPS[loop])
    assert identical(weights(module), weights(other))
    assert not identical(weights(module), before)


@everyone
@every_loop
def test_one_step_on_one_client_s_data_is_centralised_training(name: str, loop: str) -> None:
    """Or what ``ONE_STEP`` says. Rules that withstand attackers need five clients, a group needs two: all the same."""
    num_clients = 5 if name in RULES else 3 if loop == "groups" and name not in ASYNCHRONOUS else 1
    module = Net()
    expected = expected_after(name, module, rounds=3)
    train(
        name, module, one_batch(num_clients), rounds=3, local_steps=1, algorithm=in_one_step(name, num_clients),
        client_overrides=None, **LOOPS[loop],
    )  # fmt: skip
    for key, value in weights(module).items():
        if not (name in PERSONAL_HEADS and key.startswith("head")):  # the server's own copy is nobody's
            assert torch.allclose(value, expected[key], rtol=1e-5, atol=1e-6), key


@everyone
def test_the_loops_agree(name: str) -> None:
    """The lean loop to the bit; a group to rounding, since batched kernels add in another order."""
    start = Net(momentum=0.0 if name.startswith("Scaffold") else 0.9)
    loops = {**LOOPS, "lean in one lane": {**LOOPS["lean"], "num_lanes": 1}}
    modules, watched = {loop: copy.deepcopy(start) for loop in loops}, {loop: Seen() for loop in loops}
    for loop, module in modules.items():
        train(name, module, callbacks=[watched[loop]], **loops[loop])
        assert (watched[loop].not_lean is None) == (loop != "lightning"), watched[loop].not_lean
    lightning, lean, groups, one_lane = (weights(module) for module in modules.values())
    assert identical(lightning, lean)
    before = weights(start)
    for key, value in lean.items():
        assert (groups[key] - value).norm() <= 1e-4 * (value - before[key]).norm(), key
    alone = watched["groups"].alone
    if name in ALONE:
        assert identical(groups, one_lane)
        assert alone is not None or name in ("Ditto", "FedAsync", "FedRep")  # which never ask for a group
    else:
        assert alone is None
        # Krum takes the update of one client, who may have trained alone
        assert name == "Krum" or not identical(groups, one_lane), "to the bit the same: was there a group at all?"


@everyone
@every_loop
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name: str, loop: str, tmp_path: Path) -> None:
    """Weights, the algorithm's state, the server optimizer's, and with them what clients remember, absent ones too."""
    whole, resumed = Seen(), Seen()
    arguments = {"rounds": 3, "enable_checkpointing": True, "local_steps": 2, **some_of(name), **LOOPS[loop]}
    folder = tmp_path / "saved"
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    train(name, Net(), callbacks=[saver, whole], default_root_dir=str(tmp_path / "whole"), **arguments)
    trainer = train(
        name, Net(), callbacks=[resumed, ModelCheckpoint(folder, save_top_k=0)], ckpt_path=str(folder / "epoch=0.ckpt"),
        default_root_dir=str(tmp_path / "resumed"), **arguments,
    )  # fmt: skip
    assert [report.round for report in trainer.round_history] == [0, 1, 2]
    assert_same(resumed.weights, whole.weights[1:])
    assert_same(resumed.states, whole.states[1:])


@everyone
def test_frozen_parameters_stay_in_a_group(name: str) -> None:
    """BatchNorm, which no group has, and frozen layers in the other loops stand in ``test_conformance``."""
    module = Net()
    module.body.weight.requires_grad_(False)
    before = weights(module)
    train(name, module, local_steps=2, client_overrides=None, **LOOPS["groups"])
    still = {"body.weight"} | ({"head.weight", "head.bias"} if name in PERSONAL_HEADS else set())
    assert {key for key, value in weights(module).items() if torch.equal(value, before[key])} == still


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one_in_groups(tmp_path: Path) -> None:
    """A group never crosses a lane, and a lane is never cut between processes. One by one: see ``processes.py``."""
    one, two = on_one_process_and_on_two("group_processes.py", tmp_path)
    assert one.keys() == EVERYONE.keys()
    assert [name for name in one if not identical(one[name], two[name])] == []


@pytest.fixture(scope="module")
def one_process() -> Iterator[OneProcess]:
    with OneProcess() as engine:
        yield engine


@pytest.mark.slow
@everyone
def test_a_process_that_hears_only_bytes_gives_the_same_bits(name: str, one_process: OneProcess) -> None:
    """Broadcast, contribution and memory cross a pipe, and the client half is built anew for every task."""
    module = Net()
    other = copy.deepcopy(module)
    seen, there = Seen(), Seen()
    arguments: dict[str, Any] = {**some_of(name), **LOOPS["lean"]}
    train(name, module, callbacks=[seen], **arguments)
    before = one_process.num_tasks
    trainer = train(name, other, callbacks=[there], engine=one_process, **arguments)
    assert one_process.num_tasks - before == sum(len(report.cohort) for report in trainer.round_history)
    assert_same(there.weights, seen.weights)
    assert_same(there.states, seen.states)


@pytest.mark.slow
def test_losses_and_statistics_are_measured_where_clients_live(
    one_process: OneProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"clients_per_round": 2, "batch_norm": "recalibrate", **LOOPS["lean"]}
    module = Normalised()
    other = copy.deepcopy(module)
    here = train("FedAvg", module, sampler=PowerOfChoiceSampler(4), **arguments)
    for name in ("start_losses", "recalibrate"):
        monkeypatch.setattr(ClientHalf, name, None)  # in this process; the clients' has read its own
    before = one_process.num_tasks
    there = train("FedAvg", other, sampler=PowerOfChoiceSampler(4), engine=one_process, **arguments)
    assert one_process.num_tasks - before == 2 * (4 + 2 + 2)
    assert identical(weights(module), weights(other))
    for name in ("cohort", "num_bytes_down", "num_bytes_up", "metrics"):
        assert [getattr(r, name) for r in here.round_history] == [getattr(r, name) for r in there.round_history]


def test_what_is_no_centralised_training_is_told_apart() -> None:
    """Each expectation of its own differs from plain SGD by more than the tolerance above."""
    module = Net()
    plain = expected_after("FedAvg", module, rounds=3)
    assert ONE_STEP.keys() <= EVERYONE.keys()
    for name in ONE_STEP:
        own = expected_after(name, module, rounds=3)
        assert any(not torch.allclose(own[key], plain[key], rtol=1e-4, atol=1e-5) for key in own), name
