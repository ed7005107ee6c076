"""Compressed broadcasts: a client follows the server from bytes alone, and what is remembered stays small."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from federated import START, train
from lightning.pytorch.callbacks import ModelCheckpoint
from spine_zoo import QUIET, Classifier, assert_same_bits, sites, weights
from transforms_zoo import TRANSFORMS, tree

from fl_lightning import FederatedTrainer, Quantize, TopK
from fl_lightning.fitting import FederatedFit
from fl_lightning.transforms import CompressedBroadcast, PayloadError
from fl_lightning.transforms.base import Exchange
from fl_lightning.transforms.feedback import has_feedback
from fl_lightning.wire import pack

STEPS = {name: make for name, make in TRANSFORMS.items() if "broadcast" not in name and not has_feedback(make())}

CLIENT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from transforms_zoo import TRANSFORMS
from fl_lightning.transforms import CompressedBroadcast
from fl_lightning.transforms.base import Exchange
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.first")):
    transform, reference = CompressedBroadcast(TRANSFORMS[path.stem]()), torch.load(path)
    transform.init({{"delta": reference}}, 3)
    for round in (1, 2):
        step = (folder / f"{{path.stem}}.{{round}}").read_bytes()
        reference = transform.follow(reference, step, Exchange(3, round))
    torch.save(reference, path.with_suffix(".followed"))
"""


def moved(by: int) -> dict[str, torch.Tensor]:
    """A model that a few rounds have moved."""
    return {
        name: tensor + 0.1 * change for (name, tensor), change in zip(tree().items(), tree(by).values(), strict=True)
    }


def prepared(transform: Any) -> CompressedBroadcast:
    found = CompressedBroadcast(transform)
    found.init({"delta": tree()}, 3)
    return found


def test_a_client_in_a_new_process_follows_every_transform_to_the_bit(tmp_path: Path) -> None:
    server = {}
    for name, make in STEPS.items():
        transform = prepared(make())
        state = transform.broadcast(tree(), ["a"], Exchange(3, 0), {}).state
        torch.save(state["reference"], tmp_path / f"{name}.first")
        for round in (1, 2):
            exchange, before = Exchange(3, round), state["reference"]
            sent = transform.broadcast(moved(round), ["a"], exchange, state)
            step, state = transform.step(moved(round), before, exchange), sent.state
            assert sent.num_bytes == [min(len(step), state["whole"])]
            (tmp_path / f"{name}.{round}").write_bytes(step)
        server[name] = state["reference"]
    program = CLIENT.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, reference in server.items():
        found = torch.load(tmp_path / f"{name}.followed", weights_only=True)
        assert all(torch.equal(found[n], reference[n]) for n in reference), name
        assert any(not torch.equal(found[n], tensor) for n, tensor in tree().items()), name


def test_a_step_of_another_round_is_refused() -> None:
    transform = prepared(TopK(0.1))
    step = transform.step(moved(1), tree(), Exchange(3, 4))
    with pytest.raises(PayloadError, match="expected the step of round 5, got that of round 4"):
        transform.follow(tree(), step, Exchange(3, 5))


@pytest.mark.parametrize("inner", [TopK(0.02), Quantize(8)], ids=["short steps", "long steps"])
def test_downloads_are_the_missed_steps_and_what_is_kept_is_bounded(inner: Any) -> None:
    transform, draw = prepared(inner), random.Random(0)
    state: Any = {}
    lengths, seen, whole = [0], dict[int, int](), len(pack({"model": tree()}))
    sizes = set()
    for round in range(150):
        model, exchange = moved(round), Exchange(3, round)
        if state:
            lengths.append(len(transform.step(model, state["reference"], exchange)))
        cohort = draw.sample(range(60), 3)
        sent = transform.broadcast(model, cohort, exchange, state)
        state = sent.state
        expected = [min(whole, sum(lengths[seen[c] + 1 :])) if c in seen else whole for c in cohort]
        assert sent.num_bytes == expected
        sizes.update(expected)
        seen.update(dict.fromkeys(cohort, round))
        shortest = min(lengths[1:], default=whole)
        assert len(state["steps"]) <= whole / shortest + 1
        assert len(state["versions"]) <= 3 * (len(state["steps"]) + 1)
    assert len(sizes) > 1
    assert len(state["versions"]) < len(seen)


