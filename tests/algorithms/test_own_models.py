"""FedRep and APFL against their papers' lines, personal models in the evaluation on clients, and as files."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import Judged, Net, Normalised, Sites, clients, identical, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quadratics import OPTIMA, STEPS, Quadratic, client, parabola, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fl_lightning import load_personal_model
from fl_lightning.algorithms import APFL, Algorithm, Ditto, FedAvg, FedPer, FedRep
from fl_lightning.engines import SpawnedEngine


class Product(pl.LightningModule):
    """Shared x times the client's own y: neither gradient is the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((1,), 1.5, dtype=torch.float64))
        self.y = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h, linear, constant = batch[0].unbind(-1)
        z = self.x * self.y
        return (h / 2 * z**2 - linear * z + constant).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Memories(pl.Callback):
    """Reads what clients keep after each round."""

    def __init__(self, *ids: Any) -> None:
        self.ids = ids
        self.rounds: list[dict[Any, Any]] = []
        self.values: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        store = trainer.federated_fit.federation.store
        self.rounds.append({client_id: store.get(client_id) for client_id in self.ids})
        self.values.append(float(pl_module.x.detach()) if hasattr(pl_module, "x") else 0.0)


@pytest.mark.parametrize("loop", ["lean", "lightning"])
def test_fedrep_follows_the_paper_number_by_number(loop: Any) -> None:
    x, own, lr = 1.5, [0.5, 0.5, 0.5], 0.05
    expected = []
    for _ in range(3):
        moves = []
        for k, e in enumerate(OPTIMA):
            for _ in range(3):  # head steps; the representation stands still
                own[k] -= lr * (x * own[k] - e) * x
            local = x
            for _ in range(2):  # then the representation; the head stands still
                local -= lr * (local * own[k] - e) * own[k]
            moves.append(local - x)
        x += sum(moves) / 3
        expected.append((x, *own))
    memories = Memories("a", "b", "c")
    data = {name: client(parabola(1.0, e)) for name, e in zip("abc", OPTIMA, strict=True)}
    quiet_trainer(
        algorithm=FedRep(["y"], head_epochs=3, weights="uniform"), max_rounds=3, local_epochs=2, local_loop=loop,
        callbacks=[memories],
    ).fit(module := Product(), data)  # fmt: skip
    for round, numbers in enumerate(expected):
        kept = [memories.rounds[round][name]["local"]["y"].item() for name in "abc"]
        assert (memories.values[round], *kept) == pytest.approx(numbers, abs=1e-12)
    assert module.y.item() == 0.5


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("loop", ["lean", "lightning"])
def test_apfl_follows_its_equations_number_by_number(loop: Any, adaptive: bool) -> None:
    lr, x, alphas, own = 0.005, 2.0, [0.6, 0.6, 0.6], [2.0, 2.0, 2.0]
    expected = []
    for _ in range(3):
        moves, mixtures = [], []
        for k, (e, steps) in enumerate(zip(OPTIMA, STEPS, strict=True)):
            w = e + (1 - lr) ** steps * (x - e)
            v, total, alpha = own[k], 0.0, alphas[k]
            for _ in range(steps):
                gradient = alpha * v + (1 - alpha) * w - e
                v -= lr * alpha * gradient
                total += lr * gradient
            if adaptive:
                alphas[k] = min(1.0, max(0.01, alpha - total * (own[k] - w)))
            own[k] = v
            mixtures.append(alpha * v + (1 - alpha) * w)
            moves.append(w - x)
        x += sum(moves) / 3
        expected.append((x, *mixtures, *own, *alphas))
    memories = Memories("a", "b", "c")
    data = {name: client(parabola(1.0, e), steps) for name, e, steps in zip("abc", OPTIMA, STEPS, strict=True)}
    algorithm = APFL(0.6, adaptive=adaptive, weights="uniform")
    quiet_trainer(algorithm=algorithm, max_rounds=3, local_loop=loop, callbacks=[memories]).fit(
        Quadratic(2.0, lr), data
    )
    for round, numbers in enumerate(expected):
        kept = memories.rounds[round]
        mixtures = [kept[name]["personal"]["x"].item() for name in "abc"]
        models = [kept[name]["apfl"]["own"]["x"].item() for name in "abc"]
        shares = [kept[name]["apfl"]["alpha"] for name in "abc"]
        assert (memories.values[round], *mixtures, *models, *shares) == pytest.approx(numbers, abs=1e-10)
    assert len(set(alphas)) == (3 if adaptive else 1)


