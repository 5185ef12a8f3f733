"""Runs the whole job from Python: profile, search, heal, export.

python -m examples.python_api        # the default model, small settings
"""

from __future__ import annotations

from pathlib import Path

from search import api


def main(model: str = "default", out: Path = Path("results/from-python"), minutes: float = 2.0) -> Path:
    """Returns the folder of the healed model, which transformers can load after `import search.hf`."""
    given = {"model": model, "quick": True}
    sweep = api.profile([10, 50], [], tokens=256, out=str(out / "profile"), **given)
    print(sweep.sensitivity().groupby("family")["kl"].mean())
    found = api.run(
        agent="reinforce",
        target_kept=0.7,
        heal_minutes=0.0,
        benchmark_items=0,
        export="none",
        out=str(out / "run"),
        **given,
    )
    healed = api.heal(found.folder, api.HealingOptions(minutes=minutes))
    print(*(f"{row['schedule']}: KL {row['kl']}" for row in healed.rows), sep="\n")
    return api.export(found.folder, out / "model", healed=healed.folder)


if __name__ == "__main__":
    main()
