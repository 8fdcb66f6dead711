"""The worker as the image runs it, at its strictest: a nobody without capabilities on a read-only file system.

What it may write to is one tmpfs with five folders: HOME, TMPDIR, WORKER_OUTPUT_DIR, WORKER_OUTBOX_DIR and
WORKER_CACHE_DIR. On the platform the outbox belongs on a volume, so that it survives the worker.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.settings import ROOT
from tests.servers.runpod_server import RunPodServer
from tests.test_image_files import environment
from tests.test_worker_end_to_end import FIRST_JOB_S, IMAGE, SVI, VIDEO, frames_inline

ROOM = "/srv"  # any folder that exists everywhere and holds nothing: the tmpfs hides it, in the worker's own view only
UID = "10001"

# $1: the room. $2: how many folders follow that must be seen; after them those that hide them from all but their
# owner, ended by --. Such a folder is hidden itself, and what must be seen in it is put back.
CONFINED = f"""
set -eu
room=$1 seen=("${{@:3:$2}}"); shift $(($2 + 2))
mount --make-rprivate /
mount -t tmpfs -o size=1536m,mode=755 tmpfs "$room"
for i in "${{!seen[@]}}"; do mkdir "$room/$i"; mount --bind "${{seen[i]}}" "$room/$i"; done
while [ "$1" != -- ]; do mount -t tmpfs -o mode=755 tmpfs "$1"; shift; done
shift
for i in "${{!seen[@]}}"; do
  if [ ! "${{seen[i]}}" -ef "$room/$i" ]; then mkdir -p "${{seen[i]}}"; mount --bind "$room/$i" "${{seen[i]}}"; fi
  umount "$room/$i"; rmdir "$room/$i"
done
mkdir "$room/home" "$room/tmp" "$room/output" "$room/outbox" "$room/cache"
chown {UID}:{UID} "$room"/*
findmnt --raw --noheadings --output TARGET | tac | while read -r at; do
  case "$at" in /proc*|/sys*|/dev*) ;; "$room") ;; *) mount -o remount,bind,ro "$at" ;; esac
done
exec setpriv --reuid {UID} --regid {UID} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


def confined(*command: str) -> list[str]:
    """The words that run Python with `command` in such a place."""
    probe = subprocess.run(
        ["env", "unshare", "--mount", "setpriv", f"--reuid={UID}", "true"], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"this machine gives no file system view of one's own: {probe.stderr.strip()}")
    seen = sorted(Path(folder).resolve() for folder in (sys.base_prefix, sys.prefix, ROOT))  # outer before inner
    closed = {hiding for folder in seen if (hiding := outermost_closed(folder)) is not None}
    words = [ROOM, str(len(seen)), *map(str, seen), *map(str, closed), "--"]
    return ["unshare", "--mount", "bash", "-c", CONFINED, "confined", *words, sys.executable, *command]


def outermost_closed(folder: Path) -> Path | None:
    """The folder above `folder` that shows it to its owner alone; None if anybody can come there."""
    return next((above for above in reversed(folder.parents) if not above.stat().st_mode & 0o001), None)


def of_the_image(weights: Path) -> dict[str, str]:
    """The environment that the image sets, with the folders of the room."""
    here = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "WORKER_WEIGHTS_DIR": str(weights)}
    here |= {"HOME": f"{ROOM}/home", "TMPDIR": f"{ROOM}/tmp", "WORKER_CACHE_DIR": f"{ROOM}/cache"}
    here |= {"WORKER_OUTPUT_DIR": f"{ROOM}/output", "WORKER_OUTBOX_DIR": f"{ROOM}/outbox"}
    return environment("base") | environment("worker") | here


def run(code: str, variables: Mapping[str, str]) -> str:
    words = confined("-c", code)
    done = subprocess.run(words, cwd=ROOT, env=dict(variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_room_is_the_only_place_to_write_to(twins: Path) -> None:
    places = ["/", str(ROOT), str(ROOT / "weights"), "/tmp", "/var/tmp", "/etc", ROOM, *of_the_image(twins).values()]
    folders = [place for place in dict.fromkeys(places) if Path(place).is_dir() or place.startswith(ROOM)]
    code = f"""
import json, os
found = []
for folder in {folders!r}:
    try:
        with open(os.path.join(folder, 'written'), 'w'):
            found.append(folder)
    except OSError:
        pass
status = dict(line.split(':', 1) for line in open('/proc/self/status') if ':' in line)
print(json.dumps([found, os.getuid(), [status[key].strip() for key in ('CapEff', 'CapBnd', 'NoNewPrivs')]]))
"""
    found, uid, powers = json.loads(run(code, of_the_image(twins)))
    assert sorted(found) == [f"{ROOM}/{name}" for name in ("cache", "home", "outbox", "output", "tmp")]
    assert uid == 10001
    assert powers == ["0" * 16, "0" * 16, "1"]


def test_libraries_find_a_name_and_a_cache_for_a_user_without_an_account(twins: Path) -> None:
    code = """
import getpass
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(getpass.getuser(), cache_dir())
"""
    assert run(code, of_the_image(twins)).split() == ["worker", f"{ROOM}/tmp/torchinductor_worker"]


def one_job(payload: dict[str, Any], variables: Mapping[str, str], folder: Path) -> tuple[int, dict[str, Any]]:
    words = confined(str(ROOT / "handler.py"), "--test_input", json.dumps({"input": payload}))
    done = subprocess.run(words, cwd=folder, env=dict(variables), capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_job_is_done_where_nothing_else_can_be_written(twins: Path) -> None:
    status, response = one_job(VIDEO, of_the_image(twins), ROOT)
    assert status == 0, response
    assert response["video_url"].startswith(f"{ROOM}/output/")
    assert response["num_frames"] == 9


@pytest.mark.soak
def test_output_folder_that_cannot_be_written_is_an_answer_and_no_crash(twins: Path) -> None:
    status, response = one_job(VIDEO, of_the_image(twins) | {"WORKER_OUTPUT_DIR": str(ROOT / "output")}, ROOT)
    assert status == 1
    assert response["error"].startswith(f"{response['code']}: ")
    assert "Traceback" not in json.dumps(response)


@pytest.mark.soak
def test_twenty_jobs_come_out_of_the_loop(twins: Path, tmp_path: Path) -> None:
    with RunPodServer() as server:
        cloud = server.environment() | {"RUNPOD_INIT_TIMEOUT": "600", "RUNPOD_SKIP_GPU_CHECK": "true"}
        with (tmp_path / "log").open("wb") as log:
            words = confined(str(ROOT / "handler.py"))
            process = subprocess.Popen(words, cwd=ROOT, env=of_the_image(twins) | cloud, stdout=log, stderr=log)
        try:
            for i in range(20):
                server.queue(f"job-{i}", {"seed": i} | (IMAGE, VIDEO, SVI)[i % 3])
            for i in range(20):
                output = server.result(f"job-{i}", FIRST_JOB_S)["output"]
                if "video_url" in output:
                    assert frames_inline(output["video_url"], tmp_path)[0] == 9
                else:
                    assert output["images"][0].startswith("data:image/png;base64,")
        except BaseException:
            sys.stderr.write((tmp_path / "log").read_text(errors="replace"))
            raise
        finally:
            process.terminate()
            assert process.wait(30) == 0
