"""A fit of a plain Trainer that is resumed from its checkpoint equals one that was never interrupted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_training import QUIET, Net, data, plain_fit, same

from fl_lightning import FederatedTrainer, FedProx
from fl_lightning.callbacks import GradientClip, GradientCorrection, GradientNoise, ProximalTerm


class PullBack(GradientCorrection):
    """A correction as a user writes one, which reads the model that the fit started from."""

    def correct(self, grads: Any, params: Any, task: Any) -> Any:
        return {name: grad + 0.7 * (params[name] - task.broadcast["model"][name]) for name, grad in grads.items()}


@pytest.mark.parametrize("make", [lambda: ProximalTerm(2.0), PullBack], ids=["ProximalTerm", "a user's own"])
def test_a_resumed_fit_is_pulled_to_where_the_first_one_started(make: Any, tmp_path: Path) -> None:
    whole = Net()
    part, moved = copy.deepcopy(whole), copy.deepcopy(whole)
    plain_fit(whole, make(), epochs=4)
    plain_fit(part, make(), epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    plain_fit(moved, make(), epochs=2)
    plain_fit(moved, make(), epochs=2)  # the start is another one here
    trainer = plain_fit(part, make(), epochs=4, resume=tmp_path / "half.ckpt")
    assert trainer.current_epoch == 4
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), whole.parameters(), strict=True))
    assert not same(moved, whole, 1e-3)


def test_the_next_fit_has_its_own_start_again(tmp_path: Path) -> None:
    module, term = Net(), ProximalTerm(2.0)
    plain_fit(module, ProximalTerm(2.0), epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    trainer = plain_fit(module, term, epochs=2, resume=tmp_path / "one.ckpt")
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data())
    assert term.task is not None
    assert all(torch.equal(term.task.broadcast["model"][name], value) for name, value in expected.items())


@pytest.mark.parametrize("callback", [GradientClip(max_norm=1.0), GradientNoise(0.1)], ids=type)
def test_a_correction_that_needs_no_start_keeps_none(callback: Callback, tmp_path: Path) -> None:
    plain_fit(Net(), callback, epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"] == {}


@pytest.mark.parametrize("loop", ["lean", "lightning"])
def test_a_federations_checkpoint_keeps_no_start(loop: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_rounds": 1, "local_loop": loop, **QUIET}
    sizes = []
    for given in ({}, {"algorithm": FedProx(0.5)}, {"client_callbacks": [ProximalTerm(0.5)]}):
        torch.manual_seed(0)
        trainer = FederatedTrainer(**arguments, **given)
        trainer.fit(Net(), {"a": data(), "b": data(seed=1)})
        trainer.save_checkpoint(tmp_path / "federation.ckpt")
        checkpoint = torch.load(tmp_path / "federation.ckpt", weights_only=True)
        assert checkpoint["callbacks"] == {}
        sizes.append(sum(t.numel() for t in _tensors(checkpoint)))
    assert sizes[0] == sizes[1] == sizes[2]


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
