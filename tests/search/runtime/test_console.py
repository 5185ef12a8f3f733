import io
import re

import pytest

from search.runtime.console import Console, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain(every=0.0, total=4, done=0):
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock=clock)
    return out, clock, console.stage("search", total, "trials", done=done, every=every)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (7.6, "8 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (4800, "1 h 20 min")],
)
def test_duration_uses_at_most_two_units(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_tell_stage_count_best_and_time_left():
    out, clock, stage = plain()
    with stage:
        clock.now += 30
        stage.advance(detail="best KL 0.410")
        clock.now += 30
        stage.advance()
    assert out.getvalue().splitlines() == [
        "search ...",
        "search 1/4 trials · best KL 0.410 · 1 min 30 s left",
        "search 2/4 trials · best KL 0.410 · 1 min 00 s left",
        "search done in 1 min 00 s · best KL 0.410",
    ]


def test_lines_come_no_more_often_than_asked():
    out, clock, stage = plain(every=10.0, total=100)
    with stage:
        for _ in range(50):
            clock.now += 1
            stage.advance()
    assert sum("trials" in line for line in out.getvalue().splitlines()) == 5


def test_a_stage_tells_how_many_matrices_its_next_trial_still_waits_for():
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock=clock)
    console.decomposed(1, 9)  # outside any stage
    with console.stage("search", 4, "trials") as stage:
        clock.now += 30
        stage.advance()
        for done in range(3):
            clock.now += 6
            console.decomposed(done, 9)
    assert out.getvalue().splitlines() == [
        "search ...",
        "search 1/4 trials · 1 min 30 s left",
        "search 1/4 trials · 2 min 06 s left · decomposed 1/9 matrices",
        "search done in 48 s",
    ]


def test_a_stage_that_counts_nothing_shows_only_what_it_works_on():
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock=clock)
    with console.stage("time"):
        clock.now += 30
        console.decomposed(1, 9)
    assert out.getvalue().splitlines() == ["time ...", "time decomposed 1/9 matrices", "time done in 30 s"]


def test_trials_of_before_do_not_enter_the_time_left():
    out, clock, stage = plain(total=10, done=8)
    with stage:
        clock.now += 60
        stage.advance()
    assert "search 9/10 trials · 1 min 00 s left" in out.getvalue()


def test_a_stage_that_fails_does_not_say_done():
    out, _, stage = plain()
    with pytest.raises(RuntimeError), stage:
        raise RuntimeError
    assert "stopped after" in out.getvalue()
    assert "done" not in out.getvalue()


def test_quiet_says_nothing(tmp_path):
    out = io.StringIO()
    with Console(out, quiet=True) as console, console.stage("search", 2) as stage:
        stage.advance()
        console.note("x")
        console.opened(tmp_path)
    assert out.getvalue() == ""
    assert console.folder == tmp_path


def test_plain_output_has_no_terminal_codes():
    out, _, stage = plain()
    with stage:
        stage.advance(detail="[red]best[/red]")
    assert "\x1b" not in out.getvalue()
    assert "[red]best[/red]" in out.getvalue()


def test_a_live_bar_shows_the_same_words():
    out = io.StringIO()
    with Console(out, live=True) as console, console.stage("search", 4, "trials") as stage:
        stage.advance(detail="best KL 0.410")
        console.note("[note] in between")
    assert "[note] in between" in out.getvalue()
    assert "best KL 0.410" in out.getvalue()
    assert "done in" in out.getvalue()


@pytest.mark.parametrize("asked", [True, False])
def test_no_color_is_obeyed_on_a_terminal(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if asked:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    with Console(stream, live=True) as shown, shown.stage("search", 2, "trials") as stage:
        stage.advance(1)
    colors = re.findall(r"\x1b\[[0-9;]*3[0-9](?:;[0-9;]*)?m", stream.getvalue())
    assert bool(colors) is not asked
