"""States merged over clients give the value of torchmetrics on the pooled data, in every order and tree of merges."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, r2_score, roc_auc_score
from torch import Tensor
from torchmetrics import (
    CatMetric,
    MaxMetric,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    MinMetric,
    PearsonCorrCoef,
    R2Score,
    SpearmanCorrCoef,
    SumMetric,
)
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MultilabelF1Score,
)
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.regression import ConcordanceCorrCoef, ExplainedVariance, NormalizedRootMeanSquaredError
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.wrappers import (
    ClasswiseWrapper,
    MetricTracker,
    MinMaxMetric,
    MultioutputWrapper,
    MultitaskWrapper,
)
from torchmetrics.wrappers.transformations import BinaryTargetTransformer

from fl_lightning.metrics import (
    MetricState,
    has_cat_states,
    holds_examples,
    load_metric_state,
    merge_states,
    metric_state,
)

CLASSES = 4
SIZES = (37, 5, 90, 1, 64)  # clients
BATCHES = (16, 4, 32, 8, 64)  # no size but the last is a multiple: unequal last batches

Data = Callable[[torch.Generator, int], tuple[Any, ...]]


def classes(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    scores = torch.rand(size, CLASSES, generator=generator).softmax(-1)
    return scores, torch.randint(CLASSES, (size,), generator=generator)


def binary(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    target = torch.randint(2, (size,), generator=generator)
    return (0.4 * target + 0.6 * torch.rand(size, generator=generator)), target


def numbers(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    target = 3 + torch.randn(size, generator=generator)
    return target + 0.5 * torch.randn(size, generator=generator), target


def pairs(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    target = 3 + torch.randn(size, 2, generator=generator)
    return target + torch.tensor([0.2, 1.5]) * torch.randn(size, 2, generator=generator), target


def labels(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    return torch.rand(size, 3, generator=generator), torch.randint(2, (size, 3), generator=generator)


def ranked(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
    score, target = binary(generator, size)
    return score, target, torch.randint(4, (size,), generator=generator)


def values(generator: torch.Generator, size: int) -> tuple[Tensor]:
    return (torch.randn(size, generator=generator),)


def tasks(generator: torch.Generator, size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    (a, b), (c, d) = binary(generator, size), numbers(generator, size)
    return {"click": a, "price": c}, {"click": b, "price": d}


class Range(Metric):
    """A custom reduction, which takes the states of all clients at once, and a sum that does not start at zero."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("extent", torch.tensor([float("inf"), -float("inf")]), dist_reduce_fx=self.union)
        self.add_state("count", torch.tensor(10.0), dist_reduce_fx="sum")

    @staticmethod
    def union(stacked: Tensor) -> Tensor:
        return torch.stack([stacked[:, 0].min(), stacked[:, 1].max()])

    def update(self, value: Tensor) -> None:
        low, high = torch.minimum(self.extent[0], value.min()), torch.maximum(self.extent[1], value.max())
        self.extent = torch.stack([low, high])
        self.count += value.numel()

    def compute(self) -> Tensor:
        return torch.cat([self.extent, self.count[None]])


