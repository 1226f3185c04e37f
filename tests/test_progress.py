"""Progress: what a line says, how often one comes, what a terminal shows. The clock is the test's own."""

import os
import subprocess
import sys
import termios

import pytest

from posttrain import progress
from posttrain.progress import Progress, clock, format_rate, is_progress


@pytest.fixture
def tick(monkeypatch):
    """tick(seconds) moves the clock that Progress reads."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    return tick


def test_a_line_has_name_count_percent_rate_time_left_and_numbers(tick):
    bar = Progress("sft", 400)
    tick(40)
    bar.update(120, loss=1.23449, tokens=2048)
    assert bar.line() == "sft  120/400 step  30 %  3 step/s  left 1:33  loss 1.234  tokens 2048"
    assert is_progress(bar.line())
    assert not is_progress("sft: finished in 1:30") and not is_progress("loss  1/2")


def test_what_an_earlier_run_did_counts_as_done_but_not_into_the_rate(tick):
    bar = Progress("grpo", 60, initial=50)
    assert bar.line() == "grpo  50/60 step  83 %"  # nothing timed yet: no rate is made up
    tick(4)
    bar.update()
    assert bar.line() == "grpo  51/60 step  85 %  4 s/step  left 0:36"


def test_the_rate_is_that_of_the_last_updates(tick):
    bar = Progress("ppo", 1000)
    for _ in range(100):
        tick(1)
        bar.update()
    for _ in range(progress.RATE_UPDATES):
        tick(2)
        bar.update()
    assert "  2 s/step  left 28:20" in bar.line()  # 850 steps of 2 s


@pytest.mark.parametrize(("mode", "lines"), [("", 3), ("chain", 50)])
def test_lines_come_every_ten_seconds_or_twice_a_second_for_a_chain(tick, capsys, monkeypatch, mode, lines):
    monkeypatch.setenv("POSTTRAIN_PROGRESS", mode)
    with Progress("sft", 200) as bar:
        for _ in range(200):  # 25 s
            tick(0.125)
            bar.update()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines  # at 10 s, 20 s and the end; or at each half second
    assert printed[-1].startswith("sft  200/200 step  100 %  ")


def test_only_the_main_process_prints(tick, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Progress("sft", 2) as bar:
        tick(60)
        bar.update()
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar():
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    code = "from posttrain.progress import Progress\nwith Progress('sft', 3) as p: p.update(3, loss=2.5)"
    subprocess.run([sys.executable, "-c", code], stdout=follower, check=True)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert "sft: 100%" in shown and "3/3" in shown and "loss=2.5" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (90, "1:30"), (3599, "59:59"), (7290, "2:01:30")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_slow_rate_is_shown_as_seconds_per_step():
    assert [format_rate(rate, "step") for rate in (3.14159, 1.0, 0.08)] == ["3.14 step/s", "1 step/s", "12.5 s/step"]
