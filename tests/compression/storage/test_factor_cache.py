"""A cached value is used only under the key, and for the purpose, that its file says it was stored for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compression.storage.factor_cache import Bundle, FactorCache, cache_key

ONE, TWO = cache_key(value=1), cache_key(value=2)


def bundle(value: float) -> Bundle:
    return Bundle({"x": torch.full((3,), value)}, {"note": "kept"})


def path_of(root: Path, key: str) -> Path:
    [path] = root.rglob(f"{key}.*.safetensors")
    return path


def swapped(root: Path) -> None:
    """Give two files each other's keys and keep the checksums, which stay right."""
    paths = {key: path_of(root, key) for key in (ONE, TWO)}
    targets = {
        key: paths[other].with_name(paths[key].name.replace(key, other)) for key, other in ((ONE, TWO), (TWO, ONE))
    }
    for key, target in targets.items():
        paths[key].rename(target)


def test_files_with_swapped_names_are_set_aside_and_made_again(tmp_path: Path) -> None:
    said: list[str] = []
    cache = FactorCache(tmp_path, said.append)
    for key, value in ((ONE, 1.0), (TWO, 2.0)):
        cache.store(key, bundle(value))
    swapped(tmp_path)
    for key, value in ((ONE, 1.0), (TWO, 2.0)):
        found = cache.get_or_build(key, lambda value=value: bundle(value))  # type: ignore[misc]
        assert found.tensors["x"].tolist() == [value] * 3
    assert ["damaged" in line for line in said] == [True, True]
    assert len(list(tmp_path.rglob("*.damaged"))) == 2


def test_what_the_cache_adds_to_a_file_is_not_part_of_the_value(tmp_path: Path) -> None:
    cache = FactorCache(tmp_path, made_for={"architecture": "a"})
    cache.store(ONE, bundle(1.0))
    found = cache.load(ONE)
    assert found is not None
    assert found.metadata == {"note": "kept"}


def test_a_file_of_an_earlier_version_holds_no_key_and_is_made_again_in_silence(tmp_path: Path) -> None:
    cache = FactorCache(tmp_path, pytest.fail, {"architecture": "a"})
    cache.store(ONE, bundle(1.0))
    path = path_of(tmp_path, ONE)
    path.unlink()
    save_file(dict(bundle(1.0).tensors), path.with_suffix(".partial"), {"note": "kept"})
    digest = hashlib.sha256(path.with_suffix(".partial").read_bytes()).hexdigest()[:32]
    earlier = path.with_name(f"{ONE}.{digest}.safetensors")
    path.with_suffix(".partial").rename(earlier)
    assert not cache.has(ONE)
    assert cache.load(ONE) is None
    assert cache.get_or_build(ONE, lambda: bundle(2.0)).tensors["x"].tolist() == [2.0] * 3
    assert not earlier.exists()
    assert cache.has(ONE)


def test_values_made_for_something_else_are_passed_over_and_stay(tmp_path: Path) -> None:
    caches = {name: FactorCache(tmp_path, pytest.fail, {"architecture": name}) for name in "ab"}
    for number, (name, cache) in enumerate(caches.items()):
        assert not cache.has(ONE)
        assert cache.get_or_build(ONE, lambda number=number: bundle(number)).tensors["x"][0] == number  # type: ignore[misc]
        assert cache.has(ONE), name
    for number, cache in enumerate(caches.values()):
        found = cache.load(ONE)
        assert found is not None
        assert found.tensors["x"][0] == number


def test_a_replaced_bundle_leaves_one_file_and_a_dropped_one_none(tmp_path: Path) -> None:
    cache = FactorCache(tmp_path)
    for value in (1.0, 2.0, 2.0):
        cache.replace(ONE, bundle(value))
        assert path_of(tmp_path, ONE).exists()
    found = cache.load(ONE)
    assert found is not None
    assert found.tensors["x"].tolist() == [2.0] * 3
    assert cache.metadata(ONE)["note"] == "kept"
    cache.drop(ONE)
    assert found.tensors["x"].tolist() == [2.0] * 3  # still mapped
    assert (cache.load(ONE), cache.metadata(ONE), list(tmp_path.rglob("*.safetensors"))) == (None, {}, [])
