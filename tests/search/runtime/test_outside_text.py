"""Text from outside: shown, never obeyed, wherever it comes out."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from prior_document import document
from rich.console import Console as RichConsole

from search import cli
from search.commands.exits import complain, explain, say
from search.export.model_card import model_card
from search.reporting.frames import csv_text, parse_records, read_frame
from search.reporting.page import Section, page, table
from search.reporting.tables import Column, json_text, lines_text, markdown_table, text_table
from search.runtime.console import Console
from search.runtime.outside_text import front_matter, markdown_text, plain
from search.runtime.run_folder import LOG

ROOT = Path(__file__).parents[3]
EVIL = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2066\u2028\x7f\r\x00\udc9bz"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", ["plain", "ü é 鋼 😀 👩‍👩‍👧 می‌خواهم", "χ ± │ ▏", "a  b"])
def test_printable_text_of_any_language_is_unchanged(text: str) -> None:
    assert plain(text) == text


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert plain(EVIL) == (r"a\u001b]0;owned\u0007\u001b[2J\u009b31m\u202e\u2066\u2028\u007f\r\u0000\udc9bz")
    assert plain("a\n\tb") == r"a\n\tb"
    assert plain("a\n\tb\r", lines=True) == "a\n\tb\\r"


def test_json_that_is_shown_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"name": f"{EVIL}\U000e0041\n"}
    say(json_text(value))
    out = capsys.readouterr().out
    assert not OBEYED.search(out)
    assert json.loads(out) == value


def test_every_way_to_the_terminal_is_guarded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHISEL_TRACEBACK", raising=False)
    say(EVIL, text_table([{"a": EVIL}], [Column("a", EVIL)]), lines_text({"key": [EVIL]}))
    complain(EVIL)
    explain(RuntimeError(EVIL))
    explain(RuntimeError(EVIL), folder=tmp_path)
    with Console() as console, console.stage("load", 2, "x", every=0) as stage:
        console.note(EVIL)
        stage.advance(1, EVIL)
    out, err = capsys.readouterr()
    assert out.count("owned") == 4
    assert err.count("owned") == 7  # a line and a traceback, a line, a note, two lines of the stage
    assert not OBEYED.search(out + err + (tmp_path / LOG).read_text())


def test_a_progress_bar_shows_them_too() -> None:
    stream = io.StringIO()
    with Console(stream, live=True) as console, console.stage("load", 2) as stage:
        assert isinstance(console._progress.console, RichConsole)  # type: ignore[union-attr]
        stage.advance(1, "best\x07\x9b")
        console.note("note\x07\x9b")
    assert "\\u0007\\u009b" in stream.getvalue()
    assert not re.search("[\x07\x9b]", stream.getvalue())


def test_a_prior_shows_its_command_and_its_names_without_obeying_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (tmp_path / name for name in ("one.json", "other.json"))
    content = document()
    evil = EVIL.replace("\udc9b", "")  # half a character is refused as such
    content["environment"] = {"command": evil, "commit": evil, "date": evil}
    content["model"] |= {"id": "one"}
    one.write_text(json.dumps(content))
    content |= {f"field{evil}": 1}
    other.write_text(json.dumps(content))
    cli.main(["prior", "show", str(one)])
    cli.main(["prior", "validate", str(one), str(other)])
    cli.main(["prior", "diff", str(one), str(other)])
    cli.main(["prior", "show", str(tmp_path / "no\x1b[2Jfile")])
    cli.main(["--no-such\x1b[2J", "1"])
    cli.main(["no-such\x1b[2J"])
    out, err = capsys.readouterr()
    assert "by: a" in out
    assert "field" in err
    assert not OBEYED.search(out + err)


def test_a_cell_that_a_spreadsheet_would_compute_is_text_and_is_read_back_as_it_was(tmp_path: Path) -> None:
    risky = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "'=1", "'", "it's", "=cmd|' /C calc'!A0", "plain"]
    text = csv_text([{"name": one, "=number": -1.5, "more": 3} for one in risky])
    assert not re.search(r"(^|,)[\"]?[=+@\t]", text, re.MULTILINE)
    assert [row["name"] for row in parse_records(text)] == risky
    assert parse_records(text)[0]["=number"] == "-1.5"
    (tmp_path / "t.csv").write_text(text)
    frame = read_frame(tmp_path / "t.csv")
    assert list(frame["name"]) == risky
    assert frame["=number"].sum() == -15
    assert not OBEYED.search(csv_text([{"name": EVIL.replace("\udc9b", "")}]))


@pytest.mark.parametrize(
    "name", ["no", "1.0", "a: b", "- x", "#c", "@x", "[y", "*z", "'", '"', "a\nlicense: mit", EVIL]
)
def test_the_front_matter_of_a_model_card_is_yaml_for_every_name(name: str) -> None:
    prior = {"model": {"id": name, "license": name}, "environment": {"command": f"`{name}`"}, "data": {name: name}}
    text = model_card(name, "hf", prior, {"rows": [{"schedule": f"{name}|x"}]}, "searched", "1 MB", ["Done."])
    _, head, body = text.split("---\n", 2)
    read = yaml.safe_load(head)
    assert (read["base_model"], read["license"]) == (plain(name), plain(name.lower()))
    assert read["tags"] == ["chisel", "tensor-network", "compression"]
    assert not OBEYED.search(text)
    assert body.count("# ") == 7  # no name adds a heading


def test_a_field_of_the_front_matter_that_is_unknown_is_left_out() -> None:
    assert front_matter({"license": None, "tags": ["a"]}) == "---\ntags:\n- a\n---\n"


def test_markdown_and_html_show_markup_as_text() -> None:
    evil = "<img src=x onerror=alert(1)> [a](javascript:b) `c` | \\| &amp;\n# d"
    shown = markdown_text(evil)
    assert not re.search(r"(?<!\\)[\[\]`|<>]", shown)
    assert "\n" not in shown
    assert markdown_table([{"a": evil}], [Column("a", evil)]).count("\n") == 3
    rows = [{"a": evil + EVIL}]
    html = page(evil + EVIL, evil, [Section(evil, evil, table(rows, [Column("a", evil)]), rows)])
    assert "<img" not in html
    assert not OBEYED.search(html)


def test_commands_print_through_the_guard() -> None:
    """`say` and `complain` are the only ways out; what the shell scripts and the reference print is our own."""
    loud = [
        f"{path.name}:{node.lineno}"
        for path in (ROOT / "search").rglob("*.py")
        if path.name not in ("exits.py", "console.py", "completion.py", "reference.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not loud
