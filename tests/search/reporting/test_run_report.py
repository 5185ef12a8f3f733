import csv
import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compression.refusal import Refusal
from search import cli
from search.reporting.opened_run import OpenedRun
from search.reporting.run_report import report
from search.runtime.run_folder import RunFolder

ROW = {"expected_accuracy": 0.3, "accuracy": 0.25, "accuracy_stderr": 0.07, "items": 32, "bytes": 4_000_000}
ROWS = [
    {"schedule": "dense", "kept_fraction": 1.0, "kl": 0.0, "perplexity": 30.0, "parameters": 2_000_000, **ROW},
    {"schedule": "uniform", "kept_fraction": 0.5, "kl": 0.8, "perplexity": 70.0, "parameters": 1_200_000, **ROW},
    {"schedule": "lagrangian", "kept_fraction": 0.5, "kl": 0.4, "perplexity": 50.0, "parameters": 1_200_000, **ROW},
    {"schedule": "searched", "kept_fraction": 0.5, "kl": 0.3, "perplexity": 45.0, "parameters": 1_200_000, **ROW},
]
SITES = [
    {"name": "b.0.q", "block": 0, "family": "q", "shape": [8, 8], "topology": "lowrank", "chi": 3, "parameters": 39},
    {"name": "b.0.up", "block": 0, "family": "up", "shape": [16, 8], "topology": "dense", "parameters": 128},
]
BOND = {"name": "b.0.mlp", "groups": 16, "width": 12}
CUT = [
    {"name": "b.0.mlp.up", "block": 0, "family": "up", "shape": [16, 8], "bonds": [BOND | {"side": "out"}]}
    | {"topology": "dense", "parameters": 96},
    {"name": "b.0.mlp.down", "block": 0, "family": "down", "shape": [8, 16], "bonds": [BOND | {"side": "in"}]}
    | {"topology": "lowrank", "chi": 3, "parameters": 60},
    {"name": "b.1.mlp.up", "block": 1, "family": "up", "shape": [16, 8], "topology": "dense", "parameters": 0}
    | {"bonds": [{"name": "b.1.mlp", "groups": 16, "width": 0, "side": "out"}]},
    {"name": "b.1.mlp.down", "block": 1, "family": "down", "shape": [8, 16], "topology": "dense", "parameters": 0}
    | {"bonds": [{"name": "b.1.mlp", "groups": 16, "width": 0, "side": "in"}]},
    {"name": "b.2.mlp.down", "block": 2, "family": "down", "shape": [8, 16], "topology": "dense", "parameters": 128},
]
SUMMARY = {
    "model": "toy <model>",
    "agent": "reinforce",
    "target_kept": 0.5,
    "rows": ROWS,
    "searched_against_lagrangian_kl": {"value": -0.1, "standard_error": 0.01, "relative": -0.25, "sequences": 60},
    "latency": {
        "optimize": "memory",
        "prefill_ratio": 0.9,
        "decode_ratio": 1.1,
        "prompt": 512,
        "stored_bytes": 1_000_000,
        "resident_bytes": 1_500_000,
    },
    "environment": {"command": "python search.py", "commit": "abc", "packages": {"torch": "2.13.0"}},
}


