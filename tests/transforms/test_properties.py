"""Unbiasedness, variance and contraction against closed forms, and values against torch."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from transforms_zoo import TRANSFORMS, decoded, tree, vector

from fl_lightning.transforms import Cast, DeadZone, Eden, PowerSGD, Quantize, RandomK, Sign, TopK, Transform, chain
from fl_lightning.transforms.base import Exchange
from fl_lightning.transforms.eden import lloyd_max

CONTRACTIONS = {
    "top": TopK(0.05),
    "top per tensor": TopK(0.05, per_tensor=True),
    "random": RandomK(0.05).contraction(),
    "quantize 1": Quantize(1).contraction(),
    "quantize 2": Quantize(2).contraction(),
    "quantize 8": Quantize(8).contraction(),
    "quantize qsgd": Quantize(3, norm="2").contraction(),
    "quantize blocks": Quantize(2, block=50).contraction(),
    "sign": Sign(),
    "cast": Cast("float8_e5m2"),
    "dead zone": DeadZone(3.0),
    "dead zone wide": DeadZone(1e9, zone=0.9),
    "eden 1": Eden(1).contraction(),
    "eden 4": Eden(4).contraction(),
    "low rank": PowerSGD(1),
    "top quantised": chain(TopK(0.1), Quantize(3)).contraction(),
}


def sample(num: int, seed: int = 0, heavy: bool = False) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(num, generator=draw)
    return x * torch.randn(num, generator=draw).exp() if heavy else x


def moments(transform: Transform, x: Tensor, trials: int) -> tuple[Tensor, Tensor, float]:
    """Return mean, standard error of the mean by element, and relative variance over seeds."""
    draws = torch.stack([vector(transform, x, seed) for seed in range(trials)]).double()
    variance = ((draws - x.double()) ** 2).sum(1).mean() / (x.double() ** 2).sum()
    return draws.mean(0), draws.std(0) / math.sqrt(trials), float(variance)


UNBIASED = {
    "random": RandomK(0.25),
    "random k": RandomK(k=3),
    "random per tensor": RandomK(0.25, per_tensor=True),
    "random shared": RandomK(0.25, shared=True),
    "quantize 1": Quantize(1),
    "quantize 2": Quantize(2),
    "quantize 5": Quantize(5),
    "quantize 12": Quantize(12),
    "quantize blocks": Quantize(2, block=7),
    "quantize qsgd": Quantize(3, norm="2"),
    "random quantised": chain(RandomK(0.5), Quantize(4)),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_over_seeds_is_the_value(name: str) -> None:
    transform = UNBIASED[name]
    assert transform.unbiased
    x = sample(40, heavy=True)
    trials = 1200
    mean, error, _ = moments(transform, x, trials)
    # an element that is drawn rarely shows a spread of zero when it never was: then its own size bounds the error
    largest = x.abs().max().double()
    closed_form = (x.abs().double() * largest / trials).sqrt()  # rounding within a step: variance <= |x| * step
    bound = 5 * torch.maximum(error, closed_form) + 1e-5 * float(largest)
    assert ((mean - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_random_k_has_the_variance_of_its_closed_form(fraction: float) -> None:
    x = sample(60)
    _, _, unbiased = moments(RandomK(fraction), x, 1000)
    assert unbiased == pytest.approx(1 / fraction - 1, rel=0.08)
    _, _, plain = moments(RandomK(fraction, unbiased=False), x, 1000)
    assert plain == pytest.approx(1 - fraction, rel=0.08)


def test_random_k_per_tensor_leaves_no_tensor_out() -> None:
    update = {"wide": torch.full((400,), 3.0), "small": torch.full((8,), -1.0)}
    transform, exchange = RandomK(0.25, per_tensor=True), Exchange(seed=1, round=0, client_id="a")
    opened, sealed, _ = transform.encode_tree(update, exchange, {})
    assert {name: tensor.numel() for name, tensor in opened.items()} == {"wide": 100, "small": 2}
    found = transform.decode_tree(opened, sealed, exchange, update)
    assert sorted(found["small"].tolist()) == [-4.0] * 2 + [0.0] * 6
    assert found["wide"].unique(return_counts=True)[1].tolist() == [300, 100]
    plain = transform.contraction()
    opened, sealed, _ = plain.encode_tree(update, exchange, {})
    assert int((plain.decode_tree(opened, sealed, exchange, update)["small"] == -1.0).sum()) == 2
    with pytest.raises(MisconfigurationException, match=r"RandomK\(k=9\) is larger than the tensor 'small'"):
        RandomK(k=9, per_tensor=True).init({"delta": update}, 0)


@pytest.mark.parametrize("norm", ["max", "2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("heavy", [False, True])
def test_qsgd_keeps_its_bounds(bits: int, norm: str, heavy: bool) -> None:
    """Alistarh et al. 2017, lemma 3.1: the variance, and with the 2-norm the number of non-zeros."""
    n, s = 400, 2 ** (bits - 1) - 1
    x = sample(n, seed=bits, heavy=heavy)
    transform = Quantize(bits, norm=norm)  # type: ignore[arg-type]
    _, _, variance = moments(transform, x, 80)
    assert 0 < variance <= min(n / s**2, math.sqrt(n) / s) * 1.02
    if norm == "2":
        non_zeros = sum(int((vector(transform, x, seed) != 0).sum()) for seed in range(80)) / 80
        assert non_zeros <= s * (s + math.sqrt(n))


def test_stochastic_rounding_has_the_variance_of_a_coin_by_hand() -> None:
    """Scale 1 and s = 1: x in (0, 1) becomes 1 with probability x, so its variance is x (1 - x)."""
    x = torch.tensor([1.0, 0.25, -0.5, 0.0])
    draws = torch.stack([vector(Quantize(2), x, seed) for seed in range(1500)])
    assert set(draws.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(draws[:, 3], torch.zeros(1500))
    assert torch.allclose(draws.var(0), torch.tensor([0.0, 0.1875, 0.25, 0.0]), atol=0.04)
    ones = torch.stack([vector(Quantize(1), x, seed) for seed in range(1500)])
    assert set(ones.unique().tolist()) == {-1.0, 1.0}
    assert torch.allclose(ones.mean(0), x, atol=0.1)


def test_rounding_to_the_nearest_level_is_torchs_own_rounding() -> None:
    x = sample(10_000)
    scale = float(x.abs().max())
    expected = (x / scale * 127).round().clamp(-127, 127) / 127 * scale
    torch.testing.assert_close(vector(Quantize(8, stochastic=False), x), expected, atol=scale / 127 * 1e-3, rtol=1e-5)
    per_channel = torch.fake_quantize_per_tensor_affine(x, scale / 7, 0, -7, 7)
    torch.testing.assert_close(vector(Quantize(4, stochastic=False), x), per_channel, atol=1e-5, rtol=1e-5)


def test_blocks_have_their_own_scales() -> None:
    x = torch.cat([sample(64) * 1e-6, sample(64, 1) * 1e3, sample(5, 2)])
    error = (vector(Quantize(8, stochastic=False, block=64), x) - x).abs()
    for begin, end in ((0, 64), (64, 128), (128, 133)):
        assert float(error[begin:end].max()) <= float(x[begin:end].abs().max()) / 127 / 2 * 1.01
    big = sample(200_000)  # blocks of a size that does not divide the pieces that are worked on
    close = (vector(Quantize(8, stochastic=False, block=1000), big) - big).abs().reshape(-1, 1000).amax(1)
    assert (close <= big.abs().reshape(-1, 1000).amax(1) / 127 / 2 * 1.01).all()


def test_extreme_scales_neither_overflow_nor_vanish() -> None:
    for size in (1e-44, 1e-38, 1e30, 3e38):
        x = torch.tensor([size, -size, size / 2, 0.0])
        for transform in (Quantize(8), Quantize(16), Quantize(1), Sign(), Cast("float16"), Cast("float8_e4m3fn")):
            y = vector(transform, x)
            assert torch.isfinite(y).all(), transform
            assert float(y.abs().max()) <= size * 1.1, transform
    assert torch.equal(vector(Quantize(16, stochastic=False), torch.zeros(9)), torch.zeros(9))


@pytest.mark.parametrize("name", CONTRACTIONS)
@pytest.mark.parametrize("heavy", [False, True])
def test_what_error_feedback_runs_is_a_contraction(name: str, heavy: bool) -> None:
    x = sample(300, heavy=heavy).reshape(20, 15)
    y = vector(CONTRACTIONS[name], x)
    assert float((x - y).norm() ** 2) < float(x.norm() ** 2)
    assert y.any()


@pytest.mark.parametrize("k", [1, 10, 150, 300])
def test_top_k_is_torchs_and_keeps_its_bound(k: int) -> None:
    x = sample(300)
    y = vector(TopK(k=k), x)
    expected = torch.zeros(300).index_copy(0, x.abs().topk(k).indices, x[x.abs().topk(k).indices])
    assert torch.equal(y, expected)
    assert float((x - y).norm() ** 2) <= (1 - k / 300) * float(x.norm() ** 2) + 1e-6


def test_top_k_chooses_over_all_tensors_or_within_each() -> None:
    update = {"large": torch.tensor([9.0, -8.0, 7.0, 6.0]), "small": torch.tensor([0.1, -0.2, 0.3, 0.4])}
    over_all = decoded(TopK(0.5), update)
    assert over_all["large"].tolist() == [9.0, -8.0, 7.0, 6.0]
    assert not over_all["small"].any()
    within = decoded(TopK(0.5, per_tensor=True), update)
    assert within["large"].tolist() == [9.0, -8.0, 0.0, 0.0]
    assert within["small"].tolist() == pytest.approx([0.0, 0.0, 0.3, 0.4])


def test_sign_has_the_error_of_its_closed_form() -> None:
    x = sample(500, heavy=True)
    expected = float(x.norm() ** 2 - x.abs().sum() ** 2 / 500)
    assert float((x - vector(Sign(), x)).norm() ** 2) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(vector(Sign(), x), vector(Quantize(1, stochastic=False), x))


@pytest.mark.parametrize("dtype", Cast.TYPES)
def test_casts_are_torchs_own_up_to_a_power_of_two(dtype: str) -> None:
    kind = getattr(torch, dtype)
    x = sample(1000)
    bound = torch.finfo(kind).eps / 2 * x.abs() + torch.finfo(kind).smallest_normal * float(x.abs().max())
    assert ((vector(Cast(dtype), x) - x).abs() <= bound).all()
    within = torch.tensor([1.0, -1.5, 0.3, 1.99])  # the power is 1 here
    assert torch.equal(vector(Cast(dtype), within), within.to(kind).float())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_are_torchs_own_cast_to_the_bit(dtype: str) -> None:
    """Ties, what lies just beside them, and numbers that are subnormal in the narrow type."""
    kind, x = getattr(torch, dtype), sample(200_000, heavy=True)
    ties = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(kind).float()
    ties = (ties[:-1] + ties[1:])[torch.isfinite(ties[:-1] + ties[1:])] / 2
    beside = torch.cat([ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9)), ties])
    for values in (x / x.abs().max() * 1.999, beside[beside.abs() < 2], torch.linspace(-1e-3, 1e-3, 9999)):
        one = torch.cat([values, torch.tensor([1.0])])  # the power of two is then 1
        assert torch.equal(vector(Cast(dtype), one), one.to(kind).float())


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_levels_for_a_normal_variable_are_those_of_max(bits: int, distortion: float) -> None:
    """Max 1960, table I."""
    published = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152], 4: [0.1284, 0.3881, 0.6568]}
    levels = torch.from_numpy(lloyd_max(bits))
    assert levels[2 ** (bits - 1) :][: len(published[bits])].tolist() == pytest.approx(published[bits], abs=1e-3)
    x = sample(400_000)
    nearest = levels[(x[:, None] - levels).abs().argmin(1)]
    assert float(((x - nearest) ** 2).mean()) == pytest.approx(distortion, rel=0.02)


@pytest.mark.parametrize("num", [4096, 5000])
@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_eden_has_the_error_of_its_paper_and_is_unbiased(bits: int, distortion: float, num: int) -> None:
    """vNMSE = 1 / (1 - D) - 1, which is pi / 2 - 1 for one bit (DRIVE, theorem 2); heavy tails change nothing."""
    x = sample(num, heavy=True)
    mean, error, variance = moments(Eden(bits), x, 40)
    assert variance == pytest.approx(1 / (1 - distortion) - 1, rel=0.05)
    assert float(((mean - x.double()) / error).square().mean()) == pytest.approx(1.0, abs=0.15)  # noise and no more
    _, _, biased = moments(Eden(bits, unbiased=False), x, 5)
    assert biased == pytest.approx(distortion, rel=0.05)


def test_low_rank_turns_to_the_singular_vectors() -> None:
    from fl_lightning.transforms import Exchange

    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :2] * values[:2]) @ right[:2]
    transform, memory, errors = PowerSGD(2), {}, []
    for round in range(60):
        exchange = Exchange(0, round, "a")
        opened, sealed, memory = transform.encode_tree({"w": matrix}, exchange, memory or {})
        sent = transform.decode_tree(opened, sealed, exchange, {"w": matrix})["w"]
        errors.append(float((matrix - sent).norm()))
        assert errors[-1] ** 2 == pytest.approx(float(matrix.norm() ** 2 - opened["w#q"].norm() ** 2), rel=1e-3)
    torch.testing.assert_close(sent, best, atol=0.05, rtol=0.05)
    assert errors[-1] < errors[0]
    assert torch.linalg.matrix_rank(sent) == 2


def test_more_iterations_come_closer_to_the_best_matrix_of_that_rank() -> None:
    """One encoding without memory, against torch's singular values; the payload has the same tensors."""
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) @ torch.diag(0.8 ** torch.arange(30.0))
    best = float((torch.linalg.svdvals(x)[3:] ** 2).sum())
    errors = [float((x - vector(PowerSGD(3, iterations=n), x)).norm() ** 2) for n in (1, 2, 20)]
    assert errors[0] > 1.1 * errors[1]
    assert errors[1] > errors[2]
    assert errors[2] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("neutral", [chain(), TopK(1.0), RandomK(1.0), TopK(1.0, per_tensor=True), PowerSGD(50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neutral_transforms_change_no_bit(neutral: Transform, dtype: torch.dtype) -> None:
    update = tree(dtype=dtype)
    after = decoded(neutral, update)
    assert list(after) == list(update)
    assert all(torch.equal(after[name], update[name]) and after[name].dtype == dtype for name in update)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_names_shapes_and_types_come_back_and_zero_stays_zero(name: str, dtype: torch.dtype) -> None:
    update = tree(dtype=dtype)
    after = decoded(TRANSFORMS[name](), update)
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in update.items()}
    assert any(t.any() for t in after.values())
    still = decoded(TRANSFORMS[name](), {n: torch.zeros_like(t) for n, t in update.items()})
    assert not any(t.any() for t in still.values())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_both_sides_draw_alike_and_clients_differently(name: str) -> None:
    update = tree()
    one, again = (decoded(TRANSFORMS[name](), update) for _ in range(2))
    assert all(torch.equal(one[n], again[n]) for n in one)
    other = decoded(TRANSFORMS[name](), update, client_id="b")
    random = {"eden 1", "eden 3", "feedback random", "quantize 1", "quantize 2 blocks", "quantize 8", "quantize qsgd",
              "random", "low rank", "low rank quantised", "feedback low rank", "random shared quantised",
              "top quantised"}  # fmt: skip
    assert any(not torch.equal(one[n], other[n]) for n in one) == (name in random)
