"""The whole job from Python: profile, search, heal, save.

python -m examples.python_api        # the default model, small settings
"""

from __future__ import annotations

from pathlib import Path

from search.config import Config
from search.export.folder import export_model
from search.export.restore import restore
from search.healing.plan import Options
from search.healing.run import heal_folder
from search.pipeline.run import run
from search.profiling.sweep import Levels, profile
from search.runtime.console import Console


def main(model: str = "default", out: Path = Path("results/from-python"), minutes: float = 2.0) -> Path:
    """Returns the folder that transformers loads, after `import search.hf`."""
    console, given = Console(), {"model": model, "quick": True}
    sensitivity = Config.of({**given, "out": str(out / "profile")})
    _, summary = profile(sensitivity, Levels(chi=(10, 50), fractions=()), 256, console)
    found = run(
        Config.of({**given, "agent": "reinforce", "target_kept": 0.7, "heal_minutes": 0.0, "out": str(out / "run")}),
        console,
    )
    healed = heal_folder(found.folder, Options(minutes=minutes), console)
    best = restore(found.folder, console, healed=healed.folder).subject.loaded
    export_model(best.model, best.tokenizer, out / "model")
    print(summary, *(f"{row['schedule']}: KL {row['kl']}" for row in healed.rows), sep="\n")
    return out / "model"


if __name__ == "__main__":
    main()
