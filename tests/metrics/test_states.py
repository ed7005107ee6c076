"""What a state holds, which metrics have none that merges, and what torchmetrics' own merge would make of them."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection, R2Score
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric, MultioutputWrapper, Running

from fl_lightning.metrics import load_metric_state, merge_states, metric_state, state_num_bytes
from fl_lightning.wire import pack, unpack


class MeanOfBatches(Metric):
    """A mean state over updates, with the default ``full_state_update``."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("level", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, value: Tensor) -> None:
        self.level = self.level + (value.mean() - self.level) / self._update_count

    def compute(self) -> Tensor:
        return self.level


class MeanOfClients(Metric):
    """A custom reduction that counts every state, so that the state of an idle client would show."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("level", torch.tensor(0.0), dist_reduce_fx=lambda stacked: stacked.mean(0))

    def update(self, value: float) -> None:
        self.level = torch.tensor(value)

    def compute(self) -> Tensor:
        return self.level


class ResetsNothing(Metric):
    def __init__(self) -> None:
        super().__init__()
        self.parts = [MeanMetric()]

    def update(self, value: float) -> None:
        self.parts[0].update(value)

    def compute(self) -> Tensor:
        return self.parts[0].compute()

    def reset(self) -> None:
        """Leave the part as it is."""


class Words(Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("words", [], dist_reduce_fx=None)

    def update(self, word: str) -> None:
        self.words.append(word)

    def compute(self) -> Tensor:
        return torch.tensor(len(self.words))


def test_a_mean_state_is_weighted_by_update_counts_and_torchmetrics_refuses_it() -> None:
    few, many = MeanOfBatches(), MeanOfBatches()
    few.update(torch.tensor([8.0]))
    for value in (1.0, 2.0, 3.0):
        many.update(torch.tensor([value]))
    merged = load_metric_state(MeanOfBatches(), merge_states(metric_state(few), metric_state(many)))
    assert merged.compute().item() == pytest.approx((8 + 1 + 2 + 3) / 4)
    assert merged.update_count == 4
    with pytest.raises(RuntimeError, match="full_state_update"):
        few.merge_state(many)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_idle_client_does_not_count(position: int) -> None:
    own = [MeanOfClients(), MeanOfClients()]
    own[0].update(2.0)
    own[1].update(4.0)
    own.insert(position, MeanOfClients())
    merged = reduce(merge_states, map(metric_state, own))
    assert load_metric_state(MeanOfClients(), merged).compute().item() == 3.0


def test_two_idle_clients_stay_idle() -> None:
    merged = merge_states(metric_state(MeanOfBatches()), metric_state(MeanOfBatches()))
    loaded = load_metric_state(MeanOfBatches(), merged)
    assert loaded.update_count == 0
    assert loaded.level.item() == 0.0


def test_what_the_target_held_is_gone_even_where_no_client_has_anything() -> None:
    target = ResetsNothing()
    target.update(1.0)
    assert load_metric_state(target, metric_state(ResetsNothing())).parts[0].update_count == 0
    assert target.parts[0].update_count == 1


def test_a_classwise_wrapper_sends_its_metric_once() -> None:
    inner = MulticlassAccuracy(3, average=None)
    assert state_num_bytes(metric_state(ClasswiseWrapper(inner))) == state_num_bytes(metric_state(inner))


def test_a_state_is_plain_data() -> None:
    collection = MetricCollection([MulticlassAccuracy(3), MulticlassConfusionMatrix(3), BinaryAUROC()])
    collection["MulticlassAccuracy"].update(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]))
    collection["BinaryAUROC"].update(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
    state = metric_state(collection)
    again = unpack(pack(state))  # the wire takes tensors and primitives only
    loaded = load_metric_state(collection, again)
    assert loaded["MulticlassAccuracy"].compute() == collection["MulticlassAccuracy"].compute()
    assert loaded["BinaryAUROC"].compute() == 1.0
    # float32 scores as they are, labels int64: 2 * (4 + 8) bytes
    assert state_num_bytes(metric_state(collection["BinaryAUROC"])) == 24


def test_sums_travel_in_double_precision_and_come_back_as_they_were() -> None:
    small, large = MeanMetric(), MeanMetric()
    large.update(torch.tensor(2.0**24))
    small.update(torch.tensor(1.0))
    states = [metric_state(large), *[metric_state(small)] * 4]
    merged = states[0]
    for state in states[1:]:
        merged = merge_states(merged, state)  # in single precision 2**24 + 1 is 2**24
    assert merged["states"]["mean_value"]["value"].item() == 2.0**24 + 4
    assert load_metric_state(MeanMetric(), merged).mean_value.dtype == torch.float32


def test_a_metric_in_double_precision_stays_so() -> None:
    metric = MeanSquaredError().set_dtype(torch.float64)
    metric.update(torch.tensor([0.1], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    value = load_metric_state(MeanSquaredError(), metric_state(metric)).compute()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(0.01, rel=1e-15)


def test_bootstrap_replicas_merge_one_by_one() -> None:
    torch.manual_seed(0)
    own = [BootStrapper(MeanMetric(), num_bootstraps=3) for _ in range(2)]
    for metric in own:
        metric.update(torch.randn(50))
    merged = load_metric_state(BootStrapper(MeanMetric(), num_bootstraps=3), merge_states(*map(metric_state, own)))
    for index, replica in enumerate(merged.metrics):
        total = sum(metric.metrics[index].mean_value for metric in own)
        weight = sum(metric.metrics[index].weight for metric in own)
        assert replica.compute().item() == pytest.approx((total / weight).item(), abs=1e-6)
    assert merged.compute()["std"] > 0


def test_a_min_max_wrapper_forgets_extremes_of_single_clients() -> None:
    metric = MinMaxMetric(MeanMetric())
    metric.update(torch.tensor(100.0))
    metric.compute()  # leaves 100 as the maximum
    metric.reset()
    metric.update(torch.tensor(1.0))
    assert load_metric_state(metric, metric_state(metric)).compute()["max"].item() == 1.0
    assert metric.max_val.item() == 100.0


def test_a_metric_with_a_graph_loads() -> None:
    metric = MeanSquaredError()
    prediction = torch.ones(3, requires_grad=True) * 2
    metric(prediction, torch.zeros(3))  # the batch value keeps the graph, which deepcopy refuses
    assert metric._forward_cache.grad_fn is not None
    assert load_metric_state(metric, metric_state(metric)).compute().item() == 4.0


def test_a_loaded_metric_does_not_synchronise() -> None:
    def gather(*_: Any, **__: Any) -> list[Tensor]:
        raise AssertionError("synchronised")

    def in_a_group() -> MultioutputWrapper:
        return MultioutputWrapper(MeanSquaredError(dist_sync_fn=gather, distributed_available_fn=lambda: True), 2)

    metric = in_a_group()
    metric.update(torch.ones(3, 2), torch.zeros(3, 2))
    with pytest.raises(AssertionError, match="synchronised"):
        metric.compute()
    assert load_metric_state(in_a_group(), metric_state(metric)).compute().tolist() == [1.0, 1.0]


def test_running_windows_have_no_order_over_clients() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"got Running: a window.*Log the metric inside it \(MeanMetric"
    ):
        metric_state(MetricCollection({"recent": Running(MeanMetric(), window=3)}))


def test_a_synchronised_metric_is_refused() -> None:
    metric = MeanMetric()
    metric._is_synced = True
    with pytest.raises(MisconfigurationException, match=r"Expected a client's own MeanMetric.*unsync"):
        metric_state(metric)


def test_a_list_of_other_things_is_refused() -> None:
    metric = Words()
    metric.update("secret")
    with pytest.raises(MisconfigurationException, match=r"Expected tensors in the list state Words.words, got str"):
        metric_state(metric)


@pytest.mark.parametrize(
    ("left", "right"), [(MeanMetric(), R2Score()), (MinMaxMetric(MeanMetric()), MinMaxMetric(R2Score()))]
)
def test_other_metrics_do_not_merge(left: Any, right: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"Expected states of one metric, got MeanMetric\(.*R2Score\("):
        merge_states(metric_state(left), metric_state(right))


def test_other_shapes_do_not_merge() -> None:
    three, one = MulticlassConfusionMatrix(3), MulticlassConfusionMatrix(2)
    three.update(torch.tensor([2]), torch.tensor([2]))
    one.update(torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(MisconfigurationException, match=r"one shape.*sum of \(3, 3\) and sum of \(2, 2\).*num_classes"):
        merge_states(metric_state(three), metric_state(one))


def test_a_state_loads_only_in_its_metric() -> None:
    with pytest.raises(MisconfigurationException, match=r"Expected a state of R2Score.*got one of MeanMetric"):
        load_metric_state(R2Score(), metric_state(MeanMetric()))
    with pytest.raises(MisconfigurationException, match=r"'metrics.2'.*got one of MultioutputWrapper"):
        load_metric_state(MultioutputWrapper(R2Score(), 3), metric_state(MultioutputWrapper(R2Score(), 2)))
