"""Bad input gets an error that says what to write instead, before anyone trains in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spine_zoo import Classifier, fit_federated, sites
from transforms_zoo import tree

from fl_lightning import ErrorFeedback, Quantize, RandomK, TopK, chain
from fl_lightning.callbacks import Compression
from fl_lightning.errors import MisconfigurationException
from fl_lightning.transforms import (
    Cast,
    Chain,
    Codec,
    CompressedBroadcast,
    Eden,
    PowerSGD,
    Sign,
    Transform,
    TreeTransform,
)


class Around(Transform):
    """Holds another transform; its own repr does not show what, and another one's shows a name."""

    def __init__(self, inner: Transform | None = None, note: str = "") -> None:
        self.inner, self.note = inner, note

    def __repr__(self) -> str:
        return f"Around({self.note})"


def test_a_name_in_a_text_is_no_error_feedback() -> None:
    ErrorFeedback(Around(note="not ErrorFeedback(...)"))
    CompressedBroadcast(Around(note="not ErrorFeedback(...)"))


@pytest.mark.parametrize("kind", [TopK, RandomK])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, r"expected fraction in \(0, 1\], got 0.0\. For a number of elements write \w+\(k=\.\.\.\)"),
        ({"fraction": 1.5}, r"expected fraction in \(0, 1\], got 1.5"),
        ({"fraction": -0.1}, r"expected fraction in \(0, 1\], got -0.1"),
        ({"fraction": float("nan")}, r"expected fraction in \(0, 1\], got nan"),
        ({"fraction": True}, r"expected fraction in \(0, 1\], got True"),
        ({"fraction": "few"}, r"expected fraction in \(0, 1\], got 'few'"),
        ({"k": 0}, r"expected k to be an integer >= 1, got 0"),
        (
            {"k": 0.5},
            r"expected k to be an integer >= 1, got 0.5\. For a part of the elements write \w+\(fraction=0.01",
        ),
        ({"k": True}, r"expected k to be an integer >= 1, got True"),
        ({}, r"expected one of fraction and k, got fraction=None and k=None"),
        ({"fraction": 0.1, "k": 3}, r"expected one of fraction and k, got fraction=0.1 and k=3"),
    ],
)
def test_how_many_elements(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__} {message}"):
        kind(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantize(0), r"expected bits to be an integer from 1 to 16, got 0\. .*Cast\('float16'\)"),
        (lambda: Quantize(17), r"expected bits to be an integer from 1 to 16, got 17"),
        (lambda: Quantize(8.0), r"expected bits to be an integer from 1 to 16, got 8.0"),  # type: ignore[arg-type]
        (lambda: Quantize(8, block=0), r"expected block to be an integer >= 1"),
        (lambda: Sign(block=-1), r"expected block to be an integer >= 1"),
        (lambda: Quantize(8, norm="1"), r"expected norm='max' or norm='2', got '1'"),  # type: ignore[arg-type]
        (lambda: Quantize(1, norm="2"), r"use norm='max', or bits=2"),
        (lambda: Eden(5), r"Eden expected bits to be an integer from 1 to 4, got 5.*Quantize"),
        (lambda: Cast("int8"), r"Cast expected dtype to be one of .*, got 'int8'"),
        (lambda: PowerSGD(0), r"PowerSGD expected rank to be an integer >= 1, got 0"),
        (lambda: PowerSGD(2, iterations=0), r"PowerSGD expected iterations to be an integer >= 1, got 0"),
        (lambda: ErrorFeedback(0.1), r"ErrorFeedback expected a transform, got 0.1\. Write ErrorFeedback\(TopK"),  # type: ignore[arg-type]
        (lambda: ErrorFeedback(ErrorFeedback(TopK(0.1))), r"leave one out"),
        (lambda: ErrorFeedback(chain(ErrorFeedback(TopK(0.1)))), r"leave one out"),
        (lambda: CompressedBroadcast("x"), r"CompressedBroadcast expected a transform, got 'x'"),  # type: ignore[arg-type]
        (lambda: CompressedBroadcast(ErrorFeedback(TopK(0.1))), r"leave ErrorFeedback out"),
        (lambda: Compression(0.1), r"Compression expected a transform, got 0.1"),  # type: ignore[arg-type]
        (lambda: chain(TopK(0.1), "q8"), r"Expected transforms such as TopK\(0.01\), got 'q8'"),  # type: ignore[arg-type]
        (
            lambda: chain(TopK(0.1), ErrorFeedback(Quantize(8))),
            r"ErrorFeedback stands behind TopK, .*ErrorFeedback\(chain\(TopK\(\.\.\.\), \.\.\.\)\)",
        ),
        (
            lambda: chain(ErrorFeedback(chain(TopK(0.1), Cast("float16"))), ErrorFeedback(Quantize(8))),
            r"stands behind ErrorFeedback, .*: ErrorFeedback\(chain\(TopK\(\.\.\.\), Cast\(\.\.\.\), \.\.\.\)",
        ),
        (lambda: ErrorFeedback(Around(chain(Around(ErrorFeedback(Sign()))))), r"leave one out"),
        (lambda: CompressedBroadcast(Around(ErrorFeedback(Sign()))), r"leave ErrorFeedback out"),
        (lambda: Chain([Quantize(8), chain(ErrorFeedback(Sign()))]), r"ErrorFeedback stands behind Quantize"),
    ],
)
def test_constructors(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (TopK(k=152), r"TopK\(k=152\) is larger than the update, which has 151 elements\. Take a smaller k"),
        (RandomK(k=200), r"RandomK\(k=200\) is larger than the update, which has 151 elements"),
        (TopK(k=13, per_tensor=True), r"TopK\(k=13\) is larger than the tensor 'b', which has 12 elements"),
        (ErrorFeedback(TopK(k=152)), r"TopK\(k=152\) is larger than the update"),
        (CompressedBroadcast(TopK(k=152)), r"TopK\(k=152\) is larger than the update"),
        (chain(TopK(k=10), RandomK(k=11)), r"RandomK\(k=11\) is larger than the update, which has 10 elements"),
        (chain(Quantize(8), TopK(0.1)), r"TopK has nothing to encode: .*Sparsify first and quantise last"),
    ],
)
def test_what_a_model_does_not_allow(transform: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Codec([transform], 0, tree()).init()


def test_the_start_of_a_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ({"transforms": [TopK(k=1000)]}, {"client_callbacks": [Compression(TopK(k=1000))]}):
        with pytest.raises(MisconfigurationException, match=r"TopK\(k=1000\) is larger than the update, which has 27"):
            fit_federated(Classifier(), sites(1), **arguments)
    for wrong in (["top-k"], "top-k", [TopK], {"a": TopK(0.1)}):
        with pytest.raises(MisconfigurationException, match=r"Expected transforms"):
            fit_federated(Classifier(), sites(1), transforms=wrong)


def test_a_transform_without_its_halves_says_what_to_define() -> None:
    class Half(TreeTransform):
        pass

    with pytest.raises(NotImplementedError, match=r"Half must define encode_tree"):
        Half().encode_tree({"w": torch.ones(1)}, None, {})  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"Half must define decode_tree"):
        Half().decode_tree({}, None, None, {})  # type: ignore[arg-type]
