"""The card's clock, power and temperature while jobs run, as nvidia-smi tells them once a second.

A card that throttles makes any arm slow; without these numbers nobody could tell.
"""

import os
import shutil
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass

INTERVAL_MS = 1000
TOOL = "nvidia-smi"
FIELDS = "clocks.sm,power.draw,temperature.gpu"


@dataclass(frozen=True)
class CardState:
    """Of one span: median clock, mean power, highest temperature."""

    sm_mhz: float
    power_w: float
    temperature_c: float


class Sampler:
    """Reads the tool in a thread from the start to `close`; sees nothing where there is no such tool."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, tuple[float, ...]]] = []
        self._process: subprocess.Popen[str] | None = None
        if shutil.which(TOOL) is None:
            return
        self._process = subprocess.Popen(
            [TOOL, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits", _first_card(), f"--loop-ms={INTERVAL_MS}"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=[self._process], name="smi", daemon=True).start()

    def since(self, started: float) -> CardState | None:
        """Over the time from `started`, on time.monotonic's clock, until now; None if nothing was seen."""
        lines = [values for when, values in list(self._seen) if when >= started]
        if not lines:
            return None
        clocks, powers, temperatures = zip(*lines, strict=True)
        return CardState(statistics.median(clocks), statistics.mean(powers), max(temperatures))

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                clock, power, temperature = (float(word) for word in line.split(","))
            except ValueError:  # "[N/A]", or a message of the driver
                continue
            self._seen.append((time.monotonic(), (clock, power, temperature)))


def _first_card() -> str:
    """The tool counts all cards of the machine, whatever this process may see of them."""
    return f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0]}"


def card_bytes() -> int | None:
    """Memory of the first card that this process sees; None where the tool does not say."""
    if shutil.which(TOOL) is None:
        return None
    command = [TOOL, "--query-gpu=memory.total", "--format=csv,noheader,nounits", _first_card()]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    try:
        return int(said.split()[0]) * 2**20
    except (IndexError, ValueError):
        return None
