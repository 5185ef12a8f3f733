"""Folders that bring code of their own: no command runs it or asks about it, and each names what it refuses."""

from __future__ import annotations

import ast
import builtins
import io
import json
import sys
from pathlib import Path

import pytest
from prior_document import document
from tiny_model import tensorized

from compression.refusal import Refusal
from search import cli
from search.export.folder import export_model
from search.model.loading import load_for_use, load_model
from search.model.own_code import refuse_own_code
from search.model.sources import locate

ROOT = Path(__file__).parents[3]
RAN = "the_folder_ran_code"
CODE = f"import builtins\nbuiltins.{RAN} = True\nclass Evil: pass\nclass EvilConfig: pass\n"

MAPS = {
    "unknown model": ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}),
    "known model": ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}),
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    "old tokenizer": ("tokenizer_config.json", {"auto_map": ["evil.Evil", "evil.Evil"]}),
    "tokenizer of the model": ("config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}),
    "elsewhere": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["someone/else--evil.Evil", None]}}),
}

COMMANDS = {
    "search": ["--model", "DIR", "--budget", "1"],
    "dry run": ["--model", "DIR", "--dry-run"],
    "generate": ["generate", "DIR", "--prompt", "a"],
    "generate, asked on stdin": ["generate", "DIR"],
    "benchmark": ["benchmark", "DIR", "--tasks", "sciq", "--out", "OUT"],
    "profile": ["profile", "--model", "DIR", "--out", "OUT"],
    "compare": ["compare", "--model", "DIR", "--out", "OUT"],
    "apply": ["apply", "--prior", "PRIOR", "--model", "DIR", "--out", "OUT"],
    "heal": ["heal", "DIR", "--model", "random:tiny-llama"],
    "heal towards": ["heal", "GOOD", "--model", "DIR"],
    "export": ["export", "RUN", "--out", "OUT"],
    "heal a run": ["heal", "RUN"],
}


def change(folder: Path, file: str, values: dict[str, object]) -> None:
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(document | values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as a folder, beside a file whose code says that it ran."""
    loaded = load_model("random:tiny-llama", "cpu")
    path = tmp_path / "brought"
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    (path / "evil.py").write_text(CODE)
    return path


@pytest.mark.parametrize("name", MAPS)
def test_a_folder_that_wants_its_own_code_is_refused_by_name(name: str, folder: Path) -> None:
    change(folder, *MAPS[name])
    with pytest.raises(Refusal, match=r"model '.*brought' wants to run code of its own: .*evil\.Evil"):
        locate(str(folder))


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_it_or_asks(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    if name == "heal":  # an exported folder whose tokenizer brings code
        change(folder, "config.json", {"quantization_config": {"quant_method": "chisel"}})
    change(folder, *MAPS["tokenizer"])
    prior = document() | {"configuration": {"model": str(folder)}}
    if name == "heal":
        prior["model"] |= {"id": "random:tiny-llama"}
    for place in (tmp_path / "run", tmp_path / "good", *[folder] * (name == "heal")):
        place.mkdir(exist_ok=True)
        (place / "prior.json").write_text(json.dumps(prior))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": str(folder)}))
    (tmp_path / "good" / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "chisel"}}'
    )
    (tmp_path / "prior.json").write_text(json.dumps(prior))
    places = {"DIR": folder, "OUT": "out", "RUN": "run", "GOOD": "good", "PRIOR": "prior.json"}
    assert cli.main([str(places.get(word, word)) for word in COMMANDS[name]]) == cli.REFUSED
    out, err = capsys.readouterr()
    assert f"model '{folder}' wants to run code of its own" in err.splitlines()[-1]
    assert "[y/N]" not in out + err
    assert not hasattr(builtins, RAN)


@pytest.mark.parametrize("kind", ["evil", None, 3, ["llama"]])
def test_an_architecture_that_transformers_does_not_know_is_refused_by_name(kind: object, folder: Path) -> None:
    change(folder, "config.json", {"model_type": kind})
    with pytest.raises(Refusal, match=r"model '.*brought' needs code that is not in transformers: model_type"):
        locate(str(folder))


def test_code_that_is_not_there_and_not_needed_is_no_reason_to_refuse(folder: Path) -> None:
    """As in a hub model whose classes transformers has taken over: its Python files are never downloaded."""
    change(folder, *MAPS["known model"])
    (folder / "evil.py").unlink()
    assert load_model(str(folder), "cpu").digest == load_model("random:tiny-llama", "cpu").digest


def test_a_config_beside_a_gguf_file_is_not_its_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"name": "of another program"}')
    (folder / "model.gguf").touch()
    assert locate(str(folder / "model.gguf")).gguf == "model.gguf"
    change(folder, *MAPS["tokenizer"])
    with pytest.raises(Refusal, match="wants to run code"):
        locate(str(folder / "model.gguf"))


def test_a_tokenizer_that_is_not_in_transformers_needs_code_even_if_its_file_is_absent(folder: Path) -> None:
    change(folder, "tokenizer_config.json", {"tokenizer_class": "Evil", **MAPS["tokenizer"][1]})
    (folder / "evil.py").unlink()
    with pytest.raises(Refusal, match=r"tokenizer_config\.json names"):
        locate(str(folder))


def test_our_own_export_loads_without_running_the_file_beside_it(tmp_path: Path) -> None:
    loaded = tensorized()
    export_model(loaded.model, loaded.tokenizer, tmp_path / "hf")
    (tmp_path / "hf" / "modeling_chisel.py").write_text(CODE)
    assert load_for_use(str(tmp_path / "hf"), "cpu").model.config.model_type == "llama"
    assert not hasattr(builtins, RAN)
    change(tmp_path / "hf", "config.json", {"model_type": "evil"})
    with pytest.raises(Refusal, match="not in transformers"):
        refuse_own_code("hf", tmp_path / "hf")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[]", "(must hold|expected) a JSON object"),
        ("{", "cannot use .*config.json"),
        ("\udcff", "cannot use .*config.json"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(content: str, reason: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(Refusal, match=reason):
        locate(str(folder))


def test_every_call_of_a_loader_says_whether_code_is_trusted() -> None:
    """Without the word, transformers may ask on standard input whether to run the code."""
    said = {f"trust_remote_code={value}" for value in ("False", "trusted", "source.trusted")}
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("search", "agents", "compression", "envs", "benchmarks", "examples")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr == "from_pretrained" or ast.unparse(node.func).endswith("AutoModelForCausalLM.from_config"))
        and not said & set(map(ast.unparse, node.keywords))
    ]
    assert not silent
