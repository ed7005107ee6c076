"""Every client in a process of its own, which hears and says nothing but bytes.

This engine is slow. It proves that the client half carries no reference to the server: what works here works at a
site of its own, and the same bits come out.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from typing import Any

import lightning.pytorch as pl
import torch

from fl_lightning.engines.in_process import Engine
from fl_lightning.errors import ClientError, EmptyClientError, MisconfigurationException, NoLossError
from fl_lightning.local.client import ClientHalf, ClientResult, Failure
from fl_lightning.local.quiet import without_hints
from fl_lightning.metrics import MetricSums
from fl_lightning.seeding import seed_everywhere
from fl_lightning.store import ClientStore
from fl_lightning.types import ClientId, ClientTask, Contribution, Work
from fl_lightning.wire import pack, unpack

__all__ = ["SpawnedEngine"]

_KINDS = {"MisconfigurationException": MisconfigurationException}
_CLIENT_KINDS: dict[str, type[ClientError]] = {"EmptyClientError": EmptyClientError, "NoLossError": NoLossError}


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a client's process builds its half: the only thing that is pickled, and only plain settings are in it."""

    module: bytes
    algorithm: Any
    settings: Any
    population: Any
    num_threads: int


class SpawnedEngine(Engine):
    """Runs each client in a fresh ``spawn``-ed process; broadcast, update and memory cross as bytes without pickle.

    The module is built from its class path and hyperparameters when it has all of them saved, else from a pickled
    copy. Everything else of the client half must be picklable: use functions at the top of a file, no lambdas.
    """

    def start(self, client_half: ClientHalf) -> None:
        super().start(client_half)
        recipe = _Recipe(
            _module_recipe(client_half.lightning_loop.worker.module),
            client_half.algorithm,
            client_half.settings,
            client_half.population,
            torch.get_num_threads(),
        )
        try:
            with _without_trainer(client_half.population.source):
                self._recipe = pickle.dumps(recipe)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise MisconfigurationException(
                f"SpawnedEngine cannot send the client half to another process: {error}. Define data sets, callbacks "
                "and functions at the top of an importable file, or use the default engine."
            ) from error

    def session(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        for task in tasks:
            answer = unpack(self._ask("train", task))
            yield self._result(task, answer)

    def evaluate(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientId, MetricSums | Failure | None]]:
        for task in tasks:
            answer = unpack(self._ask("evaluate", task))
            if answer["failure"] is not None:
                yield task.client_id, _failure(answer["failure"], task)
            else:
                yield task.client_id, None if answer["metrics"] is None else MetricSums.from_tree(answer["metrics"])

    def start_losses(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientId, float | Failure]]:
        for task in tasks:
            answer = unpack(self._ask("start loss", task))
            failed = answer["failure"] is not None
            yield task.client_id, _failure(answer["failure"], task) if failed else answer["loss"]

    def recalibrate(self, tasks: Iterable[ClientTask], names: Sequence[str]) -> Iterator[tuple[ClientId, Contribution]]:
        for task in tasks:
            answer = unpack(self._ask("recalibrate", task, names))
            if answer["failure"] is not None:
                failure = _failure(answer["failure"], task)
                raise ClientError(task.client_id, task.round, failure.reason) from failure.exception
            yield task.client_id, Contribution(answer["trees"], answer["scalars"])

    def _ask(self, what: str, task: ClientTask, names: Sequence[str] = ()) -> bytes:
        half = self.client_half
        message = pack(
            {
                "what": what,
                "names": list(names),
                "task": {**asdict(task), "broadcast": dict(task.broadcast), "work": asdict(task.work)},
                "memory": half.store.get(task.client_id, task.round),
                "logged": half.wants_curve(task.client_id),
            }
        )
        with self._process() as (ours, process):
            try:
                _await(ours, process)
                ours.recv_bytes()  # it listens
                ours.send_bytes(self._recipe)
                ours.send_bytes(message)
                _await(ours, process)
                answer: bytes = ours.recv_bytes()
                return answer
            except (EOFError, ConnectionError):  # it ended before it answered, or before it listened
                process.join()
                reason = f"its process ended with exit code {process.exitcode}"
                if process.exitcode == 1:
                    reason += " (a script that uses SpawnedEngine calls fit under `if __name__ == '__main__':`)"
                return pack(
                    {"failure": {"reason": reason, "details": "", "bad_update": False, "kind": ""}, "metrics": None}
                )

    @contextmanager
    def _process(self) -> Iterator[tuple[Any, BaseProcess]]:
        """Start the process of one client, and see it end."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        try:
            yield ours, process
        finally:
            process.join()
            ours.close()

    def _result(self, task: ClientTask, answer: dict[str, Any]) -> ClientResult:
        result = ClientResult(task.client_id, task.dispatch_id)
        if answer["failure"] is not None:
            result.failure = _failure(answer["failure"], task)
            return result
        if answer["payload"] is not None:
            result.payload = answer["payload"].numpy().tobytes()
        else:
            result.contribution = Contribution(answer["trees"], answer["scalars"])
        result.metrics = None if answer["metrics"] is None else MetricSums.from_tree(answer["metrics"])
        result.records = [(method, tuple(args), named) for method, args, named in answer["records"]]
        for name in ("num_examples", "num_steps", "num_bytes_up", "update_norm"):
            setattr(result, name, answer[name])
        if answer["memory"]:
            self.client_half.store.put(task.client_id, task.round, answer["memory"])
            result.has_memory = True
        return result


@contextmanager
def _without_trainer(source: Any) -> Iterator[None]:
    """Take the Trainer off a data module: through it the whole server would travel to the client."""
    trainer = getattr(source, "trainer", None)
    if trainer is None:
        yield
        return
    source.trainer = None
    try:
        yield
    finally:
        source.trainer = trainer


def _module_recipe(module: pl.LightningModule) -> bytes:
    cls = type(module)
    factory = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(module.hparams)}
    try:
        return pack(factory) if module.hparams and _rebuilds(factory, module) else pickle.dumps(module)
    except Exception:  # whatever a user's constructor raises: the copy serves as well
        return pickle.dumps(module)


def _rebuilds(factory: dict[str, Any], module: pl.LightningModule) -> bool:
    state = torch.random.get_rng_state()
    try:
        twin = _build(factory)
        return {n: t.shape for n, t in twin.state_dict().items()} == {
            n: t.shape for n, t in module.state_dict().items()
        }
    finally:
        torch.random.set_rng_state(state)


def _build(factory: dict[str, Any]) -> pl.LightningModule:
    package, _, name = factory["class_path"].rpartition(".")
    module: pl.LightningModule = getattr(import_module(package), name)(**factory["init_args"])
    return module


def _await(pipe: Any, process: BaseProcess) -> None:
    """Wait until a process says something; one that died may have left its end open in a child of its own."""
    while not pipe.poll(0.1):
        if not process.is_alive() and not pipe.poll(0):
            raise EOFError


def _serve(pipe: Any) -> None:
    """Answer one task and end; runs in the client's process."""
    _answer_task(pipe)
    pipe.close()


