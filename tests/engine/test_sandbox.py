"""The child's guards, each against a child program that misbehaves in one way."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from engine import sandbox, spares
from engine.decode_child import IMPORTS_FAILED
from engine.sandbox import Limits, Refused, decode
from schemas.errors import InternalError
from tests.zoo import photo, png, save, scan_bomb

RULES = {"max_pixels": 2**24, "max_side": 8192, "min_side": 16}
LIMITS = Limits(wall_s=30.0)  # so many because the machine may be busy; whoever tests the wall clock says how many


def decode_png(data: bytes = b"x", limits: Limits = LIMITS, **rules: int) -> sandbox.Raster:
    return decode(data, "PNG", RULES | rules, limits)


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Put another program in the child's place."""

    def install(program: str) -> None:
        script = tmp_path / "child.py"
        script.write_text(textwrap.dedent(program))
        monkeypatch.setattr(spares, "CHILD", script)

    return install


REAL_CHILD = spares.CHILD
PROBE = """
    import importlib.util, json, mmap, os, resource, socket, sys
    spec = importlib.util.spec_from_file_location("decode_child", {child!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def attempt(action):
        try:
            action()
        except OSError as error:
            return error.strerror
        return "done"

    def decode_picture(data, form, rules):
        found = json.dumps({{
            "environment": dict(os.environ),
            "open": attempt(lambda: open("/etc/passwd")),
            "create": attempt(lambda: os.memfd_create("x")),
            "socket": attempt(socket.socket),
            "pipe": attempt(os.pipe),
            "memory": attempt(lambda: mmap.mmap(-1, 2**30)),
            "descriptors": [fd for fd in range(200) if attempt(lambda: os.fstat(fd)) == "done"],
            "modules": sorted(m for m in ("torch", "numpy", "engine", "site") if m in sys.modules),
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "data": data.decode(),
        }}).encode()
        return module.Decoded([found.ljust(3 * 999)], 1, 1, 999, None)

    module.decode_picture = decode_picture
    {without}
    module.main(int(sys.argv[1]), sys.argv[2:])
"""


def test_child_has_no_secret_no_file_no_socket_and_little_memory(child, monkeypatch):
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "canary")
    spare = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(spare, True)
    child(PROBE.format(child=str(REAL_CHILD), without=""))
    found = json.loads(decode_png(b"hello").pixels)
    os.close(spare)
    assert set(found["environment"]) <= {"LC_CTYPE"}  # which CPython sets itself in the C locale
    assert [found[name] for name in ("open", "create", "socket", "pipe")] == ["Too many open files"] * 4
    assert found["memory"] == "Cannot allocate memory"
    assert found["descriptors"] == [0, 1, 2]
    assert found["modules"] == []
    assert found["core"] == [0, 0]
    assert found["data"] == "hello"


def test_child_could_do_all_that_without_its_limits(child):
    child(PROBE.format(child=str(REAL_CHILD), without="resource.setrlimit = lambda *_: None"))
    found = json.loads(decode_png(b"hello").pixels)
    assert [found[name] for name in ("open", "create", "socket", "pipe", "memory")] == ["done"] * 5


def answer(pixels: str = "1" * 12, **fields: object) -> str:
    """A program that answers this head and these pixels."""
    head = {"frames": 1, "height": 2, "width": 2, "fps": None} | fields
    return f"print({json.dumps(head)!r}, {pixels!r}, sep='\\n', end='')"


DEATHS = {
    "exits without a word": "",
    "exits with a failure": "raise SystemExit(1)",
    "raises": "raise RuntimeError('boom')",
    "is killed": "import os; os.kill(os.getpid(), 9)",
    "aborts": "import os; os.abort()",
    "crashes": "import os; os.kill(os.getpid(), 11)",
    "answers half a head": "print('{\"frames\": 1,', end='')",
    "answers no JSON": "print('hello')",
    "answers a list": "print('[1]')",
    "answers a number": "print('1')",
    "answers null": "print('null')",
    "answers deep JSON": "print('[' * 250)",
    "answers too few pixels": answer(pixels="1" * 11),
    "answers too many pixels": answer(pixels="1" * 13),
    "answers more frames than one": answer(pixels="1" * 24, frames=2),
    "answers negative sides": answer(height=-2, width=-2),
    "answers sides that are no integers": answer(height=2.0),
    "answers true": answer(frames=True),
    "answers fps that is no number": answer(fps=float("nan")),
    "answers fps of zero": answer(fps=0.0),
    "answers a further field": answer(x=1),
    "refuses for a reason of its own": 'print(\'{"refused": "<b>your secret</b>"}\')',
    "refuses for a list": "print('{\"refused\": [1]}')",
    "talks on stderr and fails": "import sys; sys.stderr.write('x' * 10**6); raise SystemExit(1)",
}


