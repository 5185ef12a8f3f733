"""Runs by bytes: pruned matrices from menus to files, a size as the target, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest
import torch
from fake_data import fake_data
from finished_runs import run
from model_folder import model_folder
from safetensors.torch import load_file
from small_run import HEALED, SMALL, words
from transformers import AutoModelForCausalLM

from compression.layers.filled_linear import FilledLinear
from compression.layers.packed import PackedEmbedding, PackedLinear
from compression.schedule import Schedule
from compression.sites import put_modules
from search import cli
from search.config import bytes_of
from search.engines import ENGINES
from search.experiment.calibration import Calibration
from search.export.gguf_file import read_values
from search.export.integers import stands_for
from search.export.restore import restore
from search.model.loading import load_model
from search.priors.format import Prior
from search.runtime.console import Console

__all__ = ["fake_data"]

pytestmark = pytest.mark.usefixtures("fake_data")


@pytest.mark.slow
def test_one_number_gives_a_file_of_that_size_and_what_else_a_run_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    how = {"agent": "gradient", "budget": 10, "repair_tokens": 512, "heal_minutes": 0.01, "export": "hf"}
    summary = run(folder, target_kept=None, size="18kB", **how)
    rows = {row["schedule"]: row for row in summary["rows"]}
    assert list(rows) == [*HEALED[:4], "uniform-bits", *HEALED[4:]]
    for name, row in rows.items():
        assert row["bytes"] <= 18_000 or name == "dense"
        assert row["state"] == "ok"
    assert min(rows[name]["bytes"] for name in ("searched", "uniform-bits")) > 17_000
    assert rows["lagrangian"]["kl"] < rows["uniform-bits"]["kl"] < rows["uniform"]["kl"]
    assert rows["lagrangian"]["kl"] < 0.5 * rows["uniform"]["kl"]
    assert rows["healed"]["kl"] < rows["searched"]["kl"]

    prior = Prior.read(folder / "prior.json")
    assert all(choice.bits for _, choice in prior.schedule if choice.keeps_entries)
    assert any(choice.bits for _, choice in prior.schedule)
    assert prior.is_small
    assert prior.bytes_fraction == pytest.approx(rows["searched"]["bytes"] / rows["dense"]["bytes"])
    assert cli.main(["prior", "show", str(folder / "prior.json")]) == cli.DONE
    assert re.search(r" \d(\.\d+)?b ", capsys.readouterr().out)
    report = (folder / "report.html").read_text()
    assert "A number and b: a matrix in so many bits an entry" in report

    tensors = load_file(folder / "hf" / "model.safetensors")
    assert sum(each.numel() * each.element_size() for each in tensors.values()) == rows["healed"]["bytes"]
    small = AutoModelForCausalLM.from_pretrained(folder / "hf").float()
    masks = {name: values for name, values in tensors.items() if name.endswith("bitmask")}
    assert len(masks) == sum(choice.is_sparse for _, choice in prior.schedule)

    def export(form: str, *more: str) -> int:
        out = str(tmp_path / f"{form}{''.join(more)}")
        return cli.main(["export", str(folder), "--format", form, "--out", out, "--quiet", *more])

    assert export("dense", "--dtype", "float32") == cli.DONE
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense--dtypefloat32")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, dense(ids).logits, rtol=0.1, atol=0.1)  # bfloat16
    for name, choice in prior.schedule:
        if choice.bits:
            values = dense.get_submodule(name).weight.unique()
            assert len(values) < 2**choice.bits * dense.get_submodule(name).weight.numel() / 32
    capsys.readouterr()
    for refused, message in (
        (("hf", "--dtype", "float32"), "dtype must be bfloat16 or float16 for a run that counted 16 bits a number"),
        (("hf", "--quantize", "int4"), "quantize int4 stores all matrices as integers, and "),
        (("plain",), "the plain format holds no factored, pruned or rounded matrices"),
    ):
        assert export(refused[0], *refused[1:]) == cli.REFUSED
        assert message in capsys.readouterr().err.replace("--", "")
    assert export("hf", "--quantize", "mixed") == cli.DONE
    capsys.readouterr()

    given = [f"--{name.replace('_', '-')}={SMALL[name]}" for name in ("model", "device", "calibration_tokens")]
    given += [f"--{name.replace('_', '-')}={SMALL[name]}" for name in ("search_items", "search_text_tokens")]
    given += ["--heldout-tokens=600", "--report-items=6", f"--prior={folder / 'prior.json'}", "--quiet"]
    assert cli.main(["apply", *given, f"--out={tmp_path / 'same'}"]) == cli.DONE
    assert Prior.read(tmp_path / "same" / "prior.json").schedule == prior.schedule
    assert cli.main(["apply", *given, "--size=40kB", f"--out={tmp_path / 'smaller'}"]) == cli.DONE
    smaller = json.loads((tmp_path / "smaller" / "summary.json").read_text())
    assert 39_000 < next(row["bytes"] for row in smaller["rows"] if row["schedule"] == "prior") <= 40_000


@pytest.mark.slow
def test_a_size_for_llama_cpp_is_that_of_a_file_that_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, how = tmp_path / "run", {"serve": "llama.cpp", "repair_tokens": 512, "heal_minutes": 0.01}
    summary = run(folder, model=model_folder(tmp_path / "model"), target_kept=None, size="26kB", export=None, **how)
    rows = {row["schedule"]: row for row in summary["rows"]}
    assert 24_000 < rows["healed"]["bytes"] <= 26_000
    schedule = Prior.read(folder / "prior.json").schedule
    assert {choice.topology for _, choice in schedule} == {"dense"}
    assert {choice.bits for _, choice in schedule} <= {0, 4, 5, 8}
    assert len({choice.bits for _, choice in schedule}) > 1
    file = folder / "gguf" / "model.gguf"
    kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(file).tensors}
    for name, choice in schedule:
        if choice.bits and "q_proj" in name:
            block = name.split(".")[2]
            assert kinds[f"blk.{block}.attn_q.weight"] == {8: "Q8_0", 5: "Q5_0", 4: "Q4_0"}[choice.bits]
    stored = sum(each.n_bytes for each in gguf.GGUFReader(file).tensors)
    vectors = 2 * 32 * 7  # norms, which the file has in 32 bits
    assert 0 <= rows["healed"]["bytes"] + vectors - stored < 500  # numbers of the rows and columns that are left
    model = restore(folder, Console(quiet=True), "cpu", "healed").experiment.loaded.model
    for name, values in read_values(model, file).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, FilledLinear | PackedEmbedding) and name.endswith("weight"):
            assert torch.equal(values, owner.weight.float())
    assert cli.main(["export", str(folder), "--format", "gguf", "--out", str(tmp_path / "g"), "--quiet"]) == cli.DONE
    capsys.readouterr()
    assert (
        cli.main(["export", str(folder), "--format", "plain", "--out", str(tmp_path / "p"), "--quiet"]) == cli.REFUSED
    )
    assert "the plain format holds no factored, pruned or rounded matrices" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "size"), [("vllm", "230kB"), ("mlx-lm", "120kB")])
@pytest.mark.slow
def test_a_size_for_an_engine_is_that_of_a_folder_of_integers(
    engine: str, size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, folder, kind = tmp_path / "model", tmp_path / "run", ENGINES[engine].rounded
    how = {"serve": engine, "repair_tokens": 512, "heal_minutes": 0.01, "export": None, "target_kept": None}
    summary = run(folder, model=model_folder(made, wide=True), size=size, **how)
    rows = {row["schedule"]: row for row in summary["rows"]}
    assert 0.9 * bytes_of(size) < rows["healed"]["bytes"] <= bytes_of(size)
    schedule = Prior.read(folder / "prior.json").schedule
    found = {name: choice.bits for name, choice in schedule}
    assert set(found.values()) <= {0, *ENGINES[engine].bits}
    assert len(set(found.values())) > 1
    for block in range(3):
        names = [f"model.layers.{block}.self_attn.{part}_proj" for part in "qkv"]
        mlp = [f"model.layers.{block}.mlp.{part}_proj" for part in ("gate", "up")]
        if engine == "vllm":
            assert len({found[name] for name in names}) == len({found[name] for name in mlp}) == 1
    restored = restore(folder, Console(quiet=True), "cpu", "healed").experiment.loaded.model
    tensors = load_file(folder / kind / "model.safetensors")
    for name, module in restored.named_modules():
        if isinstance(module, PackedLinear) and not module.tied:
            stored = {key.rpartition(".")[2]: each for key, each in tensors.items() if key.startswith(f"{name}.")}
            assert stands_for(kind, stored, module.stored)
    shapes = sum(each.nbytes for name, each in tensors.items() if name.endswith("weight_shape"))
    written = sum(each.nbytes for each in tensors.values()) - shapes
    assert 0 <= rows["healed"]["bytes"] - written < 500  # numbers of the rows and columns that are left
    if engine == "vllm":
        small = AutoModelForCausalLM.from_pretrained(folder / kind, trust_remote_code=True, dtype=torch.float32)
        ids = torch.arange(30)[None]
        with torch.no_grad():
            torch.testing.assert_close(small(ids).logits, restored.float()(ids).logits, rtol=0.05, atol=0.05)
    for refused, message in (
        (("--format", kind, "--dtype", "bfloat16"), f"the {kind} format holds the integers of a search"),
        (("--format", "plain"), "the plain format holds no factored, pruned or rounded matrices"),
    ):
        out = str(tmp_path / "other")
        assert cli.main(["export", str(folder), *refused, "--out", out, "--quiet"]) == cli.REFUSED
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.slow
def test_the_embedding_is_measured_as_it_is_stored(bits: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = run(
        folder,
        budget=2,
        form="small",
        target_kept=0.9,
        matrix_bits="16",
        embedding_bits=bits,
        repair_tokens=0,
        heal_minutes=0.0,
    )
    rows = {row["schedule"]: row for row in summary["rows"]}
    restored = restore(folder, Console(quiet=True), "cpu", "searched", reference=True)
    model = restored.experiment.loaded.model
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) == (bits < 16)
    assert restored.workload is not None
    quality = restored.workload.measure(model)
    assert quality.kl == pytest.approx(rows["searched"]["kl"], rel=1e-4)
    if bits == 4:
        put_modules(model, {name: getattr(load_model("random:tiny-llama", "cpu").model, name) for name in ("lm_head",)})
        assert restored.workload.measure(model).kl != pytest.approx(quality.kl, rel=1e-2)


@pytest.mark.slow
def test_a_share_of_the_bytes_is_a_target_of_every_form(tmp_path: Path) -> None:
    for form in ("factors", "plain", "any"):
        summary = run(tmp_path / form, target_kept=None, target_bytes_kept=0.8, form=form, budget=0)
        for row in summary["rows"]:
            if row["schedule"] == "lagrangian":
                assert 0.75 < row["bytes_fraction"] <= 0.8
        schedule: Schedule = Prior.read(tmp_path / form / "prior.json").schedule
        assert not any(choice.is_sparse for _, choice in schedule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "1kB"}, r"--size must be at least 5kB, the smallest size that this model can keep with form small"),
        ({"size": "16kB", "form": "plain"}, r"--size must be at least \d\dkB, .* with form plain, got 16kB"),
        (
            {"size": "9GB"},
            "--size must be below 56kB, .* takes with its embedding in 8 bits and all else in 16, got 9GB",
        ),
        ({"size": "9GB", "embedding_bits": 16}, "--size must be below 63kB, .* takes with 16 bits a number, got 9GB"),
        ({"target_bytes_kept": 0.95}, "--target-bytes-kept must be below 0.8776, .* with its embedding in 8 bits"),
        ({"size": "40kB", "embedding_bits": 7}, "--embedding-bits must be one of 16, 8, 6, 5, 4, 3, 2, got 7"),
        ({"size": "40kB", "form": "plain", "embedding_bits": 4}, "embedding_bits 4 needs form small, got plain"),
        ({"size": "40kB", "matrix_bits": "4,7"}, "--matrix-bits must be numbers from 16, 8, 6, 5, 4, 3, 2 with commas"),
        ({"size": "40kB", "form": "plain", "matrix_bits": "4"}, "matrix_bits 4 needs form small, got plain"),
        ({"size": "100"}, "--size must be a number with its unit, such as 100MB, got"),
        ({"size": "3 elephants"}, "must be a number with its unit"),
        ({"target_bytes_kept": 0.04}, r"--target-bytes-kept must be at least 0\.0\d\d\d, the smallest fraction"),
        ({"target_bytes_kept": 1.0}, "--target-bytes-kept must be a number above 0 and below 1, got"),
        ({"size": "40kB", "target_bytes_kept": 0.5}, "size and target_bytes_kept both say how small"),
        ({"size": "40kB", "target_kept": 0.5}, "target_kept and size both say how small the result is to be"),
        ({"size": "40kB", "serve": "vllm", "form": "any"}, "serve vllm needs form plain or small"),
        (
            {"size": "40kB", "serve": "vllm", "matrix_bits": "3,8"},
            "vllm holds matrices of 16, 8, 4 bits a number, got 3",
        ),
        ({"size": "40kB", "serve": "vllm", "embedding_bits": 8}, "vllm holds an embedding of 16 bits a number, got 8"),
        ({"size": "40kB", "export": "mlx"}, "export mlx needs form small and serve mlx-lm, got small and transformers"),
        ({"size": "40kB", "serve": "llama.cpp", "matrix_bits": "3,8"}, "llama.cpp holds matrices of 16, 8, 5, 4 bits"),
    ],
)
def test_targets_that_cannot_be_met_are_refused_before_any_work(
    changes: dict[str, object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Calibration, "__call__", lambda self: pytest.fail("it was calibrated"))
    for dry in ([], ["--dry-run"]):
        try:
            code = cli.main([*words(out=tmp_path / "run", **{"target_kept": None, **changes}), *dry])
        except SystemExit as left:
            code = left.code
        error = capsys.readouterr().err
        assert code == cli.REFUSED
        assert re.search(message, error), error
        assert error.count("\n") == 1
