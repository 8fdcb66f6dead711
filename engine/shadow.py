"""A module's shadow: the same code and the same tensors' shapes and types, without their memory.

Under a FakeTensorMode such tensors answer what a computation would give, and on which device, without computing it.
The compiler needs no more than that, and neither does the question what a model hands to its blocks.
"""

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NOBODY: Mapping[str, nn.Module] = MappingProxyType({})


class Spec(NamedTuple):
    """What a compiler knows of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def fake(self) -> Tensor:
        """Such a tensor; without memory under a FakeTensorMode."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


Specs = Spec | tuple["Specs", ...]
"""A tensor, or tensors in tuples."""


def describe(value: Any) -> Specs:
    """The specs of a tensor, or of tensors in tuples.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Tensor):
        return Spec.of(value)
    if isinstance(value, tuple):
        return tuple(describe(item) for item in value)
    raise TypeError(f"a {type(value).__name__} is no tensor")


def fakes(specs: Specs) -> Any:
    """Tensors as `specs` says; without memory under a FakeTensorMode."""
    return specs.fake() if isinstance(specs, Spec) else tuple(fakes(item) for item in specs)


def shadow(module: nn.Module, device: torch.device, instead: Mapping[str, nn.Module] = NOBODY) -> Any:
    """The module again on `device`, with tensors that take no memory; to be called under a FakeTensorMode.

    Hooks and a `forward` of its own stay behind, so that calling a shadow disturbs nobody. `instead`: children that
    take the place of the module's own, by name.
    """
    return _shadow(module, device, instead, {})


def _shadow(
    module: nn.Module, device: torch.device, instead: Mapping[str, nn.Module], made: dict[int, Tensor]
) -> nn.Module:
    twin: nn.Module = object.__new__(type(module))
    for name, value in vars(module).items():
        if name != "forward":
            twin.__dict__[name] = OrderedDict() if "_hooks" in name and isinstance(value, dict) else value
    twin.__dict__["_parameters"] = {name: _fake(x, device, made) for name, x in module._parameters.items()}
    twin.__dict__["_buffers"] = {name: _fake(x, device, made) for name, x in module._buffers.items()}
    twin.__dict__["_modules"] = {
        name: instead[name] if name in instead else child and _shadow(child, device, NOBODY, made)
        for name, child in module._modules.items()
    }
    return twin


def _fake(tensor: Tensor | None, device: torch.device, made: dict[int, Tensor]) -> Tensor | None:
    """One fake a tensor: what is one object in the module is one in its shadow."""
    if tensor is None:
        return None
    if id(tensor) not in made:
        fake = Spec.of(tensor)._replace(device=device).fake()
        is_parameter = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    return made[id(tensor)]
