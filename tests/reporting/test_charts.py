from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.data import TensorDataset
from torch.utils.tensorboard import SummaryWriter

import fl_lightning.reporting.charts as charts
from fl_lightning.data import Dirichlet
from fl_lightning.errors import MisconfigurationException
from fl_lightning.reporting import RoundCharts, add_client_histograms, client_layout, spread_metrics
from fl_lightning.types import ClientId, RoundReport


@dataclass
class Result:
    client_id: ClientId
    num_examples: int
    update_norm: float
    records: list[Any] = field(default_factory=list)
    num_bytes_up: int = 7


class Source:
    """Data that know their labels."""

    def label_counts(self) -> Any:
        return ["a", "b"], [0, 1], np.array([[5, 1], [0, 6]])


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[TensorBoardLogger]:
    logger = TensorBoardLogger(tmp_path, version=0)
    yield logger
    logger.finalize("success")


@pytest.fixture
def values(raw_events: Callable[..., Any]) -> Callable[[TensorBoardLogger], list[tuple[int, Any]]]:
    def read(logger: TensorBoardLogger) -> list[tuple[int, Any]]:
        logger.experiment.flush()
        return [(event.step, value) for event in raw_events(Path(logger.log_dir)) for value in event.summary.value]

    return read


def test_a_round_s_histograms_hold_the_cohort(logger: TensorBoardLogger, values: Callable[..., Any]) -> None:
    loss = [("add_scalar", ("loss", value, step), {}) for step, value in enumerate((9.0, 0.25))]
    results = [Result("a", 10, 0.5, loss), Result("b", 30, 1.5, num_bytes_up=9), Result("late", 1000, 99.0, loss)]
    report = RoundReport(round=4, cohort=["a", "b"], num_bytes_up=16, num_bytes_down=50)
    RoundCharts([logger]).round(report, results)
    found = [value for step, value in values(logger) if step == 4]
    histograms = {value.tag: value.histo for value in found if value.HasField("histo")}
    scalars = {v.tag: v.simple_value or v.tensor.float_val[0] for v in found if not v.HasField("histo")}
    assert scalars == {"num_bytes/up": 16.0, "num_bytes/down": 50.0}
    assert {tag: (h.num, h.sum, h.min, h.max) for tag, h in histograms.items()} == {
        "round/update_norm": (2, 2.0, 0.5, 1.5),
        "round/num_examples": (2, 40.0, 10.0, 30.0),
        "round/num_bytes_up": (2, 16.0, 7.0, 9.0),
        "round/loss": (1, 0.25, 0.25, 0.25),  # the last value of the round
    }


def test_what_is_not_finite_is_no_bar(tmp_path: Path, raw_events: Callable[..., Any]) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        add_client_histograms(writer, 1, {"some": {1: 2.0, 2: math.nan, 3: math.inf}, "none": {1: math.nan}})
    ((tag, histogram),) = [(v.tag, v.histo) for event in raw_events(tmp_path) for v in event.summary.value]
    assert (tag, histogram.num, histogram.max) == ("some", 1, 2.0)


@pytest.mark.parametrize(
    "drawn",
    [[1.0], [2.0] * 3, [0.0, 30.0], range(31), [0.1, 0.3, 0.7, 0.9], np.random.default_rng(0).normal(size=99)],
    ids=["one", "equal", "ends", "edges", "few", "many"],
)  # fmt: skip
def test_a_histogram_is_the_one_that_torch_writes(tmp_path: Path, raw_events: Callable[..., Any], drawn: Any) -> None:
    with SummaryWriter(str(tmp_path / "ours")) as writer:
        add_client_histograms(writer, 1, {"some": dict(enumerate(map(float, drawn)))})
    with SummaryWriter(str(tmp_path / "torch")) as writer:
        writer.add_histogram("some", np.asarray(drawn, dtype=float), 1, bins=30)
    ours, theirs = (
        [value for event in raw_events(tmp_path / who) for value in event.summary.value] for who in ("ours", "torch")
    )
    assert ours == theirs


