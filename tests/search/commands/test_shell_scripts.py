"""Completion: the shell offers what the parsers know."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from search import cli
from search.config import AGENTS, RECORDED, Config


def made(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("chisel", "comp"), {"compare", "completion"}),
        (("chisel", "--agent", "optuna-c"), {"optuna-cmaes"}),
        (("chisel", "--targ"), {"--target-bytes-kept", "--target-kept"}),
        (("chisel", "compare", "--ag"), {"--agents"}),
        (("chisel", "compare", "--granularity", ""), {"block", "family", "site", "head", "block+family"}),
        (("chisel", "doctor", "--js"), {"--json"}),
    ],
)
def test_bash_offers_what_fits(words: tuple[str, ...], offered: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({asked}); COMP_CWORD={len(words) - 1}; _chisel; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-c", f"{made('bash', capsys)}\n{ask}"], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_flag_is_in_every_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = made(shell, capsys)
    for word in (
        *cli.COMMANDS,
        *AGENTS,
        *(name.replace("_", "-") for name in Config.model_fields if name not in RECORDED),
    ):
        assert word in text
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=text, text=True, check=True, capture_output=True)


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "zhs"]) == 2
    assert "the nearest is zsh" in capsys.readouterr().err