@pytest.fixture
def run(tmp_path):
    """A folder with the files of a finished run."""

    def make(name="run", **changes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))
        (folder / "prior.json").write_text(json.dumps({"sites": SITES, "configuration": {"seed": 0}}))
        with (folder / "trials.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["trial", "kl", "kl_control", "parameters"])
            writer.writerows([[0, 0.5, 0.0, 1_200_000], [1, "", "", ""], [2, 0.3, 0.1, 1_100_000]])
        return folder

    return make


def test_benchmarks_sensitivity_and_healing_are_shown_where_they_are(run):
    folder = run()
    (folder / "benchmarks.csv").write_text(
        "model,task,state,n,metric,seconds,value,stderr\n"
        "dense,piqa,ok,200,acc,3.0,0.65,0.03\nhealed,piqa,ok,200,acc,3.0,0.6,0.03\nhealed,boolq,nonfinite,0,acc,1,,\n"
    )
    (folder / "sensitivity.csv").write_text(
        "block,family,chi,kl,state\n0,q,10,0.01,ok\n0,q,20,0.0001,ok\n10,q,10,1.0,ok\n2,up,10,,failed\n"
    )
    (folder / "healed").mkdir()
    looks = [
        {"tokens": 0, "seconds": 0, "kl": 0.5, "perplexity": 9},
        {"tokens": 9, "seconds": 1, "kl": 0.25, "perplexity": 8},
    ]
    (folder / "healed" / "healing.json").write_text(json.dumps({"looks": looks, "outlook": "longer is better"}))
    html = report([folder])
    text = " ".join(_Elements(html).text)
    assert "0.650 ± 0.030" in text
    assert "longer is better." in text
    cells = re.findall(r"<title>(\d+) q: ([^<]*)</title>", html[html.index("Sensitivity") :])
    assert cells == [("0", "0.001"), ("10", "1")]  # geometric means; blocks in the order of their numbers
    assert html.index("<h2>Benchmarks") < html.index("<h2>Healing")


def test_a_profile_alone_is_a_report_too(tmp_path):
    (tmp_path / "sensitivity.csv").write_text("block,family,chi,kl,state\n0,q,10,0.01,ok\n")
    assert re.findall("<h2>(.*?)</h2>", report([tmp_path])) == ["Sensitivity"]


class _Elements(HTMLParser):
    """Every element opened and closed, and what stands in it."""

    void = ("meta", "br", "path", "circle", "rect")

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def test_the_headline_says_size_quality_and_what_the_search_brought(run):
    headline = re.search("<p class='headline'>(.*?)</p>", report([run()])).group(1)
    assert headline == (
        "searched: 1.2 of 2.0 million parameters (-40%), held-out KL to the dense model 0.3 nats per token, "
        "perplexity 45 (dense 30), KL -25% against closed-form allocation, KL -62% against uniform χ."
    )


def test_every_figure_of_the_table_is_in_the_page_and_names_are_never_markup(run):
    elements = _Elements(report([run()]))
    words = " ".join(elements.text)
    assert "toy <model>" in words
    for shown in ("0.3000", "0.250 ± 0.070", "1,200,000", "dense", "lagrangian", "torch 2.13.0", "abc"):
        assert shown in words


def test_the_page_asks_for_nothing_from_elsewhere(run):
    elements = _Elements(report([run()]))
    assert not [name for name, _ in elements.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert "script" not in report([run("other")])
    assert "url(" not in report([run("third")])


def test_what_a_run_lacks_is_left_out(run):
    folder = run()
    for name in ("prior.json", "trials.csv"):
        (folder / name).unlink()
    headings = re.findall("<h2>(.*?)</h2>", report([folder]))
    assert headings == ["Comparison with the baselines", "Quality and size", "Speed", "How it was made"]
    assert "Bond dimensions" in report([run("whole")])


def test_widths_are_shown_beside_bond_dimensions_where_a_schedule_has_them(run):
    assert "<h2>Widths" not in report([run("without")])
    folder = run()
    (folder / "prior.json").write_text(json.dumps({"sites": CUT, "configuration": {}}))
    html = report([folder])
    widths, chis = html.index("<h2>Widths"), html.index("<h2>Bond dimensions")
    assert re.findall(r"<title>(\d+) mlp: ([^<]*)</title>", html[widths:chis]) == [("0", "12 of 16"), ("1", "0 of 16")]
    shades = re.findall(r'fill-opacity="([\d.]+)"><title>\d+ mlp', html[widths:chis])
    assert [float(shade) for shade in shades] == pytest.approx([0.04 + 0.8 * 0.75, 0.04])
    cells = dict(re.findall(r"<title>(\d+ (?:up|down)): ([^<]*)</title>", html[chis:]))
    assert cells == {"0 up": "smaller", "0 down": "3", "1 up": "smaller", "1 down": "smaller", "2 down": "dense"}
    words = _Elements(html[chis : html.index("</section>", chis)]).text
    assert words.count("12 of 16") == 2
    assert "0.46875" in words  # kept by b.0.mlp.down
    sites = OpenedRun(folder).schedule().set_index("name")
    assert sites.loc["b.0.mlp.down", ["width", "groups", "kept_fraction"]].tolist() == [12, 16, 60 / 128]
    assert sites.loc["b.1.mlp.up", "kept_fraction"] == 0
    assert sites["width"].isna().tolist() == [False] * 4 + [True]
    assert "width" not in OpenedRun(run("other")).schedule()


def test_the_curve_adds_the_control_variate_and_skips_failed_trials(run):
    html = report([run()])
    data = html[html.index("The search") :]
    cells = re.findall("<tr>(.*?)</tr>", data[data.index("<tbody>") : data.index("</tbody>")])
    assert [re.findall("<td[^>]*>(.*?)</td>", row) for row in cells] == [
        ["1", "0.5", "0.5"],
        ["2", "-", "0.5"],
        ["3", "0.4", "0.4"],
    ]


def test_several_runs_stand_beside_each_other(run):
    html = report([run("first"), run("second", agent="gradient")])
    assert "Final result of each run" in html
    assert "second: Bond dimensions" in html
    assert "gradient" in html


def test_the_command_writes_the_page_and_says_where(run, capsys, tmp_path):
    folder = run()
    assert cli.main(["report", str(folder)]) == cli.DONE
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    out = tmp_path / "both.html"
    assert cli.main(["report", str(folder), str(run("other")), "--out", str(out)]) == cli.DONE
    assert out.read_text() == report([folder, folder.with_name("other")])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("summary.json", None, "there is no finished run,"),
        ("summary.json", "[]", "expected a JSON object, got list"),
        ("prior.json", "[" * 100_000, "cannot use"),
        ("prior.json", '{"sites": [{}]}', "sites.0.block is missing"),
        ("summary.json", '{"rows": 3}', "rows must be a valid list, got 3"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(run, capsys, name, content, message):
    folder = run()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert cli.main(["report", str(folder)]) == cli.REFUSED
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_a_page_or_a_model_is_not_written_into_a_run_that_another_command_holds(run, capsys, tmp_path):
    folder = run()
    (folder / "environment.json").write_text("{}")
    with RunFolder(folder):
        for command in ("report", "export"):
            assert cli.main([command, str(folder)]) == cli.REFUSED
            assert "is in use by process" in capsys.readouterr().err
        assert cli.main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == cli.DONE
    assert cli.main(["report", str(folder)]) == cli.DONE


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_a_browser_shows_it_on_a_phone_without_complaint(run, scheme):
    page = run() / "report.html"
    page.write_text(report([page.parent]), encoding="utf-8")
    words = [sys.executable, str(Path(__file__).parents[2] / "support" / "browser.py"), str(page), "390", scheme]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["console"] == []
    assert seen["requests"] == [page.as_uri()]
    assert seen["wide"] <= 390
    assert "Bond dimensions" in seen["headings"]
    assert min(seen["drawings"]) > 300
    assert seen["letters"] > 8
    light = sum(map(int, re.findall(r"\d+", seen["background"]))) > sum(map(int, re.findall(r"\d+", seen["ink"])))
    assert light == (scheme == "light")


BENCHMARKS = "model,task,state,n,metric,seconds,value,stderr\ndense,piqa,ok,200,acc,3.0,0.65,0.03\n"
SENSITIVITY = "block,family,chi,kl,state\n0,q,10,0.01,ok\n"
HEALING = {"looks": [{"tokens": 0, "kl": 0.5}, {"tokens": 9, "kl": 0.25}], "outlook": "longer is better"}
CELLS = ("", "x", "nan", "inf", "-1", "0", "1e308", "9" * 400, "x" * 200_000, "\x00", '"')
ODD = [None, True, 0, -1, 1e308, 10**18, 10**290, "", "x", "x" * 200_000, [], {}, [[]], {"a": [None]}]


def changes(value, path=()):
    """Every place inside a document, by its path."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from changes(value[key], (*path, key))


def with_change(value, path, odd):
    """The document with an odd value in a place, or without that place if `odd` is `changes`."""
    if not path:
        return odd
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if odd is changes:
        del inner[path[-1]]
    else:
        inner[path[-1]] = odd
    return copy


def test_no_value_in_a_file_of_a_run_can_make_a_report_fail_otherwise_than_by_a_refusal(run):
    """Every value of every document is replaced by two odd ones, drawn from a fixed seed."""
    folder, chance = run(), random.Random(0)
    (folder / "healed").mkdir()
    documents = {
        "summary.json": SUMMARY,
        "prior.json": {"sites": SITES + CUT[:2], "configuration": {"seed": 0}},
        "healed/healing.json": HEALING,
    }
    refused = 0
    for name, document in documents.items():
        for path in changes(document):
            for odd in chance.sample((changes, *ODD) if path else ODD, 2):
                (folder / name).write_text(json.dumps(with_change(document, path, odd)))
                refused += refuses(folder)
        (folder / name).write_text(json.dumps(document))
    tables = {"benchmarks.csv": BENCHMARKS, "sensitivity.csv": SENSITIVITY}
    tables["trials.csv"] = (folder / "trials.csv").read_text()
    for name, text in tables.items():
        head, line, *rest = text.splitlines()
        for column in range(len(line.split(","))):
            for odd in chance.sample(CELLS, 3):
                cells = line.split(",")
                cells[column] = odd
                (folder / name).write_text("\n".join([head, ",".join(cells), *rest]) + "\n")
                refused += refuses(folder)
        for odd in (b"", b"\n", head.encode(), b"\xff\xfe", b"a,b\n1\n1,2,3\n", b'"', line.encode()):
            (folder / name).write_bytes(odd)
            refused += refuses(folder)
        (folder / name).write_text(text)
    assert refused > 100
    assert not refuses(folder)


def refuses(folder):
    said = ""
    try:
        _Elements(report([folder]))
    except Refusal as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000
    return bool(said)


@pytest.mark.parametrize("name", ["summary.json", "prior.json", "trials.csv", "benchmarks.csv", "sensitivity.csv"])
def test_a_fifo_or_a_folder_in_the_place_of_a_file_is_refused_and_does_not_hang(run, name):
    folder = run()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(Refusal):
        report([folder])
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(Refusal):
        report([folder])