def _answer_task(pipe: Any) -> None:
    pipe.send_bytes(b"ready")
    recipe: _Recipe = pickle.loads(pipe.recv_bytes())
    message = unpack(pipe.recv_bytes())
    torch.set_num_threads(recipe.num_threads)
    seed_everywhere(0)
    try:
        module = _build(unpack(recipe.module))
    except ValueError:  # not from `pack`: a pickled copy of our own parent process
        module = pickle.loads(recipe.module)
    fields = message["task"]
    task = ClientTask(**{**fields, "work": Work(**fields["work"])})
    with tempfile.TemporaryDirectory() as folder, without_hints():
        store = ClientStore(folder)
        if message["memory"]:
            store.put(task.client_id, task.round - 1, message["memory"])
            store.commit([task.client_id], task.round - 1)
        half = ClientHalf(
            module, recipe.algorithm, recipe.settings, recipe.population, store, lambda _: bool(message["logged"])
        )
        pipe.send_bytes(pack(_ANSWERS[message["what"]](half, task, message["names"])))


def _evaluated(half: ClientHalf, task: ClientTask, names: Sequence[str]) -> dict[str, Any]:
    _, sums = next(half.evaluate([task]))
    if isinstance(sums, Failure):
        return {"failure": _portable(sums), "metrics": None}
    return {"failure": None, "metrics": None if sums is None else sums.to_tree()}


def _start_loss(half: ClientHalf, task: ClientTask, names: Sequence[str]) -> dict[str, Any]:
    _, loss = next(half.start_losses([task]))
    return {"failure": _portable(loss)} if isinstance(loss, Failure) else {"failure": None, "loss": loss}


def _recalibrated(half: ClientHalf, task: ClientTask, names: Sequence[str]) -> dict[str, Any]:
    try:
        _, own = next(half.recalibrate([task], names))
    except Exception as error:
        details = "".join(traceback.format_exception(error))
        return {"failure": _portable(Failure(f"{type(error).__name__}: {error}", details, exception=error))}
    return {"failure": None, "trees": own.trees, "scalars": own.scalars}


def _trained(half: ClientHalf, task: ClientTask, names: Sequence[str]) -> dict[str, Any]:
    try:
        result = next(iter(half.run([task])))
    except MisconfigurationException as error:
        return {"failure": _portable(Failure(str(error), exception=error))}
    if result.failure is not None:
        return {"failure": _portable(result.failure)}
    own = result.contribution if result.contribution is not None else Contribution()
    payload = None if result.payload is None else torch.frombuffer(bytearray(result.payload), dtype=torch.uint8)
    half.store.commit([task.client_id], task.round)
    return {
        "failure": None,
        "payload": payload,
        "trees": own.trees,
        "scalars": own.scalars,
        "metrics": None if result.metrics is None else result.metrics.to_tree(),
        "records": [[method, list(args), named] for method, args, named in result.records if method == "add_scalar"],
        "num_examples": result.num_examples,
        "num_steps": result.num_steps,
        "num_bytes_up": result.num_bytes_up,
        "update_norm": result.update_norm,
        "memory": half.store.get(task.client_id) if result.has_memory else {},
    }


_ANSWERS = {"train": _trained, "evaluate": _evaluated, "start loss": _start_loss, "recalibrate": _recalibrated}


def _portable(failure: Failure) -> dict[str, Any]:
    kind = type(failure.exception).__name__ if failure.exception is not None else ""
    return {"reason": failure.reason, "details": failure.details, "bad_update": failure.bad_update, "kind": kind}


def _failure(fields: dict[str, Any], task: ClientTask) -> Failure:
    failure = Failure(fields["reason"], fields["details"], fields["bad_update"])
    if fields["kind"] in _CLIENT_KINDS:
        failure.exception = _CLIENT_KINDS[fields["kind"]](task.client_id, task.round, fields["reason"])
    elif fields["kind"] in _KINDS:
        failure.exception = _KINDS[fields["kind"]](fields["reason"])
    return failure
