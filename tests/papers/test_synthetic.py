"""FedProx's synthetic federation against its recipe, statistic by statistic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fl_lightning.data.population import as_population
from fl_lightning.data.synthetic import SyntheticDataModule
from fl_lightning.errors import MisconfigurationException


def everything(data: SyntheticDataModule, client_id: Any) -> tuple[torch.Tensor, torch.Tensor]:
    data.setup()
    split = data._of(client_id)
    parts = [part.tensors for part in (split.train, split.val, split.test) if len(part)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def test_sizes_are_those_of_the_power_law() -> None:
    data = SyntheticDataModule(num_clients=800, test_fraction=0.0, iid=True)
    sizes = np.array([data.client_size(k) for k in data.client_ids()])
    assert sizes.min() >= 50
    logs = np.log(sizes - 50 + 0.5)  # the middle of what rounding down cut off
    # the median of lognormal(4, 2) is e^4; the quartiles lie .6745 spreads away
    assert np.median(logs) == pytest.approx(4.0, abs=0.3)
    assert np.subtract(*np.percentile(logs, [75, 25])) == pytest.approx(2 * 0.6745 * 2.0, rel=0.2)


def test_ninety_percent_are_for_training_rounded_down() -> None:
    data = SyntheticDataModule()
    assert len(data.client_ids()) == 30
    for k in data.client_ids():
        size = len(everything(data, k)[1])
        assert data.client_size(k) == int(0.9 * size)
        assert len(data._of(k).test) == size - int(0.9 * size)
        assert len(data._of(k).val) == 0


def test_a_part_for_validation_is_cut_off_as_well() -> None:
    data = SyntheticDataModule(val_fraction=0.2, test_fraction=0.1)
    split = data._of(max(data.client_ids(), key=data.client_size))
    sizes = np.array([len(split.train), len(split.val), len(split.test)])
    assert sizes / sizes.sum() == pytest.approx([0.7, 0.2, 0.1], abs=0.01)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_inputs_have_the_recipes_means_and_variances(beta: float) -> None:
    data = SyntheticDataModule(alpha=0.0, beta=beta, num_clients=300)
    devices = [everything(data, k)[0].double().numpy() for k in data.client_ids()]
    within = np.mean([inputs.var(axis=0, ddof=1) for inputs in devices], axis=0)
    assert within == pytest.approx(np.arange(1, 61) ** -1.2, rel=0.1)
    means = np.array([inputs.mean(axis=0) for inputs in devices])  # v_k, up to a little noise
    around = means - means.mean(axis=1, keepdims=True)
    assert (around**2).sum() / (59 * 300) == pytest.approx(1.0, abs=0.1)
    # the mean of v_k over 60 features is B_k with a noise of 1/60
    assert means.mean(axis=1).var() == pytest.approx(beta**2 + 1 / 60, rel=0.25)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 0.25)])
def test_a_seed_is_the_federation_of_the_released_program(alpha: float, beta: float) -> None:
    """The same draws by numpy's own multivariate normal, from the global state that the authors' program uses."""
    data = SyntheticDataModule(alpha, beta, num_clients=5, seed=3)
    before = np.random.get_state()
    try:
        np.random.seed(3)
        sizes = np.random.lognormal(4, 2, 5).astype(int) + 50
        rules, offsets = np.random.normal(0, alpha, 5), np.random.normal(0, beta, 5)
        means = [np.random.normal(offset, 1, 60) for offset in offsets]
        for k in range(5):
            weights, biases = np.random.normal(rules[k], 1, (60, 10)), np.random.normal(rules[k], 1, 10)
            expected = np.random.multivariate_normal(means[k], np.diag(np.arange(1, 61) ** -1.2), sizes[k])
            inputs, labels = everything(data, k)
            assert inputs.numpy() == pytest.approx(expected, abs=1e-5)
            assert labels.tolist() == (expected @ weights + biases).argmax(axis=1).tolist()
    finally:
        np.random.set_state(before)


def test_labels_follow_a_linear_rule_of_their_own_device() -> None:
    """A linear model of one device predicts that device and not another, unless all share one rule."""
    shared, own = SyntheticDataModule(iid=True), SyntheticDataModule(alpha=1.0, beta=1.0)
    for data, transfers in ((shared, True), (own, False)):
        first, second = sorted(data.client_ids(), key=data.client_size)[-2:]
        inputs, labels = everything(data, second)
        model = fitted(inputs, labels)
        assert accuracy(model, inputs, labels) > 0.95
        elsewhere = accuracy(model, *everything(data, first))
        assert (elsewhere > 0.7) == transfers, elsewhere


def fitted(inputs: torch.Tensor, labels: torch.Tensor) -> torch.nn.Linear:
    model = torch.nn.Linear(60, 10)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def accuracy(model: torch.nn.Linear, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    return (model(inputs).argmax(1) == labels).float().mean().item()


def test_it_is_a_population_and_pure_in_its_seed() -> None:
    one, two, other = SyntheticDataModule(seed=3), SyntheticDataModule(seed=3), SyntheticDataModule(seed=4)
    assert torch.equal(everything(one, 7)[0], everything(two, 7)[0])
    assert not torch.equal(everything(one, 7)[0][:50], everything(other, 7)[0][:50])
    population = as_population(one)
    assert list(population.client_ids()) == list(range(30))
    assert sum(len(batch[1]) for batch in population.client_dataloader(7)) == one.client_size(7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, r"expected spreads alpha >= 0 and beta >= 0, got -1.0 and 1.0.*iid=True"),
        ({"beta": -0.5}, r"expected spreads alpha >= 0 and beta >= 0, got 1.0 and -0.5"),
        ({"num_clients": 0}, r"expected num_clients >= 1, got 0"),
        ({"test_fraction": 1.0}, r"sum to less than 1, got 0.0 and 1.0"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        SyntheticDataModule(**arguments)