@pytest.mark.parametrize("loop", ["lean", "lightning"])
def test_apfl_decays_the_mixture_by_the_chain_rule_too(loop: Any) -> None:
    """With weight decay, momentum and a schedule in it, the recursion of ``v`` in plain numbers."""

    class Decaying(Quadratic):
        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5, weight_decay=0.3)
            return [sgd], [{"scheduler": torch.optim.lr_scheduler.StepLR(sgd, 2, 0.5), "interval": "step"}]

    def step(buffer: float, gradient: float, k: int) -> tuple[float, float]:
        buffer = 0.5 * buffer + gradient
        return buffer, 0.05 * 0.5 ** (k // 2) * buffer

    e, alpha, w, v, steps = 3.0, 0.2, 2.0, 2.0, 5
    buffer = 0.0
    for k in range(steps):
        buffer, move = step(buffer, w - e + 0.3 * w, k)
        w -= move
    buffer = 0.0
    for k in range(steps):
        mixture = alpha * v + (1 - alpha) * w
        buffer, move = step(buffer, alpha * (mixture - e + 0.3 * mixture), k)
        v -= move
    memories = Memories("a")
    data = {"a": client(parabola(1.0, e), steps)}
    quiet_trainer(algorithm=APFL(alpha), max_rounds=1, local_loop=loop, callbacks=[memories]).fit(
        Decaying(2.0, 0.05), data
    )
    kept = memories.rounds[0]["a"]
    assert memories.values[0] == pytest.approx(w, abs=1e-10)
    assert kept["apfl"]["own"]["x"].item() == pytest.approx(v, abs=1e-10)
    assert kept["personal"]["x"].item() == pytest.approx(alpha * v + (1 - alpha) * w, abs=1e-10)


def test_apfl_with_nothing_of_the_global_model_is_local_training_to_the_bit() -> None:
    """Which is also Ditto without a pull: the same phases draw the same batches."""
    module = Net(momentum=0.5)
    kept = []
    for algorithm in (APFL(alpha=1.0), Ditto(lam=0.0)):
        memories = Memories("site-0", "site-1", "site-2")
        pl.seed_everything(5, verbose=False)
        trainer = quiet_trainer(algorithm=algorithm, max_rounds=3, local_epochs=2, callbacks=[memories])
        trainer.fit(copy.deepcopy(module), clients())
        kept.append(memories.rounds[-1])
    for name, memory in kept[0].items():
        assert identical(memory["personal"], kept[1][name]["personal"])


def loss_of(module: Net, data: Sites) -> float:
    """Return the pooled loss, each client's examples under that client's model if there are several."""
    losses = [
        len(loader.dataset) * module.loss(next(iter(DataLoader(loader.dataset, batch_size=50)))).item()
        for loader in data.loaders.values()
    ]
    return sum(losses) / sum(len(loader.dataset) for loader in data.loaders.values())


@pytest.mark.parametrize("loop", ["lean", "lightning"])
def test_fine_tuned_models_are_evaluated_beside_the_global_one(loop: Any) -> None:
    data, module = Sites(), Judged()
    trainer = quiet_trainer(
        algorithm=FedAvg(), max_rounds=2, evaluate_clients=True, personalize_epochs=3, local_loop=loop,
        client_overrides={"site-1": {"lr": 0.02}},
    )  # fmt: skip
    trainer.fit(module, data)
    metrics = trainer.round_history[-1].metrics
    assert metrics["clients/val_loss"] == pytest.approx(loss_of(module, data), rel=1e-5)
    total = 0.0
    for name, loader in data.loaders.items():
        tuned = copy.deepcopy(module)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.02 if name == "site-1" else 0.1)
        for _ in range(3):
            for batch in loader:
                optimizer.zero_grad()
                tuned.loss(batch).backward()
                optimizer.step()
        with torch.no_grad():
            total += len(loader.dataset) * tuned.loss(loader.dataset.tensors).item()
    assert metrics["clients/personal/val_loss"] == pytest.approx(total / 39, rel=1e-5)
    assert metrics["clients/personal/val_acc"] >= metrics["clients/val_acc"]
    assert metrics["clients/personal/val_acc/min"] <= metrics["clients/personal/val_acc"]
    assert trainer.callback_metrics["clients/personal/val_loss"] == pytest.approx(total / 39, rel=1e-5)


