"""One client and one round are a plain ``lightning.Trainer.fit``, to one ulp, for a zoo of modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import spine_modules as zoo
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from spine_zoo import Classifier, Sites, assert_one_ulp, examples, fit_federated, fit_plain, loader, val_loader, weights
from torch.utils.data import DataLoader

from fl_lightning.algorithms import FedAvg
from fl_lightning.trainer import FederatedTrainer


class Case(NamedTuple):
    module: Callable[[], Any]
    train: Callable[[], Any] = loader
    val: Callable[[], Any] | None = None
    arguments: dict[str, Any] = {}


CASES: dict[str, Case] = {
    "boring": Case(BoringModel, zoo.boring_loader),
    "boring-manual": Case(ManualOptimBoringModel, zoo.boring_loader),
    "demo": Case(lambda: DemoTraining(out_dim=3), lambda: DataLoader(torch.ones(8, 32), batch_size=4)),
    "transformer": Case(zoo.SmallTransformer, lambda: DataLoader(zoo.Words(), batch_size=4)),
    "lstm": Case(zoo.SmallLSTM, lambda: DataLoader(zoo.Words(), batch_size=4)),
    "one-cycle": Case(zoo.OneCycle),
    "one-cycle-accumulated": Case(zoo.OneCycle, arguments={"accumulate_grad_batches": 2}),
    "plateau": Case(zoo.Plateau, val=val_loader),
    "gan": Case(zoo.GAN),
    "accumulate": Case(Classifier, arguments={"accumulate_grad_batches": 2}),
    "clip-norm": Case(Classifier, arguments={"gradient_clip_val": 0.05}),
    "clip-value": Case(Classifier, arguments={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "limit-batches": Case(Classifier, arguments={"limit_train_batches": 2}),
    "overfit": Case(Classifier, lambda: loader(shuffle=False), arguments={"overfit_batches": 1}),
    "nested": Case(zoo.NestedBatch, lambda: loader(collate_fn=zoo.as_dict)),
    "dataclass": Case(zoo.PairBatch, lambda: loader(collate_fn=zoo.as_pair)),
    "dataclass-stream": Case(zoo.PairBatch, lambda: DataLoader(zoo.Stream(19), 4, collate_fn=zoo.as_pair)),
    "stream": Case(Classifier, lambda: DataLoader(zoo.Stream(19), batch_size=4)),
    "no-batch-size": Case(Classifier, lambda: DataLoader(zoo.Batches(), batch_size=None, shuffle=True)),
    "list-of-batches": Case(Classifier, zoo.PlainIterable),
    "batch-sampler": Case(Classifier, lambda: DataLoader(examples(10, 1), batch_sampler=zoo.LongestFirst())),
    "drop-last": Case(Classifier, lambda: loader(drop_last=True)),
    "setup-builds": Case(zoo.LateLayers),
    "configure-model": Case(zoo.ConfiguredModel),
    "own-callbacks": Case(zoo.OwnCallbacks, val=val_loader),
    "torchmetrics": Case(zoo.Metrics),
    "watches-trainer": Case(zoo.WatchesTrainer),
    "dropout": Case(zoo.Dropout),
    "batch-norm": Case(zoo.Norm),
    "lbfgs": Case(zoo.LBFGS),
    "skips-steps": Case(zoo.SkipsSteps),
    "bf16-mixed": Case(Classifier, arguments={"precision": "bf16-mixed"}),
    "64-true": Case(Classifier, arguments={"precision": "64-true"}),
    "deterministic": Case(Classifier, arguments={"deterministic": True}),
    "detect-anomaly": Case(Classifier, arguments={"detect_anomaly": True}),
}


class DemoTraining(DemoModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch.float()).square().mean()


def run(case: Case, plain: bool, start: Any, local_loop: str = "lightning") -> tuple[Any, list[Any], Any]:
    """Train a copy of ``start`` on the case's data; return it, what it wrote down, and its trainer."""
    module = copy.deepcopy(start)
    zoo.SEEN.clear()
    if plain:
        # a val_dataloader of the module is the server's, and a client does not validate on it
        own = {} if case.val else {"limit_val_batches": 0}
        trainer: Any = fit_plain(
            module, case.train(), case.val() if case.val else None, epochs=2, **own, **case.arguments
        )
    else:
        client_val = {"a": case.val()} if case.val else None
        data = Sites({"a": case.train()}, client_val=client_val)
        # of equal weight: the law of one ulp is about the delta, and a factor of n adds roundings of its own
        own = {"algorithm": FedAvg(weights="uniform"), "local_epochs": 2, "local_loop": local_loop}
        trainer = fit_federated(module, data, **own, **case.arguments)
    return module, list(zoo.SEEN), trainer


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`", "ignore:`ModelCheckpoint.monitor")
@pytest.mark.parametrize("name", CASES)
def test_one_client_is_plain_lightning(name: str) -> None:
    case = CASES[name]
    start = case.module()
    if name == "configure-model":
        start.configure_model()  # Lightning does it inside of fit, where two runs would draw two layers
    expected, expected_notes, plain = run(case, True, start)
    module, notes, trainer = run(case, False, start)
    begin = {n: t.to(weights(expected)[n].dtype) for n, t in _start(start, expected).items()}
    if name == "setup-builds":
        assert module.late.weight.shape == (3, 3)
    assert_one_ulp(weights(module), weights(expected), begin)
    assert notes == expected_notes
    assert trainer.round_history[0].num_steps == plain.global_step
    assert any(not torch.equal(begin[n], weights(expected)[n]) for n in begin), "nothing was trained"


