"""Robust rules against NumPy, SciPy and the paper's own formulas."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from robust_zoo import cohort_of, joined
from scipy import optimize, stats

from fl_lightning.algorithms import FedAvg
from fl_lightning.algorithms.fltrust import FLTrust
from fl_lightning.algorithms.robust import (
    ALittleIsEnough,
    Cohort,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    RobustAlgorithm,
    TrimmedMean,
)
from fl_lightning.algorithms.robust.geometric import embedded
from fl_lightning.algorithms.robust.krum import squared_distances
from fl_lightning.types import Contribution


def updates(count: int, size: int = 41, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(size=(count, size))


@pytest.fixture(params=[2**22, 24], ids=["one block", "many blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with tensors whole and cut into blocks of a few coordinates."""
    monkeypatch.setattr(Cohort, "block_elements", request.param)


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_the_median_is_numpys(count: int) -> None:
    rows = updates(count)
    assert np.array_equal(joined(CoordinateMedian().aggregate(cohort_of(rows))), np.median(rows, axis=0))


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.2), (10, 0.25), (7, 0.4), (30, 0.1), (5, 0.0)])
def test_the_trimmed_mean_is_scipys(count: int, fraction: float) -> None:
    rows = updates(count)
    expected = stats.trim_mean(rows, fraction, axis=0)
    assert np.allclose(joined(TrimmedMean(fraction).aggregate(cohort_of(rows))), expected, rtol=1e-14, atol=1e-15)


def test_trimming_f_from_both_ends() -> None:
    rows = updates(9)
    expected = np.sort(rows, axis=0)[2:-2].mean(axis=0)
    assert np.allclose(joined(TrimmedMean(f=2).aggregate(cohort_of(rows))), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("shares", [None, [1.0, 5.0, 2.0, 0.5, 3.0, 1.0, 1.0]])
def test_the_geometric_median_minimises_the_distances(shares: list[float] | None) -> None:
    rows = updates(7, size=9)
    p = np.ones(7) if shares is None else np.array(shares)

    def objective(v: NDArray[Any]) -> float:
        return float(p @ np.linalg.norm(rows - v, axis=1))

    best = optimize.minimize(objective, rows.mean(axis=0), method="BFGS", options={"gtol": 1e-9})
    found = joined(GeometricMedian(smoothing=1e-12, tolerance=1e-15).aggregate(cohort_of(rows, shares)))
    assert objective(found) <= best.fun + 1e-10
    assert np.allclose(found, best.x, atol=1e-5)


def test_three_iterations_are_the_papers_loop_on_whole_vectors() -> None:
    """Algorithm 2 of the paper, written out; the rule runs it on coordinates from a QR decomposition."""
    rows = updates(6) * np.array([1, 1, 1, 1, 50, 1e7])[:, None]
    v = rows.mean(axis=0)
    for _ in range(3):
        beta = 1 / np.maximum(1e-6, np.linalg.norm(rows - v, axis=1))
        v = beta @ rows / beta.sum()
    found = joined(GeometricMedian(max_iterations=3, tolerance=1e-300).aggregate(cohort_of(rows)))
    assert np.allclose(found, v, rtol=1e-8, atol=1e-8 * np.abs(v).max())


def test_a_huge_update_does_not_blur_the_coordinates_of_the_others() -> None:
    rows = updates(6)
    rows[2] *= 1e14
    points = embedded(cohort_of(rows)).numpy()
    for i, j in itertools.combinations([0, 1, 3, 4, 5], 2):
        expected = np.linalg.norm(rows[i] - rows[j])
        assert np.isclose(np.linalg.norm(points[i] - points[j]), expected, rtol=1e-12)


def krum_by_hand(rows: NDArray[Any], f: int) -> list[float]:
    scores = []
    for i in range(len(rows)):
        distances = sorted(float(((rows[i] - rows[j]) ** 2).sum()) for j in range(len(rows)) if j != i)
        scores.append(sum(distances[: len(rows) - f - 2]))
    return scores


@pytest.mark.parametrize(("count", "f"), [(5, 1), (10, 2), (9, 3), (4, 0)])
def test_krum_takes_the_update_that_the_paper_takes(count: int, f: int) -> None:
    for seed in range(5):
        rows = updates(count, seed=seed)
        scores = krum_by_hand(rows, f)
        assert np.array_equal(joined(Krum(f).aggregate(cohort_of(rows))), rows[int(np.argmin(scores))])


@pytest.mark.parametrize("m", [None, 1, 3])
def test_multi_krum_averages_the_best(m: int | None) -> None:
    rows = updates(10)
    best = np.argsort(krum_by_hand(rows, 2), kind="stable")[: 6 if m is None else m]
    assert np.allclose(joined(MultiKrum(2, m).aggregate(cohort_of(rows))), rows[best].mean(axis=0), rtol=1e-13)


def test_equal_updates_are_at_distance_zero_beside_a_huge_one() -> None:
    rows = np.stack([updates(1)[0] * 0.1] * 4 + [np.full(41, 1e12)]).astype(np.float32)
    assert np.array_equal(squared_distances(cohort_of(rows)).numpy()[:4, :4], np.zeros((4, 4)))
    assert np.array_equal(joined(Krum(1).aggregate(cohort_of(rows))), rows[0])


@pytest.mark.parametrize("shares", [None, [1.0, 5.0, 2.0, 0.5]])
def test_clipping_bounds_each_update(shares: list[float] | None) -> None:
    rows = updates(4) * np.array([1e-3, 1.0, 5.0, 1e6])[:, None]
    p = np.ones(4) / 4 if shares is None else np.array(shares) / sum(shares)
    norms = np.linalg.norm(rows, axis=1)
    expected = p @ (rows * np.minimum(1, 2.0 / norms)[:, None])
    assert (norms > 2).tolist() == [False, True, True, True]
    assert np.allclose(joined(NormClipping(2.0).aggregate(cohort_of(rows, shares))), expected, rtol=1e-12)


def test_fltrust_is_equation_4_of_the_paper() -> None:
    own = updates(1, seed=3)[0]
    rows = own + updates(6) * np.array([1, 2, 3, 1, 2, 3])[:, None]
    rows[3] = -own
    rows[4] = 0.0
    cosines = np.array([row @ own / (np.linalg.norm(row) * np.linalg.norm(own)) if row.any() else 0.0 for row in rows])
    trust = np.maximum(cosines, 0)
    assert trust[3] == trust[4] == 0
    with np.errstate(invalid="ignore"):
        scaled = np.nan_to_num(rows / np.linalg.norm(rows, axis=1)[:, None]) * np.linalg.norm(own)
    expected = trust @ scaled / trust.sum()
    assert np.allclose(joined(FLTrust(root=[]).aggregate(cohort_of(rows, root=own))), expected, rtol=1e-12)


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_with_nobody_to_trust_the_model_stays(sign: float) -> None:
    own = updates(1)[0]
    found = joined(FLTrust(root=[]).aggregate(cohort_of(np.stack([sign * own] * 3), root=own)))
    assert np.array_equal(found, np.zeros(41))


def test_without_a_step_of_the_server_the_model_stays() -> None:
    found = joined(FLTrust(root=[]).aggregate(cohort_of(updates(3), root=np.zeros(41))))
    assert np.array_equal(found, np.zeros(41))


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        (CoordinateMedian(2), 0.10),
        (TrimmedMean(f=2), 0.10),
        (GeometricMedian(2), 0.08),
        (Krum(2), 0.21),
        (MultiKrum(2), 0.09),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, RobustAlgorithm) else "",
)
def test_two_byzantine_clients_of_ten(rule: RobustAlgorithm, most: float) -> None:
    """Honest updates with a fifth of noise: their mean is .07 away; published .090, .088, .076 and .195."""
    draw = np.random.default_rng(1)
    truth = draw.normal(size=2001)
    rows = truth + 0.2 * draw.normal(size=(10, 2001))
    rows[[3, 8]] = 5e6 * draw.normal(size=(2, 2001))

    def error(found: NDArray[Any]) -> float:
        return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))

    assert error(rows.mean(axis=0)) > 5e5
    assert 0.05 < error(joined(rule.aggregate(cohort_of(rows)))) < most


