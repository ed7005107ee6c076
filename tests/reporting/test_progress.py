from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.demos.boring_classes import BoringModel

from fl_lightning.reporting import FederatedRichProgressBar, FederatedTQDMProgressBar, federated_progress_bar
from fl_lightning.reporting.round_clock import RoundClock
from fl_lightning.types import RoundReport

CLIENTS = 4


class Rounds(BoringModel):
    """One batch an epoch, in which clients end one after the other, as the federated Trainer tells the callbacks."""

    prog_bar = True
    others = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for client in range(CLIENTS):
            for callback in self.trainer.callbacks:
                if hasattr(callback, "on_client_end"):
                    callback.on_client_end(self.trainer, client, client + 1, CLIENTS, 500)
        self.log("train_loss", 0.25, prog_bar=self.prog_bar)
        self.log("val/hidden", 0.5)
        for number in range(self.others):
            self.log(f"other_{number}", 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_acc", 0.75, prog_bar=self.prog_bar)
        return super().validation_step(batch, batch_idx)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_the_end_of_a_round_counts_all_processes() -> None:
    """While clients train, a process knows its own share; the report of the round has everyone's."""
    clock = RoundClock()
    clock.start()
    clock.client_ended(2, 2, 100)
    clock.round_ended(RoundReport(0, ["a", "b", "c"], num_examples=900, seconds=3.0, skipped={"d": "NaN"}))
    assert (clock.clients, clock.rate) == ("clients 3/4", "300 examples/s")


def run(bar: Callback | None, rounds: int = 3, module: Any = None, **arguments: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=rounds, limit_train_batches=1, limit_val_batches=2, num_sanity_val_steps=1, logger=False,
        enable_checkpointing=arguments.pop("enable_checkpointing", False), enable_model_summary=False,
        accelerator="cpu", callbacks=[bar] if bar is not None else [], **arguments,
    )  # fmt: skip
    trainer.fit(module if module is not None else Rounds(), ckpt_path=None)
    return trainer


def frames(screen: io.StringIO) -> list[str]:
    """Return what was drawn one after the other, without colours and cursor moves."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    return [frame.strip() for frame in re.split(r"[\r\n]", text) if frame.strip()]


def test_tqdm_counts_rounds_and_clients(terminal: Terminal) -> None:
    with contextlib.redirect_stdout(terminal):
        run(FederatedTQDMProgressBar())
        drawn = [frame for frame in frames(terminal) if frame.startswith("Round ")]
        for client in range(1, CLIENTS + 1):
            assert any(f"clients {client}/4" in frame and frame.startswith("Round 2/3 |") for frame in drawn)
        assert re.fullmatch(
            r"Round 3/3 \|[█#]+\| \d\d:\d\d<00:00, clients 4/4, [\d,]+ examples/s, train_loss=0\.250, val_acc=0\.750",
            drawn[-1],
        )
        assert not any("Epoch" in frame or "0/1 " in frame for frame in drawn)


def test_tqdm_bar_grows_with_the_clients(terminal: Terminal) -> None:
    with contextlib.redirect_stdout(terminal):
        bar = FederatedTQDMProgressBar()
        seen: list[float] = []

        class Look(Callback):
            def on_client_end(self, *_: Any) -> None:
                seen.append(bar.train_progress_bar.n)

            def on_train_epoch_end(self, *_: Any) -> None:
                seen.append(bar.train_progress_bar.n)

        trainer = pl.Trainer(
            max_epochs=2, limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=0, logger=False,
            enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", callbacks=[bar, Look()],
        )  # fmt: skip
        trainer.fit(Rounds())
        assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.0]
        assert bar.train_progress_bar.total == 2


def test_tqdm_honours_its_refresh_rate(terminal: Terminal) -> None:
    with contextlib.redirect_stdout(terminal):
        run(FederatedTQDMProgressBar(refresh_rate=3), rounds=2)
        drawn = " ".join(frame for frame in frames(terminal) if frame.startswith("Round 2/2"))
        assert "clients 3/4" in drawn
        assert "clients 4/4" in drawn
        assert "clients 1/4" not in drawn
        assert "clients 2/4" not in drawn


def test_tqdm_leaves_a_line_for_every_round(terminal: Terminal) -> None:
    with contextlib.redirect_stdout(terminal):
        run(FederatedTQDMProgressBar(leave=True))
        assert [frame[:10] for frame in frames(terminal) if re.match(r"Round \d/3: clients 4/4", frame)] == [
            f"Round {n}/3:" for n in (1, 2, 3)
        ]


def test_rich_counts_rounds_and_clients(terminal: Terminal) -> None:
    with contextlib.redirect_stdout(terminal):
        bar = FederatedRichProgressBar()
        run(bar)
        text = " ".join(frames(terminal)[-1:])
        assert re.search(r"Round 3/3 .*clients 4/4 .*examples/s.*train_loss: 0\.250 val_acc: 0\.750", text)
        assert bar.val_progress_bar.completed == 2
        assert not re.search(r"Epoch|it/s", text)


def test_rich_leaves_a_line_for_every_round(terminal: Terminal) -> None:
    with contextlib.redirect_stdout(terminal):
        run(FederatedRichProgressBar(leave=True))
        lines = [
            frame for frame in frames(terminal) if re.match(r"Round \d/3: clients 4/4, .*examples/s, train_loss", frame)
        ]
        assert len(lines) == 3


@pytest.mark.parametrize("kind", [FederatedTQDMProgressBar, FederatedRichProgressBar])
class TestBoth:
    def test_a_file_gets_twenty_lines(self, kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
        run(kind(), rounds=100)
        out = capsys.readouterr().out
        assert "\r" not in out
        lines = out.splitlines()
        assert [line.split(":")[0] for line in lines] == [f"Round {n}/100" for n in range(5, 101, 5)]
        assert re.fullmatch(
            r"Round 100/100: clients 4/4, [\d,]+ examples/s, train_loss=0\.250, val_acc=0\.750", lines[-1]
        )

    def test_the_last_round_is_among_the_lines(self, kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
        run(kind(), rounds=43)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 20
        assert lines[-1].startswith("Round 43/43")

    def test_without_an_end_there_are_few_lines(self, kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
        run(kind(), rounds=-1, max_steps=60)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("Round 50: ")
        assert len(lines) <= 2

    @pytest.mark.parametrize("how", ["rate", "disable"])
    def test_nothing_is_said_when_it_is_off(self, kind: Any, how: str, capsys: pytest.CaptureFixture[str]) -> None:
        bar = kind(refresh_rate=0 if how == "rate" else 1)
        if how == "disable":
            bar.disable()
        run(bar)
        assert capsys.readouterr().out == ""

    def test_it_may_be_enabled_again(self, kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
        bar = kind()
        bar.disable()
        bar.enable()
        run(bar)
        assert "Round 3/3" in capsys.readouterr().out

    def test_other_ranks_are_silent(self, kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
        bar = kind()

        class Second(Callback):
            def setup(self, *_: Any, **__: Any) -> None:
                bar.disable()  # what Lightning does on every rank but the first

        trainer = pl.Trainer(
            max_epochs=2, limit_train_batches=1, limit_val_batches=1, logger=False, enable_checkpointing=False,
            enable_model_summary=False, accelerator="cpu", callbacks=[bar, Second()],
        )  # fmt: skip
        trainer.fit(Rounds())
        assert capsys.readouterr().out == ""

    def test_metrics_without_prog_bar_fill_the_place_that_is_left(
        self, kind: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        module = Rounds()
        module.prog_bar = False
        module.others = 5
        run(kind(), module=module)
        last = capsys.readouterr().out.splitlines()[-1]
        assert "train_loss=0.250" in last
        assert "val_acc=0.750" in last
        assert "other_1=" in last
        assert "other_2=" not in last
        assert "hidden" not in last

    def test_validation_test_and_prediction_work(self, kind: Any, terminal: Terminal) -> None:
        with contextlib.redirect_stdout(terminal):
            trainer = run(kind())
            trainer.validate(Rounds(), verbose=False)
            trainer.test(Rounds(), verbose=False)
            trainer.predict(Rounds())
            text = terminal.getvalue()
            assert all(word in text for word in ("Validation", "Testing", "Predicting"))

    def test_it_is_copied_and_pickled(self, kind: Any, terminal: Terminal) -> None:
        with contextlib.redirect_stdout(terminal):
            bar = kind(refresh_rate=7)
            run(bar)
            for twin in (copy.deepcopy(bar), pickle.loads(pickle.dumps(bar))):
                assert twin.refresh_rate == 7
                assert twin._clock.clients == "clients 4/4"

    def test_a_run_that_goes_on_starts_where_it_stopped(self, kind: Any, terminal: Terminal) -> None:
        with contextlib.redirect_stdout(terminal):
            trainer = run(kind(), rounds=2)
            trainer.save_checkpoint("stopped.ckpt")
            seen: list[float] = []
            bar = kind()

            class Look(Callback):
                def on_train_batch_start(self, *_: Any) -> None:
                    task = bar.train_progress_bar
                    seen.append(task.n if isinstance(bar, TQDMProgressBar) else task.completed)

            again = pl.Trainer(
                max_epochs=4, limit_train_batches=1, limit_val_batches=1, logger=False, enable_checkpointing=False,
                enable_model_summary=False, accelerator="cpu", callbacks=[bar, Look()],
            )  # fmt: skip
            again.fit(Rounds(), ckpt_path="stopped.ckpt")
            assert seen == [2, 3]


def test_the_clock_counts_examples_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = RoundClock()
    clock.start()
    now = 102.0
    clock.client_ended(1, 2, 3000)
    assert (clock.clients, clock.rate, clock.fraction) == ("clients 1/2", "1,500 examples/s", 0.5)
    now = 104.0
    clock.client_ended(2, 2, 3000)
    now = 200.0  # aggregation and validation are no training time
    assert (clock.clients, clock.rate, clock.fraction) == ("clients 2/2", "1,500 examples/s", 1.0)
    clock.start()
    assert (clock.clients, clock.rate, clock.fraction) == ("clients 0/2", "1,500 examples/s", 0.0)


def test_lightning_s_bars_are_replaced_and_a_user_s_own_is_not() -> None:
    class Mine(TQDMProgressBar):
        pass

    theme = RichProgressBarTheme(metrics="bold")
    given: list[Callback] = [
        TQDMProgressBar(refresh_rate=5, process_position=2, leave=True),
        RichProgressBar(refresh_rate=9, leave=True, theme=theme, console_kwargs={"width": 80}),
        Mine(),
        ProgressBar(),
        Callback(),
    ]
    tqdm, rich, *others = federated_progress_bar(given)
    assert isinstance(tqdm, FederatedTQDMProgressBar)
    assert (tqdm.refresh_rate, tqdm.process_position, tqdm._leave) == (5, 2, True)
    assert isinstance(rich, FederatedRichProgressBar)
    assert (rich.refresh_rate, rich._leave, rich.theme, rich._console_kwargs) == (9, True, theme, {"width": 80})
    assert others == given[2:]
    off = TQDMProgressBar()
    off.disable()
    (still_off,) = federated_progress_bar([off])
    still_off.enable()  # type: ignore[attr-defined]
    assert not federated_progress_bar([off])[0]._enabled  # type: ignore[attr-defined]