@pytest.mark.parametrize("how", DEATHS)
def test_decode_refuses_as_damaged_when_the_child(how, child):
    child(DEATHS[how])
    with pytest.raises(Refused) as caught:
        decode_png()
    assert caught.value.reason == "damaged"


def test_decode_believes_a_sound_answer(child):
    child(answer("123456789012", frames=2, height=1, fps=16.0))
    assert decode_png(last_frames=2) == sandbox.Raster(2, 1, 2, 16.0, b"123456789012")


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(60)",
        "while True: pass",
        "import os, time; os.close(2); time.sleep(60)",
        "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)",
        "import sys\nwhile True: sys.stderr.write('x' * 9999)",
    ],
)
def test_decode_ends_a_child_at_the_wall_clock(program, child):
    child(program)
    started = time.monotonic()
    with pytest.raises(Refused) as caught:
        decode_png(limits=Limits(wall_s=0.3))
    assert caught.value.reason == "slow"
    assert time.monotonic() - started < 10  # these children would live for a minute, or for ever


def test_decode_reports_a_decoder_that_cannot_start(child, caplog):
    child(f"import sys; sys.stderr.write('no module named PIL'); raise SystemExit({IMPORTS_FAILED})")
    with pytest.raises(InternalError, match="decoder did not start"):
        decode_png()
    assert "no module named PIL" in caplog.text


def test_child_says_so_when_its_packages_are_missing(monkeypatch):
    monkeypatch.setattr(spares, "_package_folders", list)
    with pytest.raises(InternalError, match="decoder did not start"):
        decode_png()


@pytest.mark.parametrize(("limit", "left"), [(resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_FSIZE, 4)])
def test_decode_says_so_when_the_worker_has_nothing_left_to_start_it_with(limit, left, caplog):
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (left, hard))
    try:
        with pytest.raises(InternalError, match="decoder did not start") as caught:
            decode_png(b"12345")
    finally:
        resource.setrlimit(limit, (soft, hard))
    assert isinstance(caught.value.__cause__, OSError)
    assert "the decoder did not start: [Errno" in caplog.text


def test_decode_leaves_no_zombie_no_descriptor_and_no_thread_after_100_deaths(child):
    child("import os, sys; os.kill(os.getpid(), 9) if sys.stdin.read() == 'kill' else os._exit(1)")
    with pytest.raises(Refused):
        decode_png()
    before = descriptors(), threading.active_count(), children()
    for round_ in range(100):
        with pytest.raises(Refused):
            decode_png(b"kill" if round_ % 2 else b"exit")
    assert descriptors() <= before[0]  # not equal: what earlier tests left may go meanwhile
    assert threading.active_count() <= before[1]
    assert children() <= before[2]  # a zombie is still a child


def test_decode_works_from_many_threads_at_once():
    data, expected = save(photo(), "PNG"), photo().tobytes()
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(decode_png(data).pixels)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


def test_child_is_ended_by_the_limit_on_processor_time():
    with pytest.raises(Refused) as caught:
        decode(scan_bomb(5000), "JPEG", RULES, Limits(wall_s=600.0, cpu_s=1))
    assert caught.value.reason == "slow"


def test_child_is_ended_by_the_limit_on_memory():
    data = png(4096, 4096, depth=1, colour=0)
    assert decode_png(data).height == 4096
    with pytest.raises(Refused) as caught:
        decode_png(data, Limits(memory_bytes=2**26))
    assert caught.value.reason == "memory"


def test_child_cannot_write_more_than_its_result_may_hold():
    with pytest.raises(Refused) as caught:
        decode_png(png(64, 64), Limits(result_bytes=64 * 64 * 3))
    assert caught.value.reason == "damaged"


def test_child_ends_by_itself_when_its_parent_is_killed():
    program = f"""
import sys, threading, time
sys.path.insert(0, {str(Path.cwd())!r})
from engine import sandbox
from tests.zoo import scan_bomb
print("ready", flush=True)
sandbox.decode(scan_bomb(50_000), "JPEG", {RULES!r}, sandbox.Limits(wall_s=0.5, cpu_s=600))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    orphan = wait_for_child(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    ends = time.monotonic() + 30  # its alarm is set to 1.5 s; the bomb would keep it for more than a minute
    while is_running(orphan):
        assert time.monotonic() < ends, "the orphan lives on"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Not gone, and not waiting for a parent who takes its status."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def children() -> set[int]:
    """Processes that this thread has started and not yet waited for."""
    return {int(pid) for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()}


def wait_for_child(pid: int) -> int:
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise AssertionError("no child appeared")