def test_the_running_statistics_of_a_liar_do_not_count() -> None:
    values = [1.0, 2.0, 3.0, 1e9, 4.0]
    sent = [
        Contribution(
            {"delta": {}, "buffers": {"var": torch.tensor([v * n]), "count": torch.tensor(n * v)}}, {"buffers": n}
        )
        for v, n in zip(values, [5.0, 1.0, 2.0, 1e6, 10.0], strict=True)
    ]
    sent.append(
        Contribution({"delta": {}, "buffers": {"var": torch.zeros(1), "count": torch.tensor(0.0)}}, {"buffers": 0.0})
    )
    found = Cohort("abcdef", sent).median_of_buffers()
    assert found["var"].tolist() == [3.0]
    assert float(found["count"]) == 3.0


@pytest.mark.parametrize("omniscient", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_a_little_is_enough_shifts_by_standard_deviations(omniscient: bool, linear: bool) -> None:
    rows, examples = updates(8), np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
    known = rows if omniscient else rows[[1, 2, 5]]
    forged = rows.copy()
    forged[[1, 2, 5]] = known.mean(axis=0) - 1.5 * known.std(axis=0)
    inner = FedAvg() if linear else CoordinateMedian()
    attack = ALittleIsEnough(inner, ["c001", "c002", "c005", "elsewhere"], z=1.5, omniscient=omniscient)
    sent = rows * examples[:, None] if linear else rows
    gradient, _ = attack.combine(cohort_of(sent, examples.tolist()), {}, 8)
    expected = examples @ forged / examples.sum() if linear else np.median(forged, axis=0)
    assert np.allclose(joined(gradient), -expected, rtol=1e-12, atol=1e-13)


def test_a_lonely_attacker_that_knows_nobody_is_honest() -> None:
    rows = updates(5)
    attack = ALittleIsEnough(CoordinateMedian(), ["c001"], z=3.0, omniscient=False)
    assert np.array_equal(-joined(attack.combine(cohort_of(rows), {}, 5)[0]), np.median(rows, axis=0))