# ---- in a federation -------------------------------------------------------------------------------------------------


def test_a_broadcast_follows_the_model_and_counts_what_clients_missed() -> None:
    """One of three clients a round: who was away downloads the steps in between, or the whole where that is less."""

    class Versions(CompressedBroadcast):
        drift: list[float] = []
        lengths: list[int] = [0]

        def step(self, *arguments: Any) -> bytes:
            found = super().step(*arguments)
            Versions.lengths.append(len(found))
            return found

        def broadcast(self, model: Any, cohort: Any, exchange: Any, state: Any) -> Any:
            sent = super().broadcast(model, cohort, exchange, state)
            Versions.drift.append(float(sum((sent.model[n] - model[n]).norm() for n in model)))
            return sent

    _, trainer = train([Versions(TopK(0.05))], hidden=800, clients_per_round=1, max_rounds=8)
    history = trainer.round_history
    state = trainer_state(trainer)
    whole = state["whole"]
    rest = len(pack({"buffers": {}}))
    one = len(pack({"model": state["reference"], "buffers": {}}))  # a single message with everything
    assert one < rest + whole
    seen: dict[Any, int] = {}
    for round, report in enumerate(history):
        (client,) = report.cohort
        missed = sum(Versions.lengths[seen[client] + 1 : round + 1]) if client in seen else whole
        assert report.num_bytes_down == min(one, rest + missed)
        seen[client] = round
    assert len({report.num_bytes_down for report in history}) > 2  # a model so large that steps are short
    assert Versions.drift[0] == 0
    assert all(0 < drift < 1 for drift in Versions.drift[1:])
    exact, _ = train([CompressedBroadcast(TopK(1.0))], clients_per_round=1, max_rounds=8)
    plain, _ = train(None, clients_per_round=1, max_rounds=8)
    for name, value in plain.items():
        torch.testing.assert_close(exact[name], value, atol=1e-5, rtol=1e-5)


def trainer_state(trainer: Any) -> Any:
    """Return the broadcast's state after a fit, as a checkpoint would keep it."""
    (state,) = trainer.kept["transforms"].values()
    return state


@pytest.fixture(autouse=True)
def keep_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FederatedFit.close

    def close(self: FederatedFit) -> None:
        if self._federation is not None:
            self.trainer.kept = self._federation.state  # type: ignore[attr-defined]
        original(self)

    monkeypatch.setattr(FederatedFit, "close", close)


def test_a_compressed_broadcast_resumes_to_the_bit(tmp_path: Path) -> None:
    ends = []
    for rounds in ((5,), (2, 5)):
        folder = tmp_path / str(len(rounds))
        path = None
        for stop in rounds:
            saver = ModelCheckpoint(folder, save_last=True)
            module = Classifier(hidden=6)
            module.load_state_dict(START)
            trainer = make_trainer(folder, stop, saver)
            trainer.fit(module, sites(3), ckpt_path=path)
            path = str(folder / "last.ckpt")
        ends.append((weights(module), trainer.round_history[-1].num_bytes_down))
    assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def make_trainer(folder: Path, stop: int, saver: Any) -> Any:
    pl.seed_everything(7, verbose=False)
    return FederatedTrainer(
        **{**QUIET, "enable_checkpointing": True}, default_root_dir=str(folder), max_rounds=stop, clients_per_round=2,
        callbacks=[saver], num_threads=1, transforms=[TRANSFORMS["broadcast and update"]()],
    )  # fmt: skip
