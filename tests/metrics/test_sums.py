"""MetricSums obey the laws of a sum, and say what they leave out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix

from fl_lightning.metrics import (
    LeftOut,
    Max,
    Mean,
    MetricSums,
    Min,
    Part,
    TorchmetricPart,
    Total,
    metric_state,
)
from fl_lightning.wire import pack, unpack


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = MeanMetric()
        self.scores = MetricCollection({"acc": MulticlassAccuracy(3), "matrix": MulticlassConfusionMatrix(3)})
        self.auroc = BinaryAUROC()
        self.layer = nn.Linear(1, 1)


def level(*values: float) -> TorchmetricPart:
    metric = MeanMetric()
    for value in values:
        metric.update(value)
    return TorchmetricPart("level", metric_state(metric))


def sums(seed: int) -> MetricSums:
    torch.manual_seed(seed)
    a, b, c, d = torch.randn(4).tolist()
    shared = Mean(a * 3, 3.0)
    parts: dict[str, Part] = {"loss": shared, "loss_epoch": shared, "steps": Total(b), "low": Min(c), "high": Max(d)}
    return MetricSums({**parts, "level": level(*torch.randn(seed % 3 + 1).tolist())})


def test_merging_is_associative_with_a_neutral_element_and_commutes() -> None:
    a, b, c = sums(1), sums(2), sums(3)
    module = Module()
    left, right = a.merge(b).merge(c).compute(module), a.merge(b.merge(c)).compute(module)
    assert left == pytest.approx(right, rel=1e-6)
    assert b.merge(a).compute(module) == pytest.approx(a.merge(b).compute(module), rel=1e-6)
    assert MetricSums().merge(a).compute(module) == a.merge(MetricSums()).compute(module) == a.compute(module)
    assert MetricSums().compute() == {}


def test_values_by_hand() -> None:
    left = MetricSums(
        {"loss": Mean(6.0, 2.0), "n": Total(1.0), "low": Min(3.0), "high": Max(3.0), "level": level(1, 2)}
    )
    right = MetricSums({"loss": Mean(1.0, 8.0), "n": Total(2.0), "low": Min(-1.0), "high": Max(7.0), "level": level(6)})
    assert left.merge(right).compute(Module()) == {"loss": 0.7, "n": 3.0, "low": -1.0, "high": 7.0, "level": 3.0}


def test_a_name_that_one_client_logged_counts_for_that_client() -> None:
    merged = MetricSums({"a": Mean(1.0, 1.0)}).merge(MetricSums({"b": Mean(4.0, 2.0)}))
    assert merged.compute() == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("part", [Min, Max, Total, lambda value: Mean(value, 1.0)])
def test_nan_wins_in_either_order(part: type[Min]) -> None:
    bad, good = MetricSums({"x": part(math.nan)}), MetricSums({"x": part(1.0)})
    assert math.isnan(bad.merge(good).compute()["x"])
    assert math.isnan(good.merge(bad).compute()["x"])


def test_the_wire_changes_nothing_and_sends_a_shared_part_once() -> None:
    both = level(1, 2)
    before = MetricSums({"level": both, "level_epoch": both, "loss": Mean(0.1, 3.0), "no": LeftOut("because")})
    tree = before.to_tree()
    assert len(tree["parts"]) == 3
    after = MetricSums.from_tree(unpack(pack(tree)))
    assert after["level"] is after["level_epoch"]
    assert after.evaluate(Module()) == before.evaluate(Module())
    assert list(after) == list(before)
    merged = after.merge(before)
    assert merged["level"] is merged["level_epoch"]  # merged once


def test_what_is_left_out_has_a_reason() -> None:
    module = Module()
    module.scores["matrix"].update(torch.tensor([1]), torch.tensor([1]))
    parts: dict[str, Part] = {
        "matrix": TorchmetricPart("scores.matrix", metric_state(module.scores["matrix"])),
        "empty": TorchmetricPart("level", metric_state(module.level)),
        "weightless": Mean(0.0, 0.0),
        "window": LeftOut("no order"),
        "loss": Mean(1.0, 1.0),
    }
    values, left_out = MetricSums(parts).evaluate(module)
    assert values == {"loss": 1.0}
    assert left_out["matrix"].startswith("MulticlassConfusionMatrix computes a tensor of shape (3, 3), not one number")
    assert left_out["empty"] == "no client updated the metric 'level'"
    assert left_out["weightless"] == "no example is behind it"
    assert left_out["window"] == "no order"


def test_leaving_out_absorbs() -> None:
    ours, theirs = MetricSums({"x": LeftOut("mixed")}), MetricSums({"x": Mean(1.0, 1.0)})
    assert ours.merge(theirs).compute() == theirs.merge(ours).compute() == {}


def test_a_metric_in_a_collection_is_found_and_left_alone() -> None:
    client, server = Module(), Module()
    client.scores.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
    server.scores.update(torch.tensor([0]), torch.tensor([1]))
    before = server.scores["acc"].compute().item()
    part = TorchmetricPart("scores.acc", metric_state(client.scores["acc"]))
    assert MetricSums({"acc": part}).compute(server)["acc"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert server.scores["acc"].compute().item() == before


def test_names_with_examples() -> None:
    module = Module()
    module.auroc.update(torch.tensor([0.2, 0.9]), torch.tensor([0, 1]))
    parts: Mapping[str, Part] = {"auroc": TorchmetricPart("auroc", metric_state(module.auroc)), "level": level(1)}
    assert MetricSums(parts).names_with_examples() == ["auroc"]


@pytest.mark.parametrize("attribute", ["absent", "layer", "scores.absent"])
def test_a_module_without_the_metric_is_an_error(attribute: str) -> None:
    part = TorchmetricPart(attribute, level(1).state)
    with pytest.raises(MisconfigurationException, match=rf"Expected a torchmetrics object at '{attribute}'"):
        MetricSums({"x": part}).compute(Module())
    with pytest.raises(
        MisconfigurationException, match="of the module, where clients logged one, got NoneType on NoneType"
    ):
        MetricSums({"x": part}).compute()


def test_two_ways_of_logging_one_name_are_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"Expected 'x' to be logged in one way.*Mean and Max"):
        MetricSums({"x": Mean(1.0, 1.0)}).merge(MetricSums({"x": Max(1.0)}))
    other = TorchmetricPart("other", level(1).state)
    with pytest.raises(MisconfigurationException, match="the metric 'level' and the metric 'other'"):
        MetricSums({"x": level(1)}).merge(MetricSums({"x": other}))
    wrong = TorchmetricPart("level", metric_state(BinaryAUROC()))
    with pytest.raises(
        MisconfigurationException, match="The metric logged as 'x' cannot be merged: Expected states of one"
    ):
        MetricSums({"x": level(1)}).merge(MetricSums({"x": wrong}))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"parts": []}, "Expected a tree with 'parts' and 'names'"),
        ({"parts": [], "names": {"x": 0}}, "Expected names of 0 parts"),
        (
            {"parts": [{"kind": "median", "value": 1.0}], "names": {"x": 0}},
            "Expected a part of kind mean, .* at part 0",
        ),
        ({"parts": [{"kind": "mean", "total": 1.0}], "names": {"x": 0}}, r"Expected the fields of Mean.*\['total'\]"),
        ({"parts": [{"kind": "total", "value": "1"}], "names": {"x": 0}}, "Expected numbers at part 0"),
        ({"parts": [{"kind": "metric", "attribute": "a", "state": {}}], "names": {}}, "Expected a metric state with"),
    ],
)
def test_a_malformed_tree_is_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetricSums.from_tree(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": -1}, "Expected a count of updates"),
        ({"states": {"a": {"reduce": "sum", "value": [1.0], "dtype": "float32"}}}, "Expected tensors with a reduction"),
        ({"states": {"a": {"reduce": "exec", "value": torch.ones(1), "dtype": "float32"}}}, "at part 0.a"),
        ({"states": {"a": {"reduce": "sum", "value": torch.ones(1), "dtype": "load"}}}, "Expected tensors with"),
        ({"children": {"c": {}}}, "Expected a metric state with .* at part 0.c"),
    ],
)
def test_a_malformed_state_is_refused(change: dict[str, object], message: str) -> None:
    state = {**level(1.0).state, **change}
    with pytest.raises(ValueError, match=message):
        MetricSums.from_tree({"parts": [{"kind": "metric", "attribute": "a", "state": state}], "names": {"x": 0}})
