"""Clients on two processes of one group keep their own values."""

from __future__ import annotations

import importlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fl_lightning.metrics import alone


@pytest.mark.slow  # two processes that import torch and Lightning
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    run = importlib.import_module("two_clients").run
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run, args=(port, str(tmp_path)), nprocs=2)
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert zero["together"] == one["together"] == 0.5  # what torchmetrics makes of two clients
    assert (zero["own"], one["own"]) == (0.0, 1.0)
    assert zero["merged"] == 0.0
    assert not zero["believed"]


@pytest.fixture
def group() -> Iterator[Callable[[], bool]]:
    def initialized() -> bool:
        return True

    before, dist.is_initialized = dist.is_initialized, initialized
    yield initialized
    dist.is_initialized = before


def test_it_nests_and_restores(group: Callable[[], bool]) -> None:
    with alone():
        with alone():
            assert not dist.is_initialized()
        assert not dist.is_initialized()
    assert dist.is_initialized is group


def test_it_restores_after_an_error(group: Callable[[], bool]) -> None:
    with pytest.raises(KeyboardInterrupt), alone():
        raise KeyboardInterrupt
    assert dist.is_initialized is group


def test_another_thread_is_not_alone(group: Callable[[], bool]) -> None:
    inside, done = threading.Event(), threading.Event()

    def client() -> None:
        with alone():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=client)
    thread.start()
    assert inside.wait(10)
    assert dist.is_initialized()
    with alone():  # leaves last, although it came last
        done.set()
        thread.join()
        assert not dist.is_initialized()
    assert dist.is_initialized is group
