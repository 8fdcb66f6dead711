"""Functions that torch's compiler calls and does not look into: the operators `svi_worker::...`.

`torch.library.custom_op` makes such too, but the first call of one imports the compiler, 0.8 s of a first job on a
card's host, which needs no compiler before its film is made; and each call passes through the interpreter seven times
on behalf of gradients, which nobody asks for here.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

NAMESPACE = "svi_worker"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # what it declares lives as long as this


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Make a function the operator `name`. A decorator; the types of arguments and result must be written out.

    The function changes none of its arguments and returns new tensors, on any device. `fake`: takes the same arguments
    and returns empty tensors of the results' shapes and types.
    """

    def declare(function: Function) -> Function:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        made = getattr(getattr(torch.ops, NAMESPACE), name).default
        made.__doc__ = function.__doc__
        return cast(Function, made)

    return declare
