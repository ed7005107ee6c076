"""Numbers over clients, against NumPy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.metrics import higher_is_better, spread


def test_against_numpy() -> None:
    generator = np.random.default_rng(0)
    values, weights = generator.normal(size=57), generator.integers(0, 9, size=57)
    out = spread(dict(enumerate(values.tolist())), dict(enumerate(weights.tolist())))
    mean = np.average(values, weights=weights)
    assert out["mean"] == pytest.approx(mean)
    assert out["std"] == pytest.approx(np.sqrt(np.average((values - mean) ** 2, weights=weights)))
    assert out["min"] == values.min()
    assert out["max"] == values.max()
    assert out["median"] == np.median(values)
    assert out["worst_decile"] == pytest.approx(np.sort(values)[:5].mean())


def test_the_worst_end_depends_on_the_direction() -> None:
    values: dict[str | int, float] = {i: float(i) for i in range(20)}
    assert spread(values)["worst_decile"] == 0.5
    assert spread(values, higher_is_better=False)["worst_decile"] == 18.5
    assert spread({"only": 3.0})["worst_decile"] == 3.0


def test_nan_does_not_count_and_nothing_is_nan() -> None:
    assert spread({"a": math.nan, "b": 1.0, "c": 3.0}, {"a": 5.0, "b": 1.0, "c": 1.0})["mean"] == 2.0
    assert all(math.isnan(value) for value in spread({"a": math.nan}).values())
    assert all(math.isnan(value) for value in spread({}).values())


def test_a_diverged_client_is_seen() -> None:
    out = spread({"a": math.inf, "b": -math.inf, "c": 0.0})
    assert (out["min"], out["median"], out["max"]) == (-math.inf, 0.0, math.inf)
    assert math.isnan(out["mean"])


def test_weights_of_zero_leave_no_mean() -> None:
    out = spread({"a": 1.0, "b": 2.0}, {"a": 0.0, "b": 0.0})
    assert math.isnan(out["mean"])
    assert out["median"] == 1.5


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": -2.0}, {"a": 1.0, "b": math.nan}])
def test_every_client_needs_a_weight(weights: dict[str | int, float]) -> None:
    with pytest.raises(MisconfigurationException, match=r"Expected a weight of 0 or more for client 'b', got"):
        spread({"a": 1.0, "b": 2.0}, weights)


@pytest.mark.parametrize(
    "name",
    ["loss", "val_loss", "train/loss_epoch", "val/xent_loss/dataloader_idx_1", "trainloss", "MeanSquaredError",
     "valMSE", "test_rmse", "mae", "MAE", "top1_error", "word_err", "wer", "KLDivergence", "perplexity", "val_nll2",
     "FID"],
)  # fmt: skip
def test_lower_is_better(name: str) -> None:
    assert not higher_is_better(name)


@pytest.mark.parametrize(
    "name", ["acc", "val_accuracy", "macro_f1", "AUROC", "r2", "glossary_hits", "maestro", "bleu", "mIoU"]
)
def test_higher_is_better(name: str) -> None:
    assert higher_is_better(name)
