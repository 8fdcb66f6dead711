"""A worker on the twins whose card fails in a way that is chosen: the real path of a job, with one real fault in it.

    python -m bench.fault_worker [assert | none] [handler.py's arguments]

`assert`: the second forward of a transformer reads outside a table, in a kernel on the card. Takes jobs from RunPod
where its variables are set, else the one of --test_input. Leaves with 1 after the fault, as the worker does.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from apps.runpod_worker import serve
from engine.progress import Progress
from engine.settings import Settings
from handler import Worker, run
from model_handler import ModelHandler

DENOISERS = {"WanTransformer3DModel", "UNet2DConditionModel"}


def before_each_forward(fault: Callable[[], None]) -> Any:
    """Call `fault` before each forward of a transformer or UNet, in this process, until the result's block is left."""

    def hook(module: torch.nn.Module, *_: object) -> None:
        if type(module).__name__ in DENOISERS:
            fault()

    return torch.nn.modules.module.register_module_forward_pre_hook(hook)


class OutsideTheTable:
    """A gather with an index that is not there: the kernel asserts, and the context is lost."""

    def __init__(self, at_forward: int) -> None:
        self._left = at_forward

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            table = torch.arange(4, device="cuda")
            print("fault: reading outside a table on the card", file=sys.stderr, flush=True)
            table[torch.full((1,), 9, device="cuda")] + 1


def run_job(worker: Worker, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    return run(job["input"], job_id=job["id"], worker=worker, progress=progress)


def main() -> int:
    kind, *argv = sys.argv[1:]
    settings = Settings.from_env()
    if kind == "assert":
        before_each_forward(OutsideTheTable(at_forward=2))
    return serve(partial(run_job, Worker(settings, ModelHandler(settings))), settings, argv)


if __name__ == "__main__":
    sys.exit(main())
