"""The laws that every transform keeps in a federation, whichever loop and engine runs the clients."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from federated import START, train
from lightning.pytorch.loggers import TensorBoardLogger
from spine_zoo import Classifier, assert_same_bits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transforms_zoo import TRANSFORMS, Tampered

from fl_lightning import ErrorFeedback, FedAsync, FedAvg, FedBuff, Quantize, RandomK, Scaffold, TopK, chain
from fl_lightning.algorithms import Algorithm, MimeLite
from fl_lightning.callbacks import Compression
from fl_lightning.engines import SpawnedEngine
from fl_lightning.errors import BadUpdateError, MisconfigurationException, NotEnoughClientsError
from fl_lightning.schedules import Patience
from fl_lightning.transforms import Codec, CompressedBroadcast, Transform
from fl_lightning.types import ClientTask, Contribution
from fl_lightning.wire import pack

every_transform = pytest.mark.parametrize("name", TRANSFORMS)


class Still(Classifier):
    """No client moves."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 1.0 + 0.0 * sum(p.sum() for p in self.parameters())


def client_bytes(trainer: Any, client: Any) -> list[tuple[int, float, float]]:
    """Return ``(step, up, down)`` of a client's reports, as TensorBoard reads them."""
    events = EventAccumulator(str(Path(trainer.logger.log_dir) / "clients" / str(client)))
    events.Reload()
    up, down = events.Scalars("num_bytes_up"), events.Scalars("num_bytes_down")
    assert [point.step for point in up] == [point.step for point in down]
    return [(one.step, one.value, other.value) for one, other in zip(up, down, strict=True)]


def test_a_client_s_run_has_its_own_bytes_up_and_down(tmp_path: Path) -> None:
    transforms = [CompressedBroadcast(TopK(0.05)), TopK(0.2)]
    arguments: dict[str, Any] = {"clients_per_round": 2, "max_rounds": 5, "log_clients": True, "hidden": 800}
    _, trainer = train(transforms, logger=TensorBoardLogger(tmp_path), **arguments)
    history = trainer.round_history
    found = {client: client_bytes(trainer, client) for client in {c for report in history for c in report.cohort}}
    for report in history:
        own = [found[client].pop(0) for client in report.cohort]
        assert sum(up for _, up, _ in own) == report.num_bytes_up
        assert sum(down for _, _, down in own) == report.num_bytes_down
    assert not any(found.values())


def test_what_a_client_downloaded_since_its_last_report_stands_at_its_next_one(tmp_path: Path) -> None:
    """Asynchronous clients download in one round and report in another, and three are at work in the end."""
    algorithm = FedBuff(buffer_size=1, concurrency=3)
    _, trainer = train(None, max_rounds=6, log_clients=True, logger=TensorBoardLogger(tmp_path), algorithm=algorithm)
    model = len(pack({"model": START, "buffers": {}}))
    points = [point for c in {r.cohort[0] for r in trainer.round_history} for point in client_bytes(trainer, c)]
    assert [down for _, _, down in points] == [model] * 6
    assert sum(up for _, up, _ in points) == sum(report.num_bytes_up for report in trainer.round_history)


@every_transform
def test_both_loops_give_the_same_bits_and_the_same_bytes(name: str) -> None:
    (lean, first), (real, second) = (train([TRANSFORMS[name]()], local_loop=loop) for loop in ("lean", "lightning"))
    assert_same_bits(lean, real)
    for one, other in zip(first.round_history, second.round_history, strict=True):
        assert (one.num_bytes_up, one.num_bytes_down) == (other.num_bytes_up, other.num_bytes_down)
    assert any(not torch.equal(lean[n], START[n]) for n in lean)
    plain, _ = train(None)
    assert any(not torch.equal(lean[n], plain[n]) for n in lean)


@every_transform
def test_asynchronous_rounds_in_step_and_a_pickled_codec_give_the_same_bits(name: str) -> None:
    """A buffer of everyone, who are equally fast, is FedAvg; and what a client's process is sent encodes alike."""
    steps = {"local_epochs": None, "local_steps": 1}
    if "shared" in name:  # decoded on a sum, which asynchronous rounds have none of
        with pytest.raises(MisconfigurationException, match=r"decoded on the sum of a round.*Write shared=False"):
            train([TRANSFORMS[name]()], algorithm=FedBuff(3, 3), **steps)
        return
    (buffered, first), (whole, second) = (
        train([TRANSFORMS[name]()], algorithm=algorithm, **steps) for algorithm in (FedBuff(3, 3), FedAvg())
    )
    assert_same_bits(buffered, whole)
    assert [r.num_bytes_up for r in first.round_history] == [r.num_bytes_up for r in second.round_history]
    codec, update = Codec([TRANSFORMS[name]()], 0, START), Contribution({"delta": START}, {"weight": 2.0})
    codec.init()
    task = ClientTask("a", 3, 17, {}, seed=0)
    assert pickle.loads(pickle.dumps(codec)).encode(update, task, {})[0] == codec.encode(update, task, {})[0]


