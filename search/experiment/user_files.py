"""Record which files of the user a run depends on, and refuse them if they have changed since."""

from __future__ import annotations

from compression.refusal import Refusal
from search.config import Config
from search.data.own_text import own_text_digest
from search.model.remote_code import code_digests

__all__ = ["check_files", "with_digests"]


def with_digests(config: Config) -> Config:
    """The configuration with the digests of the user's files; unchanged if it asks for none.

    Raises:
        ValueError: as for `check_files`.
        DataUnavailable: as for `check_files`.
    """
    if config.calibration is None and not config.trust_remote_code:
        return config
    return Config.of({**config.model_dump(), "digests": check_files(config)})


def check_files(config: Config) -> dict[str, str]:
    """The sha256 of the user's files by name: "calibration", and "code/PATH" for every code file of the model.

    Raises:
        ValueError: a file differs from the one that the configuration recorded, or cannot be read.
        DataUnavailable: a model or data set of the hub cannot be had.
    """
    found: dict[str, str] = {}
    if config.calibration is not None:
        found["calibration"] = own_text_digest(config.calibration)
    if config.trust_remote_code:
        found |= {f"code/{path}": digest for path, digest in code_digests(config.model).items()}
    if config.digests is None:
        return found
    for name in sorted({*found, *config.digests}):
        before, after = config.digests.get(name, "absent"), found.get(name, "absent")
        if before != after:
            what = config.calibration if name == "calibration" else f"{name.removeprefix('code/')} of {config.model}"
            raise Refusal(
                f"{what} is not what the run used: its sha256 was {before:.16}, is {after:.16}; restore the file, or "
                "start a new run"
            )
    return found
