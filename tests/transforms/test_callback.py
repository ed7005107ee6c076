"""``Compression`` in a plain ``lightning.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spine_zoo import Classifier, fit_plain, loader, weights
from torch import Tensor

from fl_lightning import ErrorFeedback, Quantize, RandomK, TopK, chain
from fl_lightning.callbacks import Compression
from fl_lightning.errors import MisconfigurationException


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def fit(callbacks: list[Any], start: dict[str, Tensor], **arguments: Any) -> dict[str, Tensor]:
    module = Classifier()
    module.load_state_dict(start)
    fit_plain(module, loader(), callbacks=callbacks, **arguments)
    return weights(module)


def test_the_update_of_a_fit_is_what_the_transform_leaves() -> None:
    start = weights(Classifier())
    change = flat(fit([], start)) - flat(start)
    compressed = flat(fit([Compression(TopK(k=5))], start)) - flat(start)
    largest = change.abs().topk(5).indices
    expected = torch.zeros_like(change).index_copy(0, largest, change[largest])
    torch.testing.assert_close(compressed, expected, atol=1e-7, rtol=1e-6)
    assert int((compressed != 0).sum()) == 5
    shared = flat(fit([Compression(RandomK(0.5, shared=True))], start)) - flat(start)
    assert int((shared != 0).sum()) == 14  # of 27, and the sum of one client is decoded


def test_a_neutral_transform_changes_no_bit() -> None:
    start = weights(Classifier())
    plain = fit([], start)
    after = fit([Compression(chain())], start)
    assert all(torch.allclose(plain[n], after[n], atol=1e-7) for n in plain)


def test_bytes_and_residual_are_kept_over_fits_and_in_checkpoints(tmp_path: Path) -> None:
    start = weights(Classifier())
    callback = Compression(ErrorFeedback(chain(TopK(k=4), Quantize(8))))
    first = flat(fit([callback], start)) - flat(start)
    assert 0 < callback.num_bytes < 27 * 4 + 700
    change = flat(fit([], start)) - flat(start)
    residual = flat(callback.state_dict()["memory"]["0"]["residual"]["delta"])
    torch.testing.assert_close(first + residual, change, atol=1e-6, rtol=1e-5)
    twin = Compression(ErrorFeedback(chain(TopK(k=4), Quantize(8))))
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    ends = [fit([each], start) for each in (callback, twin)]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in start)
    alone = fit([Compression(ErrorFeedback(chain(TopK(k=4), Quantize(8))))], start)
    assert any(not torch.equal(ends[0][n], alone[n]) for n in start)


def test_k_larger_than_the_update_is_refused_at_the_start() -> None:
    with pytest.raises(MisconfigurationException, match=r"TopK\(k=99\) is larger than the update"):
        fit([Compression(TopK(k=99))], weights(Classifier()))
