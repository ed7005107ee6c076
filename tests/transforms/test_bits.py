"""Packing against NumPy's own bits and against what information theory allows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fl_lightning.transforms.bits import CHUNK, pack_bits, pack_indices, unpack_bits, unpack_indices
from fl_lightning.transforms.draws import Dither, Draws
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.levels import Levels
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


def test_thresholds_are_uniform_and_any_two_are_independent() -> None:
    """Also those of different pieces at the same place, which come from the same entry of the table."""
    trials, pairs = 4000, []
    for seed in range(trials):
        thresholds, out = Dither(Draws(seed), bits=2, base=8), np.empty(3, np.float32)
        thresholds.fill(out)
        first = out.copy()
        thresholds.fill(out)
        pairs.append((*first[:2], *out[:2]))
    parts = 4 * (np.array(pairs, np.float64) - 8) - 0.5  # thresholds stand in the middle of parts
    found = parts.astype(np.int64)
    assert np.array_equal(found, parts)
    assert found.min() == 0
    assert found.max() == 3
    for one, other in ((0, 1), (0, 2), (1, 2), (0, 3), (2, 3)):
        counts = np.bincount(4 * found[:, one] + found[:, other], minlength=16)
        chi_square = float(((counts - trials / 16) ** 2 / (trials / 16)).sum())
        assert chi_square < 60  # 15 degrees of freedom: one in five million; equal ones would give 12,000


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12])
def test_the_mean_of_a_rounded_value_is_exact_to_the_resolution_of_the_thresholds(bits: int) -> None:
    """Over all thresholds, the mean of a code is the value to within half of one of them: no sample, a sum over all."""
    fraction = min(16, 24 - bits)
    values = np.array([0.0, 0.3, -0.7, 1e-3, -1.0, 1.0], np.float32)
    sums, num = np.zeros(len(values)), 1 << fraction

    class All:
        def fill(self, out: np.ndarray) -> None:
            # in the middle of a part, unless float32 has no bit left for that
            out[:] = 2 ** (bits - 1) + (self.threshold + (0.5 if bits + fraction < 24 else 0)) / num

    levels, every, codes = Levels(bits, Draws(0)), All(), np.empty(len(values), np.uint8 if bits <= 8 else np.uint16)
    levels._dither = every  # type: ignore[assignment]
    out = np.empty(len(values), np.float32)
    for every.threshold in range(num):
        levels.round(values, np.ones(1, np.float32), codes)
        levels.values(codes, np.ones(1, np.float32), out)
        sums += out
    step = 2 if bits == 1 else 1 / levels.steps
    assert np.abs(sums / num - values).max() <= step / num / 2 + 1e-6


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
