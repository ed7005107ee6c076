"""Packing against NumPy's own bits and against what information theory allows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fl_lightning.transforms.bits import CHUNK, Draws, pack_bits, pack_indices, unpack_bits, unpack_indices
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.selection import largest


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("num", [0, 1, 7, 8, 1000, CHUNK, CHUNK + 13])
def test_codes_of_every_width_survive(bits: int, num: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, num).astype(np.uint16)
    packed = pack_bits(codes, bits)
    assert packed.nbytes == bits * math.ceil(num / 8)
    assert np.array_equal(unpack_bits(packed, bits, num), codes)


@pytest.mark.parametrize(("num", "total"), [(1, 1), (1, 10**9), (50, 50), (400, 1000), (1000, 10**5), (3, 70_000)])
def test_indices_survive_in_a_bitmap_and_in_elias_fano(num: int, total: int) -> None:
    rng = np.random.default_rng(num)
    ends = np.array([0, total - 1]) if num > 1 else np.array([total - 1])  # the first and the last place as well
    indices = np.unique(np.concatenate([ends, rng.integers(0, total, num * 3)]))
    indices = np.unique(np.concatenate([ends, rng.permutation(indices)[: max(0, num - len(ends))]]))
    if num == total:
        indices = np.arange(total)
    assert np.array_equal(unpack_indices(pack_indices(indices, total), len(indices), total), indices)


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.01, 0.001])
def test_indices_cost_little_more_than_any_code_needs(fraction: float) -> None:
    total = 10**6
    num = int(total * fraction)
    indices = Draws(1).subset(num, total)
    needed = (math.lgamma(total + 1) - math.lgamma(num + 1) - math.lgamma(total - num + 1)) / math.log(2)
    used = 8 * len(pack_indices(indices, total))
    assert needed <= used <= needed + 0.6 * num + 64


def test_bytes_that_are_no_indices_are_refused() -> None:
    good = pack_indices(np.array([5, 900, 901]), 1000)
    with pytest.raises(PayloadError, match=r"expected 9 bytes for 3 of 1000 indices, got 8"):
        unpack_indices(good[:-1], 3, 1000)
    for position in range(len(good)):
        for bit in range(8):
            changed = good.copy()
            changed[position] ^= 1 << bit
            try:
                found = unpack_indices(changed, 3, 1000)
            except PayloadError:
                continue
            assert len(found) == 3
            assert (np.diff(found) > 0).all()
            assert found[-1] < 1000
    with pytest.raises(PayloadError, match=r"expected 3 increasing indices below 20"):
        unpack_indices(np.packbits(np.ones(20, np.bool_)), 3, 20)
    with pytest.raises(PayloadError, match=r"expected 4 bytes for 9 codes of 2 bits, got 3"):
        unpack_bits(np.zeros(3, np.uint8), 2, 9)


@pytest.mark.parametrize(("num", "total"), [(1, 6), (3, 6), (5, 6), (6, 6)])
def test_every_place_is_drawn_equally_often(num: int, total: int) -> None:
    counts = np.zeros(total)
    trials = 4000
    for seed in range(trials):
        subset = Draws(seed).subset(num, total)
        assert len(set(subset.tolist())) == num
        counts[subset] += 1
    expected = trials * num / total
    assert np.abs(counts - expected).max() <= 5 * math.sqrt(expected * (1 - num / total)) + 1e-9


def test_draws_are_the_stream_that_numpy_promises_to_keep() -> None:
    """The raw words of SFC64 with this seed, written down once; a NumPy that changes them would break old payloads."""
    raw = np.random.SFC64(12345).random_raw(4).view(np.uint32)
    assert np.array_equal(Draws(12345).uniform(8), (raw >> 8).astype(np.float32) / np.float32(2**24))
    assert raw.tolist()[:5] == [2604400194, 821209534, 4158632599, 1315034560, 3985874950]
    uniform = Draws(0).uniform(100_001)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(float(uniform.mean()) - 0.5) < 0.005
    signs = Draws(0).signs(100_001)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.015


@pytest.mark.parametrize("kind", ["normal", "heavy", "constant", "sorted", "sparse", "periodic"])
@pytest.mark.parametrize("num", [1, 50, 3000, 60_000])
def test_the_largest_are_exactly_those_of_a_stable_sort(kind: str, num: int) -> None:
    """Whatever the sample guesses: constant and periodic values defeat it, and sparse ones leave it nothing to see."""
    rng = np.random.default_rng(3)
    size = 200_000
    x = {
        "normal": lambda: rng.standard_normal(size),
        "heavy": lambda: rng.standard_cauchy(size),
        "constant": lambda: np.full(size, -2.0),
        "sorted": lambda: np.arange(size, dtype=np.float64),
        "sparse": lambda: np.where(rng.random(size) < 1e-3, rng.standard_normal(size), 0.0),
        "periodic": lambda: np.tile(np.arange(8.0), size // 8),
    }[kind]().astype(np.float32)
    expected = np.sort(np.argsort(-np.abs(x), kind="stable")[:num])
    assert np.array_equal(largest([x[:70_001], x[70_001:]], num), expected)