class InAList(Metric):
    """Keeps its metrics where ``nn.Module`` does not look for them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [MeanMetric(), {"not a metric": 1}, MaxMetric()]
        self.named = {"sum": SumMetric()}

    def update(self, value: Tensor) -> None:
        for part in (self.parts[0], self.parts[2], self.named["sum"]):
            part.update(value)

    def compute(self) -> Tensor:
        return torch.stack([self.parts[0].compute(), self.parts[2].compute(), self.named["sum"].compute()])

    def reset(self) -> None:
        super().reset()


TABLE: dict[str, tuple[Callable[[], Any], Data]] = {
    "mean": (MeanMetric, values),
    "sum": (SumMetric, values),
    "min": (MinMetric, values),
    "max": (MaxMetric, values),
    "mse": (MeanSquaredError, numbers),
    "mse of outputs": (lambda: MeanSquaredError(num_outputs=2), pairs),
    "r2": (R2Score, numbers),
    "r2 of outputs": (lambda: R2Score(multioutput="raw_values"), pairs),
    "pearson": (PearsonCorrCoef, numbers),
    "pearson of outputs": (lambda: PearsonCorrCoef(num_outputs=2), pairs),
    "concordance": (ConcordanceCorrCoef, numbers),
    "spearman": (SpearmanCorrCoef, numbers),
    "explained variance": (ExplainedVariance, numbers),
    "nrmse mean": (lambda: NormalizedRootMeanSquaredError(normalization="mean"), numbers),
    "nrmse std": (lambda: NormalizedRootMeanSquaredError(normalization="std"), numbers),
    "nrmse range": (lambda: NormalizedRootMeanSquaredError(normalization="range"), numbers),
    "nrmse l2 of outputs": (lambda: NormalizedRootMeanSquaredError(normalization="l2", num_outputs=2), pairs),
    "psnr (a mean state)": (lambda: PeakSignalNoiseRatio(data_range=5.0), numbers),
    "confusion matrix": (lambda: MulticlassConfusionMatrix(CLASSES), classes),
    "macro f1": (lambda: MulticlassF1Score(CLASSES, average="macro"), classes),
    "micro accuracy": (lambda: MulticlassAccuracy(CLASSES, average="micro"), classes),
    "macro accuracy": (lambda: MulticlassAccuracy(CLASSES, average="macro"), classes),
    "multilabel f1": (lambda: MultilabelF1Score(3, average="macro"), labels),
    "binned auroc": (lambda: BinaryAUROC(thresholds=50), binary),
    "exact auroc": (BinaryAUROC, binary),
    "multiclass auroc": (lambda: MulticlassAUROC(CLASSES), classes),
    "binned multiclass auroc": (lambda: MulticlassAUROC(CLASSES, thresholds=20), classes),
    "average precision": (BinaryAveragePrecision, binary),
    "calibration": (lambda: MulticlassCalibrationError(CLASSES), classes),
    "retrieval": (RetrievalMAP, ranked),
    "collection with compute groups": (
        lambda: MetricCollection(
            {"acc": MulticlassAccuracy(CLASSES), "f1": MulticlassF1Score(CLASSES), "p": MulticlassPrecision(CLASSES)}
        ),
        classes,
    ),
    "collection without": (
        lambda: MetricCollection([MulticlassAccuracy(CLASSES), MulticlassF1Score(CLASSES)], compute_groups=False),
        classes,
    ),
    "min max wrapper": (lambda: MinMaxMetric(MeanSquaredError()), numbers),
    "classwise wrapper": (lambda: ClasswiseWrapper(MulticlassAccuracy(CLASSES, average=None)), classes),
    "multioutput wrapper": (lambda: MultioutputWrapper(R2Score(), num_outputs=2), pairs),
    "multioutput pearson": (lambda: MultioutputWrapper(PearsonCorrCoef(), num_outputs=2), pairs),
    "multitask wrapper": (
        lambda: MultitaskWrapper({"click": MetricCollection([BinaryAUROC()]), "price": MeanSquaredError()}),
        tasks,
    ),
    "transformed target": (lambda: BinaryTargetTransformer(BinaryAUROC(), threshold=0.5), binary),
    "composition": (lambda: MeanSquaredError() + 2 * R2Score(), numbers),
    "custom reduction": (Range, values),
    "children in plain containers": (InAList, values),
}


def clients(make: Callable[[], Any], data: Data) -> tuple[list[Any], Any]:
    """Return a metric for each client, and one that saw all of it, in the clients' order and batches."""
    generator = torch.Generator().manual_seed(7)
    pooled, own = make(), []
    for size, batch in zip(SIZES, BATCHES, strict=True):
        metric = make()
        columns = data(generator, size)
        for start in range(0, size, batch):
            part = [_rows(column, start, start + batch) for column in columns]
            metric.update(*part)
            pooled.update(*part)
        own.append(metric)
    return own, pooled


def _rows(column: Any, start: int, end: int) -> Any:
    if isinstance(column, dict):
        return {name: values[start:end] for name, values in column.items()}
    return column[start:end]


