import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from compression.storage.factor_cache import Bundle, FactorCache, cache_key

KEY = cache_key(what="a test")
OTHER = cache_key(what="another test")
COUNT = 4


class Users:
    """Several users of one cache that ask for the same key at the same time, as processes of a machine do."""

    def __init__(self, root):
        self.said, self.built = [], []
        self.caches = [FactorCache(root, self.said.append) for _ in range(COUNT)]

    def build(self):
        self.built.append(1)
        threading.Event().wait(0.1)  # the others arrive meanwhile
        return Bundle({"values": torch.arange(1000.0)})

    def ask(self, act):
        start = threading.Barrier(COUNT)

        def one(cache):
            start.wait()
            return act(cache)

        with ThreadPoolExecutor(COUNT) as pool:
            return list(pool.map(one, self.caches))


@pytest.fixture
def users(tmp_path):
    return Users(tmp_path)


def test_one_makes_what_several_need_and_the_others_say_that_they_wait(users, tmp_path):
    bundles = users.ask(lambda cache: cache.get_or_build(KEY, users.build))
    assert all(torch.equal(bundle.tensors["values"], torch.arange(1000.0)) for bundle in bundles)
    assert len(users.built) == 1
    assert users.said == ["another process is making statistics or factors that this one needs; waiting for them"] * 3
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


def test_a_user_says_only_once_that_it_waits(users):
    for key in (KEY, OTHER):
        users.ask(lambda cache, key=key: cache.get_or_build(key, users.build))
    assert len(users.built) == 2
    assert len(users.said) <= COUNT


@pytest.mark.parametrize("act", ["get_or_build", "load"])
def test_one_mends_what_several_find_damaged(act, users, tmp_path):
    FactorCache(tmp_path).store(KEY, Bundle({"values": torch.arange(1000.0)}))
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    bundles = users.ask(
        lambda cache: cache.get_or_build(KEY, users.build) if act == "get_or_build" else cache.load(KEY)
    )
    assert sum("is damaged; set aside" in text for text in users.said) == 1
    assert len(list(tmp_path.rglob("*.damaged"))) == 1
    if act == "load":
        assert bundles == [None] * COUNT
    else:
        assert all(torch.equal(bundle.tensors["values"], torch.arange(1000.0)) for bundle in bundles)
        assert len(users.built) == 1


def test_a_maker_that_fails_leaves_it_to_the_next(users):
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        users.caches[0].get_or_build(KEY, fail)
    assert users.caches[1].get_or_build(KEY, users.build).tensors.keys() == {"values"}


def test_a_value_may_be_made_from_another_of_the_same_cache(users):
    cache = users.caches[0]
    bundle = cache.get_or_build(KEY, lambda: cache.get_or_build(OTHER, users.build))
    assert bundle.tensors.keys() == {"values"}