def test_values_that_differ_in_the_last_bit_are_drawn(tmp_path: Path, raw_events: Callable[..., Any]) -> None:
    close = [1.0, float(np.nextafter(1.0, 2.0))]  # too close for torch, which raises
    with SummaryWriter(str(tmp_path)) as writer:
        add_client_histograms(writer, 1, {"some": dict(enumerate(close))})
    ((histogram,),) = [[v.histo for v in event.summary.value] for event in raw_events(tmp_path) if event.summary.value]
    assert sum(histogram.bucket) == 2


def test_the_spread_has_five_numbers() -> None:
    accuracy = {client: client / 20 for client in range(20)}
    assert spread_metrics("clients/val_acc", accuracy) == pytest.approx(
        {
            "clients/val_acc/min": 0.0,
            "clients/val_acc/median": np.median(list(accuracy.values())),
            "clients/val_acc/max": 0.95,
            "clients/val_acc/worst_decile": 0.025,
            "clients/val_acc/std": np.std(list(accuracy.values())),
        }
    )
    assert spread_metrics("clients/val_loss", accuracy)["clients/val_loss/worst_decile"] == pytest.approx(0.925)


def layouts(values: list[tuple[int, Any]]) -> list[Any]:
    return [
        layout_pb2.Layout.FromString(value.tensor.string_val[0])
        for _, value in values
        if value.tag == "custom_scalars__config__"
    ]


def test_the_layout_is_written_once_and_again_when_it_grows(
    logger: TensorBoardLogger, values: Callable[..., Any]
) -> None:
    pictures = RoundCharts([logger])
    for _ in range(3):
        assert pictures.spread("clients/acc", {1: 0.5, 2: 0.7})["clients/acc/min"] == 0.5
    assert len(layouts(values(logger))) == 1
    pictures.spread("clients/loss", {1: 0.5})
    first, second = layouts(values(logger))
    assert [chart.title.split(":")[0] for chart in first.category[0].chart] == ["acc"]
    assert [chart.title.split(":")[0] for chart in second.category[0].chart] == ["acc", "loss"]
    series = second.category[0].chart[0].margin.series[0]
    assert (series.lower, series.value, series.upper) == tuple(f"clients/acc/{n}" for n in ("min", "median", "max"))


def test_the_layout_names_what_the_spread_logs() -> None:
    logged = [*spread_metrics("clients/f1(a+b)", {1: 0.5}), "clients/f1(a+b)", "clients/f1(a+b)/more", "x/clients/f1"]
    for category in client_layout(["clients/f1(a+b)"]).values():
        for kind, tags in category.values():
            if kind == "Margin":
                assert set(tags) <= set(logged)
            else:
                found = [[name for name in logged if re.search(tag, name)] for tag in tags]
                assert found == [["clients/f1(a+b)"], ["clients/f1(a+b)/median"], ["clients/f1(a+b)/worst_decile"]]


def test_the_partition_is_a_picture(logger: TensorBoardLogger, values: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib")
    RoundCharts([logger]).partition(Source())
    ((step, value),) = values(logger)
    assert (step, value.tag) == (0, "data/partition")
    assert value.image.width > 400


def test_data_without_labels_and_machines_without_matplotlib(
    logger: TensorBoardLogger, values: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unlabelled:
        def label_counts(self) -> Any:
            raise MisconfigurationException("no labels")

    def missing(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'matplotlib'")

    pictures = RoundCharts([logger])
    pictures.partition(TensorDataset())
    pictures.partition(Unlabelled())
    monkeypatch.setattr(charts, "partition_figure", missing)
    pictures.partition(Source())
    assert values(logger) == []


def test_without_tensorboard_only_numbers(tmp_path: Path) -> None:
    pictures = RoundCharts([CSVLogger(tmp_path)])
    pictures.partition(Dirichlet(num_clients=2, alpha=1.0))
    pictures.round(RoundReport(round=0, cohort=[1]), [Result(1, 1, 1.0)])
    assert pictures.spread("clients/acc", {1: 0.5})["clients/acc/max"] == 0.5
    assert list(tmp_path.iterdir()) == []
