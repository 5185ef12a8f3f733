"""Loads exported folders in every version of transformers that may read them, and compares what they generate.

    python -m benchmarks.transformers_versions [--versions 5.16.0 5.24.0] [--folder DIR] [--write]

Each version that pip offers gets a folder of its own, and takes torch from this environment. With it, a process without
this project loads tiny folders (`benchmarks.tiny_folders`), by the code beside the weights where there is some. Greedy
tokens after four prompts must be ours, and the five largest log-probabilities of the first of them ours within 0.0001
nats; once more after the folder was saved again in shards and loaded with a device map; and within 0.2 nats after
`.half()` and after `.to(torch.bfloat16)`. Without trust, folders with factors must be refused.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Bar, markdown, publish
from benchmarks.tiny_folders import EXPECTED, FORMS, write_tiny_folders

_OLDEST = (5, 16)
_FOLDERS = [name for name in FORMS if name != "gguf"]

_INTRO = (
    "Tiny folders of every form but gguf. Checks of each: loaded; saved again in shards and loaded with a device map; "
    "bfloat16; half precision; and, of those with factors, refused without trust."
)

_PROBE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch, transformers
from transformers import AutoModelForCausalLM

root, again, names = Path(sys.argv[1]), sys.argv[2], sys.argv[4:]
assert Path(transformers.__file__).is_relative_to(sys.argv[3])
expected = json.loads((root / "expected.json").read_text())

@torch.no_grad()
def right(model, name, tolerance=1e-4):
    for prompt, answer in zip(expected["prompts"], expected["answers"][name]):
        ids = torch.tensor([prompt])
        first = model(ids).logits[0, -1].float().log_softmax(-1).topk(5).values
        if not (first - torch.tensor(answer["first"])).abs().max() < tolerance:
            return False
        if model.dtype != torch.float32:
            continue
        model.generation_config.eos_token_id = None
        options = dict(max_new_tokens=len(answer["tokens"]), do_sample=False, pad_token_id=256)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt):]
        if found.tolist() != answer["tokens"]:
            return False
    return True

said = {}
for name in names:  # first, since the code of one folder lets the process read them all
    if name.startswith("hf"):
        try:
            AutoModelForCausalLM.from_pretrained(root / name)
            said[f"{name}: refused without trust"] = False
        except RuntimeError:
            said[f"{name}: refused without trust"] = True
for name in names:
    trust = dict(trust_remote_code=name != "plain-alike")
    model = AutoModelForCausalLM.from_pretrained(root / name, **trust).eval()
    said[f"{name}: loaded"] = right(model, name)
    model.save_pretrained(f"{again}/{name}", max_shard_size="40KB")
    assert len([*Path(again, name).glob("*.safetensors")]) > 1
    model = AutoModelForCausalLM.from_pretrained(f"{again}/{name}", device_map="cpu", **trust).eval()
    said[f"{name}: saved in shards and loaded with a device map"] = right(model, name)
    said[f"{name}: bfloat16"] = right(model.to(torch.bfloat16), name, 0.2)
    model = AutoModelForCausalLM.from_pretrained(root / name, **trust).eval()
    said[f"{name}: half precision"] = right(model.half(), name, 0.2)
print(json.dumps(said))
"""


def offered() -> list[str]:
    """The versions that pip offers, from the oldest that is meant to work, ascending."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\d+\.\d+\.\d+", listed.split("Available versions:")[1])
    numbered = {tuple(map(int, version.split("."))): version for version in found}
    return [version for numbers, version in sorted(numbered.items()) if numbers >= _OLDEST]


def installed(folder: Path, version: str) -> Path:
    """A folder with this version of transformers and what it depends on, which is not torch; made once."""
    place = folder / version
    if not (place / "transformers").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place)]
        subprocess.run([*install, f"transformers=={version}"], check=True)
    return place


def main() -> None:
    """Tries every version and prints a table, which is written to results/ if asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--versions", nargs="+", help="versions of transformers (default: all from 5.16 on)")
    parser.add_argument("--folder", type=Path, help="where to keep the versions")
    parser.add_argument("--quick", action="store_true", help="the newest version only")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    given = parser.parse_args()
    versions = given.versions or (offered()[-1:] if given.quick else offered())
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch, "folders")
        write_tiny_folders(folders)
        assert (folders / EXPECTED).exists()
        for version in versions:
            place = installed((given.folder or Path(scratch, "versions")).absolute(), version)
            command = [sys.executable, "-I", "-c", _PROBE, str(folders), str(Path(scratch, "again", version))]
            command += [str(place), *_FOLDERS]
            ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            said = json.loads(ran.stdout.splitlines()[-1]) if not ran.returncode else {}
            wrong = [name for name, right in said.items() if not right]
            reason = ran.stderr.strip().splitlines()[-1] if ran.returncode else ", ".join(wrong)
            rows.append([version, f"{sum(said.values())} of {len(said)}", reason or "-"])
            print(*rows[-1], flush=True)
    publish(
        "benchmarks.transformers_versions",
        "Exported folders in versions of transformers",
        f"{_INTRO}\n\n{markdown(['version', 'checks that hold', 'what does not'], rows)}",
        [Bar("versions in which all holds", sum(row[2] == "-" for row in rows) / len(rows), ">=", 1.0)],
        given.write,
    )


if __name__ == "__main__":
    main()
