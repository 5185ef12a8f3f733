"""Priors: what is read is whole and true, what is not is refused in one line, and nothing is lost on the way."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from prior_document import CHI, SITES, document, written
from pydantic import ValidationError

from compression import Site
from search import cli
from search.priors.format import LARGEST_FILE, Prior
from search.priors.text import bar, diff_text, show_text
from search.priors.transfer import exact_schedule

ROOT = Path(__file__).parents[3]
PUBLISHED = sorted((ROOT / "results" / "priors").glob("*.json"))


def changed(place: str, value: object) -> dict[str, Any]:
    """The document with one value replaced, or taken out where `value` is Ellipsis."""
    values = document()
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    at: Any = values
    for key in path:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return values


def test_what_is_written_is_read_again_and_keys_keep_their_order(tmp_path: Path) -> None:
    prior = Prior.read(written(tmp_path, document()))
    assert prior.schedule.digest == document()["schedule_digest"]
    assert exact_schedule(prior, SITES) == prior.schedule
    text = prior.to_json()
    again = Prior.read(written(tmp_path, text))
    assert again == prior
    assert again.to_json() == text
    fields = list(Prior.model_fields)
    assert sorted(json.loads(text), key=fields.index) == list(json.loads(text))
    assert '"shape": [12, 8],' in text


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_priors_of_every_version_load(path: Path) -> None:
    prior = Prior.read(path)
    assert prior.kept_fraction <= prior.target_kept
    assert prior.schedule.digest == json.loads(path.read_text())["schedule_digest"]
    searched = next(score for score in prior.scores if score.schedule == "searched")
    assert searched.kl is not None
    assert searched.kl.low is not None
    assert searched.kl.high is not None
    assert searched.kl.low < searched.kl.value < searched.kl.high
    assert searched.items > 0


def test_version_1_with_a_field_it_never_had_is_refused(tmp_path: Path) -> None:
    values = json.loads(next(path for path in PUBLISHED if '"version": 1' in path.read_text()).read_text())
    assert Prior.read(written(tmp_path, values)).seeds == {"run": 0}
    with pytest.raises(ValueError, match="surprise is not a field"):
        Prior.read(written(tmp_path, values | {"surprise": 1}))


TWICE = '{"format": "chisel-prior", "format": "chisel-prior"}'
UNFINISHED = json.dumps(document())[:-20]
REFUSED = [
    ("not JSON", "χ = 3", "Expecting value"),
    ("cut", UNFINISHED, "cannot use the prior"),
    ("empty", "", "Expecting value"),
    ("a list", "[]", "expected a JSON object"),
    ("key twice", TWICE, "the key 'format' occurs twice"),
    ("NaN", json.dumps(document()).replace("0.125", "NaN"), "NaN is not allowed"),
    ("Infinity", json.dumps(document()).replace("0.125", "-Infinity"), "-Infinity is not allowed"),
    ("overflow", json.dumps(document()).replace("0.125", "1e999"), "1e999 is not allowed"),
    ("deep", "[" * 100_000, "nested too deeply"),
    ("deep object", '{"a":' * 100_000, "nested too deeply"),
    ("χ zero", changed("sites.0.chi", 0), "sites.0.chi: must be greater than or equal to 1, got 0"),
    ("χ negative", changed("sites.0.chi", -4), "sites.0.chi: must be greater than or equal to 1, got -4"),
    ("χ float", changed("sites.0.chi", 2.0), "sites.0.chi: must be a valid integer, got 2.0"),
    ("χ true", changed("sites.0.chi", True), "sites.0.chi: must be a valid integer, got True"),
    ("χ text", changed("sites.0.chi", "2"), "sites.0.chi: must be a valid integer, got '2'"),
    ("χ huge", json.dumps(document()).replace('"chi": 2,', f'"chi": {"9" * 5000},'), "cannot use the prior"),
    ("χ too large", changed("sites.0.chi", 9), "sites.0.chi of blocks.0.q must be at most 7"),
    ("χ missing", changed("sites.0.chi", ...), "blocks.0.q needs chi"),
    ("dense with χ", changed("sites.1.chi", 3), "blocks.0.down is dense and has no chi"),
    ("other χ", changed("sites.0.chi", 3), "schedule_digest must be that of the sites"),
    ("other size", changed("sites.0.parameters", 5), "sites.0.parameters must be 36, got 5"),
    ("other sum", changed("kept_fraction", 0.5), "kept_fraction must be that of the sites"),
    ("other legs", changed("sites.0.out_legs", [6, 2]), r"the legs of pivoted-lowrank are (12, 1)"),
    ("topology", changed("sites.0.topology", "tucker"), "topology must be lowrank"),
    ("metric", changed("sites.0.metric", "none"), "sites.0.metric: must be 'plain', 'input' or 'two-sided'"),
    ("site twice", changed("sites.1.name", "blocks.0.q"), "a name is repeated"),
    ("no site", changed("sites", []), "sites: "),
    ("a path", changed("sites.0.name", "../../etc/passwd"), "sites.0.name: must match pattern"),
    ("a path as model", changed("model.id", "../secrets"), "model.id: must be a printable name without '..'"),
    ("absolute model", changed("model.id", "/etc"), "model.id: must be a printable name"),
    ("half a character", changed("model.id", "\ud800"), "cannot use the prior"),
    ("family path", changed("sites.0.family", "a/../b"), "sites.0.family: must match pattern"),
    ("unknown field", changed("sites.0.rank", 3), "sites.0.rank is not a field of version 5"),
    ("missing field", changed("model", ...), "model is missing"),
    ("no digest", changed("model.digest", "xyz"), "model.digest: must match pattern"),
    ("newer", changed("version", 6), "version must be at most 5, the newest that this program reads, got 6"),
    ("older than any", changed("version", 0), "version must be a whole number of at least 1, got 0"),
    ("version text", changed("version", "2"), "version must be a whole number of at least 1, got '2'"),
    ("other format", changed("format", "gguf"), "format must be 'chisel-prior', got 'gguf'"),
    ("block huge", changed("sites.0.block", 10**12), "sites.0.block: must be less than 100000"),
    ("trace", changed("sites.0.sensitivity.kl", [1.0]), "a trace needs one KL for each χ"),
    ("trace order", changed("sites.0.sensitivity.chi", [4, 1]), "the χ of a trace must ascend"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_bad_prior_is_refused_in_one_line(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prior", "validate", str(written(tmp_path, content))]) == cli.REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_a_prior_of_a_gigabyte_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "prior.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match=f"larger than {LARGEST_FILE} bytes"):
        Prior.read(path)
    with pytest.raises(ValueError, match="not a file"):
        Prior.read(tmp_path)


def test_a_chi_above_the_largest_is_lowered_only_when_asked(tmp_path: Path) -> None:
    values = document(chi={**CHI, "blocks.1.down": 100})
    path = written(tmp_path, values)
    with pytest.raises(ValueError, match=r"sites\.3\.chi of blocks\.1\.down must be at most 7, .* got 100; .* --clamp"):
        Prior.read(path)
    lowered = Prior.read(path, clamp=True)
    assert [site.chi for site in lowered.sites] == [2, None, 3, 7, 1, None]
    assert lowered.sites[3].parameters == 7 * (8 + 24 - 7)
    assert lowered.scores == ()
    assert Prior.read(written(tmp_path, lowered.to_json())) == lowered
    within = written(tmp_path, document())
    assert Prior.read(within, clamp=True) == Prior.read(within)


def test_validate_takes_a_chi_above_the_largest_with_clamp_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prior", "validate", str(written(tmp_path, document(chi={**CHI, "blocks.1.down": 100})))]
    assert cli.main(command) == cli.REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert "must be at most 7" in err
    assert cli.main([*command, "--clamp"]) == cli.DONE
    out, err = capsys.readouterr()
    assert err == ""
    assert "ok, 6 sites of toy" in out


def test_a_prior_written_by_hand_needs_no_digest(tmp_path: Path) -> None:
    values = document()
    del values["schedule_digest"]
    assert Prior.read(written(tmp_path, values)).schedule.digest == document()["schedule_digest"]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (SITES[:-1], "the model has no blocks.2.down; the nearest is blocks.0.down"),
        ((*SITES, Site("blocks.3.q", 3, "q", 12, 8)), "the prior lacks blocks.3.q, which the model has"),
        ((Site("blocks.0.q", 0, "q", 12, 9), *SITES[1:]), r"blocks.0.q must have shape \(12, 9\) as in the model"),
        ((Site("blocks.0.q", 0, "q", 12, 8, "shared"), *SITES[1:]), "blocks.0.q must stay dense here: shared"),
    ],
)
def test_sites_that_are_not_the_models_are_refused(sites: tuple[Site, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        exact_schedule(Prior.read(written(tmp_path, document())), sites)


def test_the_published_schema_is_that_of_the_program_and_fits_what_is_published() -> None:
    schema = (ROOT / "docs" / "prior.schema.json").read_text()
    assert schema == Prior.published_schema(), "write it again: python search.py prior schema > docs/prior.schema.json"
    properties = json.loads(schema)
    assert list(properties["properties"]) == list(Prior.model_fields)
    assert properties["additionalProperties"] is False
    assert "description" in properties["$defs"]["PriorSite"]["properties"]["chi"]


def test_a_bar_is_as_long_as_its_fraction_and_always_as_wide() -> None:
    assert bar(0, 4) == "    "
    assert bar(1, 4) == "████"
    assert bar(0.5, 4) == "██  "
    assert bar(9 / 32, 4) == "█▏  "
    assert {len(bar(number / 100)) for number in range(-5, 106)} == {24}


def test_a_prior_is_shown_with_a_line_a_block_and_its_totals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, document())
    assert cli.main(["prior", "show", str(path)]) == cli.DONE
    out = capsys.readouterr().out
    assert "\x1b" not in out  # no colour, whatever the terminal
    lines = out.splitlines()
    assert lines[3].split() == ["block", "kept", "q", "down"]
    assert [line.split()[-2:] for line in lines[4:7]] == [["2", "d"], ["3", "4"], ["1", "d"]]
    assert f"{document()['kept_fraction']:.3f}" in lines[7]
    for published in PUBLISHED:
        assert show_text(Prior.read(published))


def test_a_difference_lists_what_moved_and_nothing_else(tmp_path: Path) -> None:
    first = Prior.read(written(tmp_path, document()))
    assert diff_text(first, first) == "the same model and the same schedule\n"
    other = document(chi={**CHI, "blocks.1.q": 6, "blocks.2.down": 2})
    other["model"] = copy.deepcopy(other["model"]) | {"id": "another"}
    text = diff_text(first, Prior.read(written(tmp_path, other)))
    assert "model.id: toy → another" in text
    assert "2 sites differ" in text
    assert "blocks.2.down: dense → pivoted-lowrank χ 2" in text
    assert "blocks.1.q: pivoted-lowrank χ 3 → pivoted-lowrank χ 6" in text
    assert "blocks.0" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "prior needs one of show, diff, validate, schema, got ''"),
        (["shwo", "a"], "the nearest is show"),
        (["show"], "prior show needs one file or more, got 0"),
        (["diff", "a"], "prior diff needs two files, got 1"),
        (["show", "nowhere.json"], "cannot read the prior nowhere.json: No such file"),
        (["show", "a", "--clam"], "the nearest is --clamp"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prior", *words]) == cli.REFUSED
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


SCORE: dict[str, object] = dict.fromkeys(("kept_fraction", "model_kept_fraction", "bytes_fraction"), 0.5)
SCORE |= dict.fromkeys(("parameters", "bytes", "multiply_adds", "items", "tokens"), 5)
SCORE |= {"schedule": "searched", "state": "ok"}


@pytest.mark.parametrize("field", ["kl", "accuracy", "expected_accuracy"])
@pytest.mark.parametrize(
    "interval", [{"low": 0.1}, {"high": 0.9}, {"low": 0.6, "high": 0.9}, {"low": 0.9, "high": 0.1}, {"low": "x"}]
)
def test_an_interval_with_one_end_or_without_its_value_is_refused_before_it_is_shown(
    field: str, interval: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = document() | {"scores": [SCORE | {field: {"value": 0.5, "low": 0.1, "high": 0.9}}]}
    assert cli.main(["prior", "show", str(written(tmp_path, whole))]) == cli.DONE
    capsys.readouterr()
    wrong = document() | {"scores": [SCORE | {field: {"value": 0.5, **interval}}]}
    for command in (["show"], ["validate"]):
        assert cli.main(["prior", *command, str(written(tmp_path, wrong))]) == cli.REFUSED
        assert capsys.readouterr().err.count("\n") == 1


def test_no_value_in_a_prior_can_make_it_fail_otherwise_than_by_a_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A place in the file, drawn from a fixed seed, gets an odd value; the file is shown, or refused in one line."""
    chance = random.Random(0)
    kinds = [None, True, 0, -1, 1e308, 10**18, 10**290, "", "x", "x" * 5000, [], {}, [[]], {"a": [None]}]
    whole = document() | {"scores": [SCORE | {"kl": {"value": 0.5, "low": 0.1, "high": 0.9}}]}
    codes = []
    for _ in range(150):
        odd: Any = json.loads(json.dumps(whole))
        inner: Any = odd
        while True:
            key = chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if not inner[key] or not isinstance(inner[key], dict | list) or chance.random() < 0.2:
                break
            inner = inner[key]
        inner[key] = chance.choice(kinds)
        path = str(written(tmp_path, odd))
        codes += [cli.main(["prior", "show", path]), cli.main(["prior", "diff", path, path])]
        err = capsys.readouterr().err
        assert err.count("\n") == codes.count(cli.REFUSED)
        codes = [code for code in codes if code != cli.REFUSED]
        assert set(codes) <= {cli.DONE}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("sites", [0]),
        ("scores", [{}]),
        ("sites.0.out_legs", [0]),
        ("sites.0.sensitivity.chi", [-1]),
        ("sites.0.sensitivity.kl", ["x"]),
        ("data.search_items", ["x"]),
        ("data.report_items", ["x"]),
    ],
)
def test_a_list_is_refused_at_its_first_wrong_element(place: str, value: list[object]) -> None:
    with pytest.raises(ValueError, match=place) as refused:
        Prior.of(changed(place, value * 100_000))
    reason = refused.value.__context__
    assert isinstance(reason, ValidationError)
    assert reason.error_count() <= 20  # those of one element


@pytest.mark.parametrize("place", ["seeds", "environment", "configuration", "model", "sites.0"])
def test_an_object_of_many_keys_is_refused_before_they_are_checked(place: str, tmp_path: Path) -> None:
    path = written(tmp_path, changed(place, {f"key{number}": -1 for number in range(2000)}))
    with pytest.raises(ValueError, match="an object has 2000 keys, such as 'key0', and at most 1000 are read"):
        Prior.read(path)