@every_transform
def test_a_group_s_updates_are_encoded_as_those_of_its_clients_alone(name: str) -> None:
    """To rounding, which moves a code of a few bits or a place among the largest in few of them.

    A code of one bit knows no small change: an element that rounding puts on the other side of zero moves by twice its
    value. Some are zero but for rounding, like the sum of a softmax's gradients in a rotation. Other updates or other
    random numbers would be a whole apart, so a third still tells.
    """
    settings = {"max_rounds": 1, "local_loop": "lean", "num_lanes": 1}
    (grouped, first), (alone, second) = (train([TRANSFORMS[name]()], group_size=n, **settings) for n in (3, 1))
    moved = {n: alone[n] - START[n] for n in START}
    error = sum(float((grouped[n] - alone[n]).square().sum()) for n in START)
    allowed = 0.3 if name in {"eden 1", "quantize 1", "sign", "feedback sign"} else 0.01
    assert error <= allowed * sum(float(change.square().sum()) for change in moved.values())
    (one,), (other,) = first.round_history, second.round_history
    assert one.num_bytes_down == other.num_bytes_down
    assert abs(one.num_bytes_up - other.num_bytes_up) <= 24


@every_transform
def test_when_no_client_moves_the_model_stays(name: str) -> None:
    after, _ = train([TRANSFORMS[name]()], Still)
    assert_same_bits(after, START)


@pytest.mark.parametrize("transforms", [[], chain(), [TopK(1.0)], [RandomK(1.0)], [ErrorFeedback(chain())]])
def test_neutral_transforms_are_fedavg_to_the_bit(transforms: Any) -> None:
    plain, trainer = train(None)
    after, other = train(transforms)
    assert_same_bits(plain, after)
    if not transforms or (isinstance(transforms, Transform)):
        assert [r.num_bytes_up for r in trainer.round_history] == [r.num_bytes_up for r in other.round_history]


