"""A whole job in a network of its own, where nothing answers and the kernel counts what is tried."""

import json
import os
import resource
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.settings import ROOT
from tests.test_image_files import environment
from tests.test_worker_end_to_end import IMAGE, SVI, VIDEO

# Both default routes lead to the loopback device, so that a connection is attempted, and counted, before it is refused.
NETWORK = """
counted=$1; shift
ip link set lo up && ip route add default dev lo && ip -6 route add default dev lo || exit 125
"$@"; status=$?
cat /proc/net/snmp > "$counted"; cat /proc/net/snmp6 >> "$counted"
exit $status
"""


def attempts(
    folder: Path, command: list[str], variables: dict[str, str]
) -> tuple[int, subprocess.CompletedProcess[str]]:
    """Run `command` without a network. Returns how many connections and datagrams it and its children tried."""
    probe = subprocess.run(["env", "unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this machine gives no network of one's own: {probe.stderr.strip()}")
    counted = folder / "counted"
    words = ["unshare", "--net", "bash", "-c", NETWORK, "network", str(counted), *command]
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)
    assert counted.exists(), done.stderr
    return _count(counted.read_text()), done


def _count(snmp: str) -> int:
    rows = [line.split() for line in snmp.splitlines()]
    for head, values in pairwise(rows):
        if head[0] == "Tcp:" and head[1] == "RtoAlgorithm":
            connections = int(values[head.index("ActiveOpens")])
        if head[0] == "Udp:" and head[1] == "InDatagrams":
            datagrams = int(values[head.index("OutDatagrams")])
    (six,) = [int(row[1]) for row in rows if row[0] == "Udp6OutDatagrams"]
    return connections + datagrams + six


def of_the_image(folder: Path, weights: Path) -> dict[str, str]:
    """The environment that the image sets, with folders that are here."""
    here = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1", "WORKER_WEIGHTS_DIR": str(weights)}
    here |= {"WORKER_OUTPUT_DIR": str(folder / "output"), "WORKER_CACHE_DIR": str(folder / "cache")}
    return environment("base") | environment("worker") | here


def job(folder: Path, payload: dict[str, Any], variables: dict[str, str]) -> tuple[int, int, dict[str, Any]]:
    """Attempts, exit status and the response of one job."""
    (folder / "job.json").write_text(json.dumps({"input": payload}))
    command = [sys.executable, str(ROOT / "handler.py"), "--test_input", str(folder / "job.json")]
    tried, done = attempts(folder, command, variables)
    assert done.stdout, done.stderr
    return tried, done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_video_is_made_without_one_attempt_to_connect(twins: Path, tmp_path: Path) -> None:
    tried, status, response = job(tmp_path, VIDEO, of_the_image(tmp_path, twins))
    assert (tried, status) == (0, 0), response
    assert Path(response["video_url"]).stat().st_size == response["size_bytes"]


@pytest.mark.soak
@pytest.mark.parametrize("payload", [IMAGE, VIDEO, SVI], ids=["image", "video", "svi_endframe"])
def test_no_mode_connects_even_without_the_libraries_offline_switches(
    payload: dict[str, Any], twins: Path, tmp_path: Path
) -> None:
    variables = of_the_image(tmp_path, twins)
    bare = {name: value for name, value in variables.items() if "OFFLINE" not in name and "TELEMETRY" not in name}
    assert len(variables) - len(bare) == 3
    tried, status, response = job(tmp_path, payload, bare)
    assert (tried, status) == (0, 0), response


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.socket().connect_ex(('192.0.2.1', 80))",
        "socket.socket(socket.AF_INET6).connect_ex(('2001:db8::1', 80))",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', ('2001:db8::1', 53))",
        "subprocess.run([sys.executable, '-c', 'import socket; socket.create_connection((\"192.0.2.1\", 443), 0.1)'])",
    ],
)
def test_one_attempt_would_be_counted(attempt: str, tmp_path: Path) -> None:
    code = f"import socket, subprocess, sys; socket.setdefaulttimeout(0.1); {attempt}"
    tried, _ = attempts(tmp_path, [sys.executable, "-c", code], dict(os.environ))
    assert tried == 1


def test_missing_file_is_named_as_in_the_manifest_before_anything_is_loaded(twins: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copytree(twins, tmp_path / "weights"))
    lines = json.loads((weights / "wan22_i2v_svi" / "manifest.json").read_bytes())["files"]
    name = next(line["path"] for line in lines if line["path"].startswith("shared/wan_vae/"))
    (weights / name).unlink()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    tried, status, response = job(tmp_path, SVI, of_the_image(tmp_path, weights))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (tried, status, response["code"]) == (0, 1, "weights_corrupt")
    assert name in response["error"]
    # Of the processor, the interpreter's start included: a crowded machine makes the wall clock prove nothing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
