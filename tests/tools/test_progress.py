"""The progress bar: what it shows on a terminal and off it."""

import io
import sys

import pytest
from visattn_tools.progress import Progress, duration, pace


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _draw(monkeypatch: pytest.MonkeyPatch, output: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("epoch 1/2", 200) as progress:
        progress.start -= 10
        progress.advance(50)
        progress.draw(loss="0.500")
    return output.getvalue()


def test_slow_work_has_a_pace() -> None:
    assert [pace(rate) for rate in (1234.4, 3.2, 0.25)] == ["1234", "3", "0.25"]


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _draw(monkeypatch, Terminal())
    assert "epoch 1/2 ━━━━━━╌" in text
    assert "50/200 images  5/s  loss 0.500  0:30 left" in text
    assert text.endswith("\r\033[K"), "the bar stays behind"
    assert "\n" not in text


def test_plain_line_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _draw(monkeypatch, io.StringIO()) == "epoch 1/2  50/200 images  5/s  loss 0.500  0:30 left\n"


def test_lines_come_now_and_then() -> None:
    progress = Progress("x", 10, plain_interval=20)
    assert not progress.due()
    progress.last -= 21
    assert progress.due()


def test_nothing_done_yet(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("x", 0).draw()
    assert "? left" in capsys.readouterr().out


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 61, 3600 * 25 + 62)] == ["0:00", "1:01", "25:01:02"]