def _start(start: Any, expected: Any) -> dict[str, Any]:
    own = weights(start)
    return {name: own.get(name, tensor) for name, tensor in weights(expected).items()}


@pytest.mark.parametrize("name", ["boring", "one-cycle", "torchmetrics", "dropout", "clip-norm", "batch-norm", "gan"])
def test_the_automatic_loop_is_plain_lightning_too(name: str) -> None:
    case = CASES[name]
    start = case.module()
    expected, _, _ = run(case, True, start)
    module, _, _ = run(case, False, start, local_loop="auto")
    for key, value in weights(expected).items():
        torch.testing.assert_close(weights(module)[key], value, atol=1e-6, rtol=1e-6)


def test_bf16_true_clients_move_a_float32_server() -> None:
    start = Classifier()
    case = Case(Classifier, arguments={"precision": "bf16-true"})
    expected, _, _ = run(case, True, start)
    module, _, trainer = run(case, False, start)
    assert expected.net[0].weight.dtype == torch.bfloat16
    assert module.net[0].weight.dtype == torch.float32
    for name, value in weights(expected).items():
        before = weights(start)[name]
        moved = value.float() - before.bfloat16().float()
        torch.testing.assert_close(weights(module)[name], before + moved, atol=1e-7, rtol=1e-6)
    assert trainer.round_history[0].num_steps == 6


def test_a_hundred_small_bf16_updates_are_not_swallowed() -> None:
    class Drifts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net[0].bias.sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.net[0].bias], lr=2**-8)

    module = Drifts()
    with torch.no_grad():
        module.net[0].bias.fill_(1.0)
    fit_federated(module, {"a": loader(8)}, max_rounds=20, precision="bf16-true")
    torch.testing.assert_close(module.net[0].bias.detach(), torch.full((3,), 1 - 20 * 2**-8), atol=1e-6, rtol=0)


def test_the_loggers_experiment_works_on_clients(tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start = zoo.Experiment()
    expected = copy.deepcopy(start)
    fit_plain(expected, loader(), logger=TensorBoardLogger(tmp_path, name="plain"))
    module = copy.deepcopy(start)
    trainer = fit_federated(module, {"a": loader()}, logger=TensorBoardLogger(tmp_path, name="fed"))
    assert_one_ulp(weights(module), weights(expected), weights(start))

    curves = []
    for folder in (tmp_path / "plain" / "version_0", *(tmp_path / "fed" / "version_0" / "clients").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        curves.append([(event.step, event.value) for event in events.Scalars("raw")])
    assert curves[0] == curves[1]
    assert len(curves) == 2
    assert len(curves[0]) == trainer.round_history[0].num_steps == 3


def test_a_fitted_module_is_its_own_class_again() -> None:
    module = Classifier()
    trainer = fit_federated(module, {"a": loader()})
    assert type(module) is Classifier
    assert isinstance(trainer, FederatedTrainer)


@pytest.mark.parametrize("local_loop", ["lightning", "auto"])
def test_a_val_dataloader_of_the_module_is_the_servers(local_loop: str) -> None:
    sides = []

    class Validates(BoringModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            sides.append(type(self.trainer))

    fit_federated(Validates(), {"a": zoo.boring_loader()}, local_loop=local_loop, limit_val_batches=2)
    assert set(sides) == {FederatedTrainer}
    assert len(sides) == 2 + 2  # sanity check and one round
