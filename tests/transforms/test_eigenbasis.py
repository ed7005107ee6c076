"""Coordinates of earlier rounds against torch's singular values, and codes of few numbers against their entropy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from spine_zoo import QUIET, Classifier, assert_same_bits, fit_federated, fit_plain, loader, sites, weights
from torch import Tensor
from transforms_zoo import task, vector

from fl_lightning import ErrorFeedback, FedBuff, FederatedTrainer, Quantize, Scaffold, TopK, chain
from fl_lightning.callbacks import Compression
from fl_lightning.errors import MisconfigurationException
from fl_lightning.transforms import Codec, DeadZone, Eigenbasis, PayloadError
from fl_lightning.transforms.sparse_bits import pack_sparse, unpack_sparse
from fl_lightning.types import ClientTask, Contribution
from fl_lightning.wire import pack


def matrix(seed: int, rows: int = 40, columns: int = 60, rank: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)


def after_rounds(updates: list[dict[str, Tensor]], transform: Any) -> tuple[Codec, ClientTask, dict[str, Any]]:
    """Return a codec whose server has seen the sums of some rounds, and the task of a client in the next one."""
    codec = Codec([transform], 0, updates[0])
    state = codec.init()
    for round, update in enumerate(updates):
        _, state = codec.finish(Contribution({"delta": update}, {"weight": 1.0}), round, state)
    sent, num_bytes, state = codec.broadcast({"model": updates[0]}, ["a"], 3, state)
    assert num_bytes == [len(pack(sent))]
    return codec, ClientTask("a", 3, 17, sent, seed=0), state


def test_its_coordinates_are_torchs_singular_values() -> None:
    """After a round with the sum G, the coordinates of G are its singular values, in the order of their size."""
    update = {"w": matrix(0)}
    codec, own, _ = after_rounds([update], Eigenbasis())
    payload, _ = codec.transform.encode(Contribution({"delta": update}), codec._exchange(own), {})
    values = payload.contribution.trees["delta"][""]
    expected = torch.linalg.svdvals(update["w"])[:5]
    found = values.abs().sort(descending=True).values
    torch.testing.assert_close(found[:5], expected, rtol=2e-3, atol=1e-2)
    assert float(found[5:].norm()) < 0.01 * float(expected.norm())
    assert set(values.abs().topk(5).indices.tolist()) <= set(range(25))  # five by five of 2400 come first


def test_lengths_stay_and_everything_comes_back() -> None:
    update = {"w": torch.randn(12, 30), "b": torch.randn(12), "k": torch.randn(6, 3, 2, 2), "s": torch.tensor(2.0)}
    codec, own, _ = after_rounds([{n: torch.randn_like(t) for n, t in update.items()} for _ in range(3)], Eigenbasis())
    payload, _ = codec.transform.encode(Contribution({"delta": update}), codec._exchange(own), {})
    length = math.sqrt(sum(float(t.square().sum()) for t in update.values()))
    assert float(payload.contribution.trees["delta"][""].norm()) == pytest.approx(length, rel=1e-3)
    data, _ = codec.encode(Contribution({"delta": update}, {"weight": 1.0}), own, {})
    back = codec.decode(data, own).trees["delta"]
    for name, tensor in update.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-2, atol=5e-3)
        assert not (name != "b" and name != "s" and torch.equal(back[name], tensor))  # it was turned, and turned back


def test_what_is_alike_from_round_to_round_takes_fewer_bytes() -> None:
    """Against the same code without the basis, at the same error."""
    left, right = torch.linalg.qr(torch.randn(80, 80)).Q, torch.linalg.qr(torch.randn(90, 90)).Q

    def update() -> dict[str, Tensor]:
        size = 0.8 ** torch.arange(80.0)[:, None] * 0.8 ** torch.arange(90.0)
        return {"w": left @ (torch.randn(80, 90) * size) @ right.T}

    new = update()
    found = {}
    for name, transform in {"turned": chain(Eigenbasis(), DeadZone(0.5)), "as it is": DeadZone(0.5)}.items():
        codec, own, _ = after_rounds([update() for _ in range(30)], transform)
        data, _ = codec.encode(Contribution({"delta": new}, {"weight": 1.0}), own, {})
        error = float((codec.decode(data, own).trees["delta"]["w"] - new["w"]).norm() / new["w"].norm())
        found[name] = (len(data), error)
    assert found["turned"][0] < 0.5 * found["as it is"][0]
    assert found["turned"][1] < 1.1 * found["as it is"][1]


def test_long_sides_and_vectors_stay_as_they_are() -> None:
    update = {"w": torch.randn(8, 50), "b": torch.randn(8)}
    _, own, state = after_rounds([update], Eigenbasis(longest=20))
    names = set(own.broadcast["transforms/0"])
    assert names == {"w#rows", "w#rows size", "w#power", "b#power"}
    assert state["0"]["grams"]["w#rows"].shape == (8, 8)


@pytest.mark.parametrize("algorithm", [None, Scaffold()], ids=["fedavg", "scaffold"])
def test_clients_use_the_basis_that_they_downloaded(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    original = Eigenbasis.encode

    def watched(self: Eigenbasis, contribution: Any, exchange: Any, memory: Any) -> Any:
        seen.append(set(exchange.public_tree()))
        return original(self, contribution, exchange, memory)

    monkeypatch.setattr(Eigenbasis, "encode", watched)
    arguments = {} if algorithm is None else {"algorithm": algorithm}
    transforms = [ErrorFeedback(chain(Eigenbasis(), DeadZone(1.0)))]
    trainer = fit_federated(Classifier(hidden=6), sites(3), transforms=transforms, max_rounds=3, **arguments)
    assert not any(seen[:3])
    assert all(len(names) > 4 for names in seen[3:])
    first, second, third = (report.num_bytes_down for report in trainer.round_history)
    assert first < second == third


def test_a_client_under_way_keeps_the_basis_of_its_version() -> None:
    """FedBuff decodes an update in the basis in which it was encoded; with another one it would be nonsense."""

    def fit(transforms: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = Classifier(hidden=6)
        fit_federated(module, sites(6), transforms=transforms, max_rounds=6, algorithm=FedBuff(2, concurrency=5))
        return weights(module)

    exact = fit([])
    for name, value in fit([Eigenbasis()]).items():
        torch.testing.assert_close(value, exact[name], atol=2e-3, rtol=1e-2)


def test_the_basis_survives_a_resume_to_the_bit(tmp_path: Path) -> None:
    start, ends = weights(Classifier(hidden=6)), []
    for stop in (None, 2):
        folder = tmp_path / str(stop)
        arguments: dict[str, Any] = {
            **QUIET, "default_root_dir": str(folder), "enable_checkpointing": True, "num_threads": 1,
            "transforms": [ErrorFeedback(chain(Eigenbasis(), DeadZone(1.0)))],
        }  # fmt: skip
        pl.seed_everything(3, verbose=False)
        for rounds in (4,) if stop is None else (stop, 4):
            module = Classifier(hidden=6)
            module.load_state_dict(start)
            trainer = FederatedTrainer(
                max_rounds=rounds, callbacks=[ModelCheckpoint(folder, save_last=True)], **arguments
            )
            path = str(folder / "last.ckpt") if rounds == 4 and stop else None
            trainer.fit(module, sites(3), ckpt_path=path)
        ends.append(weights(module))
    assert_same_bits(*ends)


def test_a_plain_trainer_learns_the_basis_too() -> None:
    callback, module = Compression(chain(Eigenbasis(), DeadZone(1.0))), Classifier(hidden=6)
    for _ in range(2):
        fit_plain(module, loader(), callbacks=[callback])
    assert set(callback.state_dict()["state"]["0"]["grams"]) > {"net.0.weight#rows"}
    twin = Compression(chain(Eigenbasis(), DeadZone(1.0)))
    twin.load_state_dict(callback.state_dict())
    ends = []
    for each in (callback, twin):
        copy = Classifier(hidden=6)
        copy.load_state_dict(module.state_dict())
        fit_plain(copy, loader(), callbacks=[each])
        ends.append(weights(copy))
    assert_same_bits(*ends)


def test_what_cannot_be_turned_is_refused_at_the_start() -> None:
    with pytest.raises(MisconfigurationException, match=r"has no matrix to turn\. Put it first, as in chain"):
        Codec([chain(TopK(0.5), Eigenbasis())], 0, {"w": torch.zeros(4, 4)}).init()
    with pytest.raises(MisconfigurationException, match=r"Eigenbasis\(longest=3\) has no matrix to turn"):
        Codec([Eigenbasis(longest=3)], 0, {"w": torch.zeros(4, 4)}).init()
    with pytest.raises(MisconfigurationException, match=r"Eigenbasis has nothing to encode"):
        Codec([chain(Quantize(8), Eigenbasis())], 0, {"w": torch.zeros(4, 4)}).init()
    with pytest.raises(MisconfigurationException, match=r"expected longest to be an integer >= 1, got 0"):
        Eigenbasis(longest=0)


# ---- few numbers among many zeros --------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 5, 256, 257, 100_000])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("largest", [1, 3, 40, 100_000])
def test_codes_come_back(total: int, density: float, largest: int) -> None:
    draw = np.random.default_rng(total + largest)
    values = np.where(draw.random(total) < density, draw.integers(1, largest + 1, total), 0)
    values = values * draw.choice([-1, 1], total)
    places = np.flatnonzero(values)
    found, codes = unpack_sparse(*pack_sparse(places, values[places], total), total)
    assert np.array_equal(found, places)
    assert np.array_equal(codes, values[places])


def test_the_code_is_close_to_the_entropy() -> None:
    """Of Laplacian numbers that grow smaller, as a basis leaves them: at most a seventh above what any code needs."""
    draw, total = np.random.default_rng(0), 200_000
    scale = 20 * np.exp(-np.arange(total) / 9000)
    values = np.trunc(draw.laplace(0, scale)).astype(np.int64)
    theta = np.exp(-1 / scale)
    sizes = np.abs(values)
    zero = 1 - theta  # trunc: |x| < 1
    probability = np.where(sizes == 0, zero, theta**sizes * (1 - theta) / 2)
    entropy = -np.log2(probability).sum() / 8
    counts, _, data = pack_sparse(np.flatnonzero(values), values[values != 0], total)
    assert entropy < len(data) + 2 * len(counts) < 1.15 * entropy


def pack_sparse_list(places: list[int], values: list[int], total: int) -> list[Any]:
    counts, powers, data = pack_sparse(np.array(places), np.array(values), total)
    return [counts, powers, torch.from_numpy(data)]


def test_bytes_that_are_no_codes_are_refused() -> None:
    counts, powers, data = pack_sparse(np.array([3, 4, 700]), np.array([1, -9, 2]), 1000)
    for wrong in (data[:-1], np.concatenate([data, data[:1]]), data[:0]):
        with pytest.raises(PayloadError):
            unpack_sparse(counts, powers, wrong, 1000)
    for bad in ([300], [-1], [1.0], [True], [0] * 50):
        with pytest.raises(PayloadError, match="expected"):
            unpack_sparse(bad, [0] * len(bad), data, 1000)
    with pytest.raises(PayloadError, match="a power below"):
        unpack_sparse(counts, [60] * len(counts), data, 1000)
    codec = Codec([DeadZone(1.0)], 0, {"w": torch.zeros(9)})
    data_, _ = codec.encode(Contribution({"delta": {"w": torch.arange(9.0)}}, {"weight": 1.0}), task(), {})
    assert codec.decode(data_, task()).trees["delta"]["w"].any()
    huge = codec.transform.parts[0].decode_tree(  # type: ignore[attr-defined]
        {}, [3e38, *pack_sparse_list([0, 1], [1, 9], 9)], codec._exchange(task()), codec._model
    )
    assert huge["w"].isinf().tolist() == [False, True, *[False] * 7]  # which the codec then refuses, without a warning
    for unit in (math.inf, -1.0, math.nan, "1", True):
        with pytest.raises(PayloadError, match="expected a finite step"):
            codec.transform.parts[0].decode_tree(  # type: ignore[attr-defined]
                {}, [unit, [], [], torch.zeros(0, dtype=torch.uint8)], codec._exchange(task()), codec._model
            )


def test_a_dead_zone_rounds_as_by_hand() -> None:
    x = torch.tensor([2.0, -0.59, 0.61, 1.59, -1.61, 0.0])
    unit = float(x.square().mean().sqrt())
    assert (vector(DeadZone(1.0), x) / unit).tolist() == pytest.approx(
        [math.copysign(math.floor(abs(v) / unit + 0.4), v) for v in x.tolist()]
    )
    for scale in (1e-38, 1e-30, 1e30, 3e38):
        found = vector(DeadZone(0.5), x / 2 * scale)
        assert torch.isfinite(found).all()
        assert found.any()


@pytest.mark.parametrize("step", [0, -1.0, math.inf, math.nan, True, "1"])
def test_steps_and_zones_are_checked(step: Any) -> None:
    with pytest.raises(MisconfigurationException, match="expected step to be a positive number"):
        DeadZone(step)
    with pytest.raises(MisconfigurationException, match=r"expected zone in \[0.5, 1\)"):
        DeadZone(1.0, zone=1.0)
