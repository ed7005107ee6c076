from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from fl_lightning.errors import MisconfigurationException
from fl_lightning.reporting import ClientCurves, safe_name


class Counting(Sequence[int]):
    """A population of a million that counts how many of its ids were looked at."""

    looked_at = 0

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: Any) -> Any:
        self.looked_at += 1
        if index >= len(self):
            raise IndexError
        return index

    def __iter__(self) -> Iterator[int]:
        for index in range(len(self)):
            self.looked_at += 1
            yield index


def wants(log_clients: Any, client_ids: Any, *asked: Any) -> list[bool]:
    curves = ClientCurves([CSVLogger("logs")], log_clients, client_ids)
    return [curves.wants(client_id) for client_id in asked]


def test_ordinary_names_are_themselves() -> None:
    for client_id in (0, 7, -3, "site-a", "client_7", "f0001_41", "hospital.berlin", "A"):
        assert safe_name(client_id) == str(client_id)


def test_names_differ_when_ids_do() -> None:
    texts = ["".join(letters) for size in range(4) for letters in itertools.product("1~/.% a%2Fä", repeat=size)]
    long = ["x" * size for size in (99, 100, 101, 255, 300)] + ["x" * 300 + end for end in ("a", "b")]
    ids = [*dict.fromkeys(texts), *long, *range(-5, 1000), 10**200, 10**200 + 1, "~~x", "\ud800", "é", "e\u0301"]
    names = [safe_name(client_id) for client_id in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        assert name not in ("", ".", "..")
        assert "/" not in name
        assert name.isascii()
        assert len(name) < 150


def test_automatic_takes_all_of_a_small_population_and_nobody_of_a_large_one_who_did_not_take_part() -> None:
    assert wants("auto", [f"s{n}" for n in range(100)], "s0", "s99") == [True, True]
    assert wants("auto", range(101), 0, 99, 100, "0") == [False, False, False, False]


@pytest.mark.parametrize("rule", ["auto", 5, True, False, "9*", [3, 999_999]])
def test_a_population_of_a_million_is_not_read(rule: Any) -> None:
    population = Counting()
    curves = ClientCurves([CSVLogger("logs")], rule, population)
    looked_at = population.looked_at
    assert looked_at <= 20_000
    curves.wants(999_999)
    assert population.looked_at == looked_at


def test_rules() -> None:
    assert wants(2, ["b", "a", "c"], "b", "a", "c") == [True, True, False]
    assert wants(0, range(5), 0) == [False]
    assert wants(True, range(10**6), 999_999) == [True]
    assert wants(False, range(5), 0) == [False]
    assert wants([3, "3"], [3, "3", 4], 3, "3", 4) == [True, True, False]
    assert wants([3], [3, "3"], "3") == [False]
    assert wants("site-*", ["site-a", "hub"], "site-a", "hub", "on-site-a") == [True, False, False]
    assert wants("1?", range(20), 1, 10, 19) == [False, True, True]
    assert wants("re:[0-3]|hub", ["hub", 1, 11], "hub", 1, 11) == [True, True, False]


def test_the_population_may_change() -> None:
    ids = ["a", "b"]
    curves = ClientCurves([CSVLogger("logs")], 1, lambda: ids)
    curves.update_population(["c", "a"])
    assert [curves.wants(client_id) for client_id in "abc"] == [False, False, True]


def test_without_a_logger_nobody_is_wanted() -> None:
    assert not ClientCurves([], True, range(5)).wants(0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (-1, "Expected log_clients of 0 or more, got -1"),
        (0.5, "Expected log_clients as 'auto', a count, a list"),
        (None, "Expected log_clients as 'auto', a count, a list"),
        ("re:(", "Expected a regular expression after 're:'"),
        ([1, "1"], r"unknown ids \['1'\]. 1 and '1' are different clients"),
    ],
)
def test_bad_rules(rule: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ClientCurves([CSVLogger("logs")], rule, [1, 2])
