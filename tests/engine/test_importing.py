"""No collection among libraries that stay, and garbage that comes later is found as ever."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from engine.importing import importing
from tests.conftest import ROOT

FIRST_BACKEND = """
import gc
from engine.backends import import_backend
from engine.profiles import PROFILES

whole = []
gc.callbacks.append(lambda phase, info: whole.append(phase) if info["generation"] == 2 else None)
import_backend(PROFILES["wan22_i2v_svi"])
print(len(whole), gc.get_freeze_count() > 100_000, gc.isenabled())
frozen = gc.get_freeze_count()
import_backend(PROFILES["sdxl"])
print(gc.get_freeze_count() <= frozen)
"""


class Node:
    me: "Node"


def test_first_backend_is_imported_without_a_collection_and_the_next_keeps_nothing_more() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_BACKEND], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "True", "True"]


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)


@pytest.mark.usefixtures("first")
def test_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


@pytest.mark.usefixtures("first")
def test_block_inside_a_block_and_a_collector_that_is_off_are_left_alone() -> None:
    with importing():
        with importing():
            pass
        assert not gc.isenabled()
    gc.unfreeze()


def test_garbage_is_found_once_the_libraries_are_there() -> None:
    import diffusers  # noqa: F401

    with importing():
        assert gc.isenabled()
    node = Node()
    node.me = node
    seen = weakref.ref(node)
    del node
    gc.collect()
    assert seen() is None


def test_one_thread_imports_at_a_time() -> None:
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with importing():
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with importing():
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
