"""The measure of the long runs: it sees what stays, and not what passes."""

import os
import threading
from pathlib import Path

from tests.soak.footprint import Footprint, footprint, of_a_round

STILL = Footprint(resident=100, descriptors=5, threads=2, children=1, files=0)


def test_of_a_round_leaves_out_what_passes_and_keeps_what_stays() -> None:
    busy = Footprint(resident=180, descriptors=9, threads=4, children=2, files=3)
    assert of_a_round([STILL, busy, busy]) == STILL
    assert of_a_round([busy, busy]) == busy


def test_footprint_sees_a_thread_a_descriptor_and_a_file_more(tmp_path: Path) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    before = footprint(os.getpid(), tmp_path)
    thread.start()
    with (tmp_path / "file").open("w"):
        after = footprint(os.getpid(), tmp_path)
    over.set()
    thread.join()
    more = (after.threads - before.threads, after.descriptors - before.descriptors, after.files - before.files)
    assert more == (1, 1, 1)