@pytest.mark.parametrize("loop", ["lean", "lightning"])
def test_fine_tuning_for_the_evaluation_changes_no_bit_of_training(loop: Any) -> None:
    states = []
    start = Judged()
    for epochs in (0, 2):
        module = copy.deepcopy(start)
        pl.seed_everything(3, verbose=False)
        arguments: dict[str, Any] = {"evaluate_clients": True, "personalize_epochs": epochs, "local_loop": loop}
        trainer = quiet_trainer(algorithm=Ditto(0.5), max_rounds=3, client_state="keep", **arguments)
        trainer.fit(module, Sites(shuffle=True))
        states.append((weights(module), trainer.client_memory.get("site-1")["personal"], trainer.round_history))
    assert identical(states[0][0], states[1][0])
    assert identical(states[0][1], states[1][1])
    for plain, tuned in zip(states[0][2], states[1][2], strict=True):
        assert plain.metrics["clients/val_loss"] == tuned.metrics["clients/val_loss"]
        assert plain.metrics["clients/personal/val_loss"] > tuned.metrics["clients/personal/val_loss"]


@pytest.mark.parametrize("algorithm", [Ditto(0.3), APFL(0.7)], ids=lambda algorithm: type(algorithm).__name__)
def test_models_that_an_algorithm_keeps_are_evaluated(algorithm: Algorithm, tmp_path: Path) -> None:
    """A client that has not taken part yet has the global model."""
    data, module = Sites(), Judged()
    trainer = quiet_trainer(algorithm=algorithm, max_rounds=3, clients_per_round=1, evaluate_clients=True)
    trainer.fit(module, data)
    seen = {client_id for report in trainer.round_history for client_id in report.cohort}
    total = 0.0
    for name, loader in data.loaders.items():
        model = module
        if name in seen:
            trainer.save_personal_model(name, tmp_path / "own.ckpt")
            model = Judged.load_from_checkpoint(tmp_path / "own.ckpt")
            assert not identical(weights(model), weights(module))
        with torch.no_grad():
            total += len(loader.dataset) * model.loss(loader.dataset.tensors).item()
    metrics = trainer.round_history[-1].metrics
    assert metrics["clients/personal/val_loss"] == pytest.approx(total / 39, rel=1e-5)
    assert metrics["clients/val_loss"] == pytest.approx(loss_of(module, data), rel=1e-5)


def test_layers_that_stay_are_evaluated_with_their_client_and_have_no_second_value() -> None:
    trainer = quiet_trainer(algorithm=FedRep(["head.*"], 2), max_rounds=2, evaluate_clients=True)
    trainer.fit(Judged(), Sites())
    assert "clients/val_loss" in trainer.round_history[-1].metrics
    assert not any(name.startswith("clients/personal") for name in trainer.round_history[-1].metrics)