def merges(states: list[MetricState]) -> Iterator[MetricState]:
    """Yield the states merged one after the other, backwards, shuffled, and in a balanced tree."""
    yield reduce(merge_states, states)
    yield reduce(merge_states, reversed(states))
    shuffled = states.copy()
    random.Random(3).shuffle(shuffled)
    yield reduce(lambda total, state: merge_states(state, total), shuffled)
    level = states
    while len(level) > 1:
        level = [reduce(merge_states, level[i : i + 2]) for i in range(0, len(level), 2)]
    yield level[0]


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# torchmetrics warns of its own single-class batches and of small samples; the pooled metric gives the same warnings
@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
@pytest.mark.parametrize("name", TABLE)
def test_merged_equals_pooled(name: str) -> None:
    make, data = TABLE[name]
    own, pooled = clients(make, data)
    expected = pooled.compute()
    for merged in merges([metric_state(metric) for metric in own]):
        assert_same(load_metric_state(make(), merged).compute(), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
@pytest.mark.parametrize("name", TABLE)
def test_a_client_without_data_is_neutral(name: str) -> None:
    make, data = TABLE[name]
    own, pooled = clients(make, data)
    states = [metric_state(make()), *(metric_state(metric) for metric in own), metric_state(make())]
    assert_same(load_metric_state(make(), reduce(merge_states, states)).compute(), pooled.compute())


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
@pytest.mark.parametrize("name", TABLE)
def test_the_state_outlives_the_metric_and_loading_leaves_the_metric_alone(name: str) -> None:
    make, data = TABLE[name]
    own, _ = clients(make, data)
    metric, other = own[0], own[2]
    expected, others = copy.deepcopy(metric).compute(), copy.deepcopy(other).compute()
    state = metric_state(metric)
    assert_same(load_metric_state(other, state).compute(), expected)  # what `other` holds does not count
    assert_same(copy.deepcopy(other).compute(), others)
    for again in data(torch.Generator().manual_seed(9), 6), data(torch.Generator().manual_seed(8), 6):
        metric.update(*again)
    metric.reset()
    assert_same(load_metric_state(make(), state).compute(), expected)


def test_a_naive_mean_of_clients_is_another_number() -> None:
    own, pooled = clients(lambda: MulticlassF1Score(CLASSES, average="macro"), classes)
    naive = sum(size * metric.compute() for size, metric in zip(SIZES, own, strict=True)) / sum(SIZES)
    assert abs(float(naive - pooled.compute())) > 1e-3  # the table above is about something


def test_sklearn_agrees() -> None:
    generator = torch.Generator().manual_seed(7)
    score, target = (torch.cat(parts) for parts in zip(*(binary(generator, size) for size in SIZES), strict=True))
    own, _ = clients(BinaryAUROC, binary)
    auroc = load_metric_state(BinaryAUROC(), reduce(merge_states, map(metric_state, own))).compute()
    assert auroc.item() == pytest.approx(roc_auc_score(target, score), abs=1e-6)
    own, _ = clients(BinaryAveragePrecision, binary)
    precision = load_metric_state(BinaryAveragePrecision(), reduce(merge_states, map(metric_state, own))).compute()
    assert precision.item() == pytest.approx(average_precision_score(target, score), abs=1e-6)


def test_sklearn_agrees_on_macro_f1_and_r2() -> None:
    generator = torch.Generator().manual_seed(7)
    score, target = (torch.cat(parts) for parts in zip(*(classes(generator, size) for size in SIZES), strict=True))
    own, _ = clients(lambda: MulticlassF1Score(CLASSES, average="macro"), classes)
    f1 = load_metric_state(MulticlassF1Score(CLASSES), reduce(merge_states, map(metric_state, own))).compute()
    assert f1.item() == pytest.approx(f1_score(target, score.argmax(-1), average="macro"), abs=1e-6)
    generator = torch.Generator().manual_seed(7)
    guess, truth = (torch.cat(parts) for parts in zip(*(numbers(generator, size) for size in SIZES), strict=True))
    own, _ = clients(R2Score, numbers)
    r2 = load_metric_state(R2Score(), reduce(merge_states, map(metric_state, own))).compute()
    assert r2.item() == pytest.approx(r2_score(truth, guess), abs=1e-5)  # sklearn computes in double precision


def test_cat_metric_keeps_every_value() -> None:
    a, b = CatMetric(), CatMetric()
    a.update(1.0), a.update([2.0, 3.0]), b.update(4.0)
    merged = merge_states(metric_state(a), metric_state(b))
    assert load_metric_state(CatMetric(), merged).compute().tolist() == [1.0, 2.0, 3.0, 4.0]


def test_tracker_merges_step_by_step() -> None:
    own = []
    for shift in (0.0, 10.0):
        tracker = MetricTracker(MeanMetric(), maximize=False)
        for step in range(3):
            tracker.increment()
            tracker.update(torch.arange(2.0 + step) + shift)
        own.append(metric_state(tracker))
    merged = load_metric_state(MetricTracker(MeanMetric(), maximize=False), merge_states(*own))
    assert merged.compute_all().tolist() == [5.5, 6.0, 6.5]


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
@pytest.mark.parametrize("name", TABLE)
def test_cat_states_are_announced(name: str) -> None:
    exact = {"spearman", "exact auroc", "multiclass auroc", "average precision", "calibration", "retrieval"}
    exact |= {"multitask wrapper", "transformed target"}
    make, data = TABLE[name]
    metric = make()
    assert has_cat_states(metric) == (name in exact)
    metric.update(*data(torch.Generator().manual_seed(1), 8))
    assert holds_examples(metric_state(metric)) == (name in exact)
