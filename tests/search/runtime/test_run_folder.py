import json
import os
import subprocess
import sys
import threading
from importlib.machinery import ModuleSpec

import pytest

from compression.storage.whole_files import replace_file
from search.config import Config
from search.runtime.files import finite
from search.runtime.provenance import environment
from search.runtime.run_folder import CONFIG, SUMMARY, RunFolder, contents, refuse_held, refuse_unwritable, refuse_used


def test_a_new_folder_is_named_by_date_agent_model_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunFolder.new(None, "reinforce", "org/My Model", 3) as folder:
        assert folder.path.parent == tmp_path / "results"
        assert folder.path.name.endswith("-reinforce-My-Model-3")


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [RunFolder.new(None, "random", "../..", 0) for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    assert {folder.path.parent for folder in folders} == {tmp_path / "results"}
    for folder in folders:
        folder.__exit__(None, None, None)


def test_spaces_and_other_alphabets_are_fine(tmp_path):
    with RunFolder.new(str(tmp_path / "мой запуск ä"), "random", "m", 0) as folder:
        folder.write_json(SUMMARY, {"χ": 3})
        assert json.loads((folder / SUMMARY).read_text(encoding="utf-8")) == {"χ": 3}


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"new or empty folder, but .* holds 'thesis.tex'"):
        RunFolder.new(str(tmp_path), "random", "m", 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_a_run_is_refused_with_the_way_to_resume(tmp_path):
    with RunFolder.new(str(tmp_path), "random", "m", 0) as folder:
        folder.write_text(CONFIG, Config().to_json())
    with pytest.raises(ValueError, match="holds a run or a model already; continue a run with --resume"):
        RunFolder.new(str(tmp_path), "random", "m", 0)
    with RunFolder.resume(str(tmp_path)) as again:
        assert again.path == tmp_path


def test_a_file_as_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        RunFolder.new(str(tmp_path / "file"), "random", "m", 0)
    with pytest.raises(ValueError, match=r"cannot use the folder .*: .*file is not a folder"):
        RunFolder.new(str(tmp_path / "file" / "run"), "random", "m", 0)


def test_resume_wants_a_run(tmp_path):
    with pytest.raises(ValueError, match="resume must be the folder of an earlier run"):
        RunFolder.resume(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    code = (
        "import sys\nfrom search.runtime.run_folder import RunFolder\n"
        "try:\n    RunFolder.resume(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
    )
    with RunFolder.new(str(tmp_path), "random", "m", 0) as folder:
        folder.write_text(CONFIG, Config().to_json())
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
        )
    assert f"is in use by process {os.getpid()} on " in run.stdout
    RunFolder.resume(str(tmp_path)).__exit__(None, None, None)


def test_a_folder_under_way_is_refused_by_its_holder_before_what_it_holds(tmp_path):
    for written in (None, CONFIG, "thesis.tex"):
        path = tmp_path / str(written)
        with RunFolder.new(str(path), "random", "m", 0) as folder:
            if written is not None:
                folder.write_text(written, "{}")
            for refuse in (refuse_held, refuse_used):
                with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on "):
                    refuse(path)
        refuse_held(path)
    refuse_held(tmp_path)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("files", [0, 1])
def test_what_a_killed_owner_leaves_of_its_first_files_counts_as_nothing(tmp_path, files):
    code = (
        "import os, signal, sys\nfrom search.runtime.run_folder import RunFolder\n"
        "kill, steps = lambda *_: os.kill(os.getpid(), signal.SIGKILL), [os.replace] * int(sys.argv[2])\n"
        "os.replace = lambda *paths: (steps.pop() if steps else kill)(*paths)\n"
        "RunFolder.new(sys.argv[1], 'random', 'm', 0).write_text('config.json', '{}')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(files)], timeout=60)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    assert contents(tmp_path) == []
    (tmp_path / ".my.tmp").touch()
    with pytest.raises(ValueError, match=r"holds '\.my\.tmp'"):
        refuse_used(tmp_path)
    (tmp_path / ".my.tmp").unlink()
    with RunFolder.new(str(tmp_path), "random", "m", 0) as folder:
        folder.write_text(CONFIG, "{}")


def test_a_killed_owner_does_not_keep_the_folder(tmp_path):
    code = (
        "import os, signal, sys\nfrom search.runtime.run_folder import RunFolder\n"
        "folder = RunFolder.new(sys.argv[1], 'random', 'm', 0)\nfolder.write_text('config.json', '{}')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], timeout=60)
    with RunFolder.resume(str(tmp_path / "run")) as folder:
        assert (folder / "config.json").exists()


def test_a_failing_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    with RunFolder.new(str(tmp_path), "random", "m", 0) as folder:
        folder.write_text(SUMMARY, "old")

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            folder.write_text(SUMMARY, "new")
        assert (folder / SUMMARY).read_text() == "old"
        assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_readers_never_see_half_a_file(tmp_path):
    with RunFolder.new(str(tmp_path), "random", "m", 0) as folder:
        texts = ["a" * 200_000, "b" * 200_000]
        folder.write_text("x.txt", texts[0])
        writer = threading.Thread(target=lambda: [folder.write_text("x.txt", texts[i % 2]) for i in range(20)])
        writer.start()
        while writer.is_alive():
            assert (folder / "x.txt").read_text() in texts
        writer.join()


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    with RunFolder.new(str(tmp_path), "random", "m", 0) as folder:
        folder.write_json(SUMMARY, {"rows": [{"kl": float("nan")}, {"kl": 0.5, "ok": True}], "x": (float("inf"),)})
        assert json.loads((folder / SUMMARY).read_text()) == {
            "rows": [{"kl": None}, {"kl": 0.5, "ok": True}],
            "x": [None],
        }
    assert finite("nan") == "nan"


def test_the_environment_says_what_it_ran_on():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"].startswith("2.")
    assert found["cores"] >= 1
    assert found["python"].startswith("3.")


@pytest.mark.parametrize(
    ("module", "command"),
    [
        (None, "python search.py --out 'a b'"),
        ("benchmarks.transfer", "python -m benchmarks.transfer --out 'a b'"),
        ("search.__main__", "python -m search --out 'a b'"),
    ],
)
def test_the_environment_says_by_what_command(module, command, monkeypatch):
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
    monkeypatch.setattr(sys, "argv", ["some/where/search.py", "--out", "a b"])
    assert environment()["command"] == command


def test_a_command_line_that_is_no_text_can_be_stored(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["search.py", "--out", os.fsdecode(b"caf\xe9")])
    assert environment()["command"].endswith("--out 'caf\\udce9'")
    json.dumps(environment(), ensure_ascii=False).encode()


def test_a_run_that_is_continued_keeps_its_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["search.py", "--budget", "5"])
    first = environment()
    monkeypatch.setattr("sys.argv", ["search.py", "--resume", "run"])
    second = environment(first)
    third = environment({**second, "commit": "another"})
    plain = environment()
    assert second["command"] == third["command"] == first["command"]
    assert second["continued_by"] == third["continued_by"] == plain["command"] != first["command"]
    assert "begun_at" not in second
    assert third["begun_at"] == "another"
    assert third["commit"] == first["commit"]
    assert environment({"command": 5})["command"] == plain["command"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [(["file", "x"], "file is not a folder"), (["link"], "link is not a folder"), (["n" * 256], "name of a folder")],
)
def test_a_folder_that_cannot_be_made_is_refused_and_nothing_is_left(parts, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        refuse_unwritable(tmp_path.joinpath(*parts))
    refuse_unwritable(tmp_path / "a" / "b")
    assert sorted(tmp_path.iterdir()) == before


def test_a_text_with_parts_of_a_path_that_is_no_text_can_be_written(tmp_path):
    assert replace_file(tmp_path / "page", os.fsdecode(b"caf\xe9")).read_text() == r"caf\udce9"


def test_a_name_that_a_folder_may_have_is_not_too_long_for_its_temporary_file(tmp_path):
    assert replace_file(tmp_path / ("n" * 255), "text").read_text() == "text"