@pytest.mark.slow
def test_a_process_for_each_client_personalises_with_the_same_bits() -> None:
    start, found = Judged(), []
    for engine in (None, SpawnedEngine()):
        pl.seed_everything(3, verbose=False)
        trainer = quiet_trainer(
            algorithm=APFL(0.7, adaptive=True), max_rounds=2, evaluate_clients=2, personalize_epochs=1, engine=engine
        )
        trainer.fit(module := copy.deepcopy(start), data_of_two())
        found.append((weights(module), trainer.round_history[-1].metrics["clients/personal/val_loss"]))
    assert identical(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def data_of_two() -> Sites:
    data = Sites()
    del data.loaders["site-1"]
    return data


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (FedPer(["head.*"]), {}),
        (FedRep(["head.*"], 2), {}),
        (FedAvg(), {"batch_norm": "local"}),
        (Ditto(0.2), {}),
        (APFL(), {"batch_norm": "local"}),
    ],
    ids=["FedPer", "FedRep", "FedBN", "Ditto", "APFL"],
)
def test_a_personal_model_is_a_checkpoint_of_the_users_class(
    algorithm: Algorithm, arguments: dict[str, Any], tmp_path: Path
) -> None:
    module = Normalised(lr=0.07)
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer = quiet_trainer(
        algorithm=algorithm, max_rounds=2, callbacks=[saver], enable_checkpointing=True,
        default_root_dir=str(tmp_path), **arguments,
    )  # fmt: skip
    trainer.fit(module, clients())
    before = weights(module)
    models = {}
    for name in ("site-0", "site-2"):
        path = tmp_path / f"{name}.ckpt"
        trainer.save_personal_model(name, path)
        models[name] = Normalised.load_from_checkpoint(path)
        assert type(models[name]) is Normalised
        assert models[name].hparams.lr == 0.07
        assert "fl_lightning" not in torch.load(path, weights_only=True)
        memory = trainer.client_memory.get(name)
        mine = {**memory.get("local", {}), **memory.get("personal", {})}
        expected = {key: mine.get(key, value) for key, value in before.items()}
        assert identical(weights(models[name]), expected)
        assert identical(weights(load_personal_model(Normalised, tmp_path / "checkpoints/last.ckpt", name)), expected)
    assert not identical(weights(models["site-0"]), weights(models["site-2"]))
    assert identical(weights(module), before)  # the global model is not touched
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain = pl.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    plain.fit(models["site-0"], clients()["site-0"])  # goes on in plain Lightning


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from algorithm_zoo import Net, clients
from quadratics import quiet_trainer
from fl_lightning.algorithms import Ditto
trainer = quiet_trainer(algorithm=Ditto(), max_rounds=1)
trainer.fit(Net(), clients())
folder = trainer.client_memory.folder.parent
print(folder, folder.is_dir())
"""


def test_memory_of_a_run_without_a_folder_lives_as_long_as_its_program() -> None:
    program = PROGRAM.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    kept, there = done.stdout.split()
    assert there == "True"
    assert not Path(kept).exists()


def test_who_has_no_model_of_its_own_is_told(tmp_path: Path) -> None:
    trainer = quiet_trainer(algorithm=FedAvg(), max_rounds=1)
    with pytest.raises(MisconfigurationException, match=r"after trainer.fit has ended.*load_personal_model"):
        trainer.save_personal_model("site-0", tmp_path / "x.ckpt")
    trainer.fit(Net(), clients())
    with pytest.raises(MisconfigurationException, match=r"'site-0' keeps no model of its own under FedAvg: nobody"):
        trainer.save_personal_model("site-0", tmp_path / "x.ckpt")
    plain = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                       enable_model_summary=False, default_root_dir=str(tmp_path))  # fmt: skip
    plain.fit(Net(), clients()["site-0"])
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match=r"no FederatedTrainer.*Net.load_from_checkpoint"):
        load_personal_model(Net, tmp_path / "plain.ckpt", "site-0")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FedRep(["head.*"], head_epochs=0),
            r"head_epochs to be an integer >= 1.*got 0.*FedPer\(\['head.\*'\]\)",
        ),
        (lambda: FedRep([]), r"got none. Write FedRep\(\['head.\*'\]\)"),
        (lambda: APFL(alpha=0.0), r"alpha in \(0, 1\], got 0.0.*FedAvg\(\)"),
        (lambda: APFL(alpha=1.5), r"alpha in \(0, 1\], got 1.5"),
        (lambda: APFL(personal_epochs=0), "APFL expected personal_epochs to be an integer >= 1"),
        (lambda: quiet_trainer(personalize_epochs=2), "personalize_epochs=2 trains models.*Set evaluate_clients=True"),
        (lambda: quiet_trainer(personalize_epochs=-1), r"personalize_epochs to be an integer >= 0 .*got -1"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_a_pattern_of_fedrep_must_match() -> None:
    with pytest.raises(MisconfigurationException, match=r"FedRep's pattern 'tail.\*' matches no parameter of .*Net"):
        quiet_trainer(algorithm=FedRep(["tail.*"]), max_rounds=1).fit(Net(), clients())