@pytest.mark.parametrize(
    "algorithm", [FedAvg(weights="uniform"), Scaffold(), MimeLite(0.5)], ids=lambda a: type(a).__name__
)
def test_every_tree_of_an_algorithm_passes_through(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaffold and MimeLite send two trees; both are coded, and finely coded they change little."""
    coded: set[str] = set()
    original = Quantize.encode_tree

    def watched(self: Quantize, tree: Any, exchange: Any, memory: Any) -> Any:
        coded.add(exchange.path.rpartition("/")[2])
        return original(self, tree, exchange, memory)

    monkeypatch.setattr(Quantize, "encode_tree", watched)
    exact, _ = train(None, algorithm=algorithm)
    after, _ = train([Quantize(16)], algorithm=algorithm)
    assert len(coded) == (1 if isinstance(algorithm, FedAvg) else 2)
    for name, value in exact.items():
        torch.testing.assert_close(after[name], value, atol=2e-3, rtol=1e-3)


def test_two_transforms_in_a_list_are_their_chain() -> None:
    listed, _ = train([TopK(0.3), Quantize(8)])
    chained, _ = train([chain(TopK(0.3), Quantize(8))])
    assert_same_bits(listed, chained)


def test_the_callback_is_the_transform() -> None:
    transform = ErrorFeedback(TopK(0.2))
    for loop in ("lean", "lightning"):
        direct, first = train([transform], local_loop=loop)
        through, second = train(None, client_callbacks=[Compression(transform)], local_loop=loop)
        assert_same_bits(direct, through)
        assert [r.num_bytes_up for r in first.round_history] == [r.num_bytes_up for r in second.round_history]


def test_bytes_in_the_report_are_lengths_of_byte_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    original = Codec.encode

    def watched(self: Codec, contribution: Contribution, task: ClientTask, memory: Any) -> Any:
        data, kept = original(self, contribution, task, memory)
        lengths.append(len(data))
        return data, kept

    monkeypatch.setattr(Codec, "encode", watched)
    _, trainer = train([TopK(0.2)])
    assert [r.num_bytes_up for r in trainer.round_history] == [sum(lengths[i : i + 3]) for i in (0, 3, 6)]
    down = 3 * len(pack({"model": START, "buffers": {}}))
    assert [r.num_bytes_down for r in trainer.round_history] == [down] * 3
    monkeypatch.undo()
    _, plain = train(None)
    _, top = train([TopK(1.0)])
    # the same values, and nothing is written; beside them are names and shapes of the tensors, or one flat vector
    assert abs(plain.round_history[0].num_bytes_up - top.round_history[0].num_bytes_up) < 3 * 400


def test_a_new_process_for_each_client_gives_the_same_bits() -> None:
    transform = ErrorFeedback(chain(TopK(0.3), Quantize(4)))
    here, first = train([transform], max_rounds=2)
    there, second = train([transform], max_rounds=2, engine=SpawnedEngine(), local_loop="lightning")
    assert_same_bits(here, there)
    assert [r.num_bytes_up for r in first.round_history] == [r.num_bytes_up for r in second.round_history]


def test_a_contribution_that_is_not_finite_is_a_bad_update_of_its_client() -> None:
    with pytest.raises(BadUpdateError, match=r"Client 's1' failed in round 0: its contribution has NaN or infinite"):
        train([Quantize(8)], algorithm=Tampered())
    with pytest.warns(UserWarning, match="Client 's1' is skipped"):
        _, trainer = train([Quantize(8)], algorithm=Tampered(), on_bad_update="skip")
    assert all(report.cohort == ["s0", "s2"] and "s1" in report.skipped for report in trainer.round_history)


def tampering(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    original = Codec.encode

    def sent(self: Codec, contribution: Contribution, task: ClientTask, memory: Any) -> Any:
        data, kept = original(self, contribution, task, memory)
        return (change(data) if task.client_id == "s1" else data), kept

    monkeypatch.setattr(Codec, "encode", sent)


def flipped(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"", lambda d: bytes(5_000_000), flipped]
)
def test_a_bad_payload_names_its_client_and_the_round_goes_on(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tampering(monkeypatch, change)
    with pytest.raises(BadUpdateError, match=r"Client 's1' failed in round 0: .*(cannot be read|at most \d+ bytes)"):
        train([TopK(0.2)])
    with pytest.warns(UserWarning, match="Client 's1' is skipped"):
        after, trainer = train([TopK(0.2)], on_bad_update="skip")
    assert all(report.cohort == ["s0", "s2"] and "s1" in report.skipped for report in trainer.round_history)
    assert any(not torch.equal(after[n], START[n]) for n in after)
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(NotEnoughClientsError):
        train([TopK(0.2)], on_bad_update="skip", min_clients=3)


@pytest.mark.parametrize(("algorithm", "cohorts"), [(FedBuff(2, 3), {1, 2}), (FedAsync(0.5, 3), {0, 1})])
def test_asynchronous_rounds_go_on_without_a_bad_payload(
    algorithm: Algorithm, cohorts: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was the only update of its round: others are at work, and the server waits for them."""
    tampering(monkeypatch, flipped)
    with pytest.raises(BadUpdateError, match=r"Client 's1' failed in round \d: .*checksum.*send them again"):
        train([TopK(0.2)], algorithm=algorithm)
    with pytest.warns(UserWarning, match="Client 's1' is skipped"):
        after, trainer = train([TopK(0.2)], algorithm=algorithm, on_bad_update="skip", max_rounds=6)
    history = trainer.round_history
    assert {len(report.cohort) for report in history} == cohorts
    assert {client for report in history for client in report.cohort} == {"s0", "s2"}
    assert {client for report in history for client in report.skipped} == {"s1"}
    assert any(not torch.equal(after[n], START[n]) for n in after)


def test_an_asynchronous_federation_of_none_but_bad_clients_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Codec, "encode", lambda *_: (b"", None))
    monkeypatch.setattr(Patience, "__init__", lambda self: self.__dict__.update(most=2, _in_a_row=0))
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(NotEnoughClientsError, match=r"Round 2 needs"):
        train([TopK(0.2)], algorithm=FedAsync(0.5, 3), on_bad_update="skip", max_rounds=6)


def test_a_bad_payload_from_another_process_names_its_client() -> None:
    arguments = {"algorithm": Tampered(), "engine": SpawnedEngine(), "local_loop": "lightning", "max_rounds": 1}
    with pytest.warns(UserWarning, match="Client 's1' is skipped in round 0: its contribution has NaN or infinite"):
        _, trainer = train([Quantize(8)], on_bad_update="skip", **arguments)
    assert trainer.round_history[0].cohort == ["s0", "s2"]


def test_the_payload_of_another_round_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    def replayed(data: bytes) -> bytes:
        seen.append(data)
        return seen[0]

    tampering(monkeypatch, replayed)
    with pytest.raises(BadUpdateError, match=r"Client 's1' failed in round 1: .*\[client, round, dispatch\]"):
        train([TopK(0.2)])


def test_what_is_decoded_on_the_sum_is_refused_where_every_update_is_needed() -> None:
    class NeedsAll(FedAvg):
        linear = False

    with pytest.raises(MisconfigurationException, match=r"RandomK.*is decoded on the sum.*Write shared=False"):
        train([RandomK(0.5, shared=True)], algorithm=NeedsAll())


PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
import transforms_ddp
if __name__ == "__main__":
    transforms_ddp.main(int(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_two_ranks_give_the_same_bits_as_one(tmp_path: Path) -> None:
    here = Path(__file__).parent
    results = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        (folder / "script.py").write_text(PROGRAM.format(paths=[str(here), str(here.parent / "spine")]))
        environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")}
        command = [sys.executable, "script.py", str(devices), str(folder)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = torch.load(folder / "weights.pt", weights_only=True)
        results.append((found, json.loads((folder / "history.json").read_text())))
    for name, own in results[0][0].items():
        assert_same_bits(own, results[1][0][name])
    assert results[0][1] == results[1][1]
