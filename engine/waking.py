"""What a card is asked before its first model is built, beside the imports that such a model waits for.

Before torch is there: the driver's own start and a context, 0.3 s of a first job on a card's host. With torch: what the
first convolution and the first product load, 0.4 s; Triton, which reads all of itself to name its kernels, 0.4 s; and
the self-tests that need no model's library. Most of this leaves the interpreter to others.
"""

import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from engine.card import Levers
from engine.settings import IMAGE_KERNELS, keep_kernels

DRIVER = "libcuda.so.1"
_TRITON = threading.Lock()


def begin_driver() -> None:
    """Have the driver begin, and make the context that torch will use, in a thread; not where torch is there."""
    if "torch" not in sys.modules:
        threading.Thread(target=_start_driver, name="driver", daemon=True).start()


def begin(precision: str | None, device: str, levers: Levers) -> None:
    """Begin the rest, in a thread. What goes wrong is met again by whoever needs it, and said there."""
    work: list[Callable[[], object]] = [lambda: prove_first(precision, device, levers), lambda: _use(device)]
    threading.Thread(target=_do, args=(work,), name="waking", daemon=True).start()


def prove_first(precision: str | None, device: str, levers: Levers) -> bool:
    """Begin the self-tests that a load at this precision will ask for and that need no model's library.

    Returns whether Triton's kernels can be tested here at all.
    """
    import torch

    from engine import linear8_check, widening
    from engine.linear8 import KINDS

    kind = KINDS.get(precision or "")
    if kind is None or kind.capability is None or torch.cuda.get_device_capability(device) < kind.capability:
        return False
    find_kernels(levers)
    linear8_check.problem.begin(device, precision)
    try:
        import_triton()
    except Exception:  # noqa: BLE001 whatever it is, who asks for a kernel finds it out, and says so
        return False
    number = torch.device(device).index
    card = torch.device("cuda", torch.cuda.current_device() if number is None else number)  # as tensors have it
    widening.problem.begin(card, kind.dtype)
    return True


def find_kernels(levers: Levers) -> None:
    """Before anything compiles: what is kept, and what came with the image, is found, and what is compiled is kept."""
    from engine.image_kernels import lend

    if levers.cache_dir is not None and keep_kernels(levers.cache_dir):
        lend(IMAGE_KERNELS, levers.cache_dir)


def import_triton() -> None:
    """Once, before several threads would do it: the kernels, and what Triton asks of a card the first time."""
    with _TRITON:
        from triton.runtime import driver

        from engine import rounding_triton, text_attention_triton, widening_triton  # noqa: F401

        driver.active.get_current_target()


def _start_driver() -> None:
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return  # no card here
    if driver.cuInit(0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)


def _use(device: str) -> None:
    """A convolution as the VAE has them, and a product as a text encoder has them."""
    import torch

    with torch.inference_mode():
        torch.nn.functional.conv3d(
            torch.ones(1, 16, 3, 8, 8, device=device), torch.ones(16, 16, 3, 3, 3, device=device)
        )
        some = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
        _ = some @ some


def _do(work: list[Callable[[], object]]) -> None:
    for each in work:
        with suppress(Exception):
            each()
