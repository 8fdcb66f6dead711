"""An operator of ours: torch's compiler calls it as it is, and knows of its result what the fake says."""

import pytest
import torch
from torch import Tensor

from engine.operators import operator


@operator("for_a_test", lambda x, *_: x.new_empty((x.shape[0], 2)))
def split_sum(x: Tensor, factor: float, more: Tensor | None) -> Tensor:
    """What a compiler could not look into: it goes by the numbers."""
    signs = [float(value) > 0 for value in x[0]]
    sums = x.sum(1, keepdim=True) * factor + (0 if more is None else more)
    return torch.cat([sums, -sums], 1) if signs[0] else torch.cat([-sums, sums], 1)


def test_compiled_function_calls_it_and_gets_what_it_gives() -> None:
    def twice(x: Tensor) -> Tensor:
        return split_sum(x, 0.5, None) + split_sum(-x, 2.0, x[:, :1])

    x = torch.randn(3, 4)
    assert torch.equal(torch.compile(twice, backend="aot_eager", fullgraph=True)(x), twice(x))


def test_torch_finds_it_in_order() -> None:
    torch.library.opcheck(split_sum, (torch.randn(3, 4), 0.5, None))
    assert split_sum.__doc__ is not None and split_sum.__doc__.startswith("What a compiler")


def test_function_that_changes_what_it_is_given_is_found_out() -> None:
    @operator("changes_its_argument", lambda x: x.new_empty(x.shape))
    def double(x: Tensor) -> Tensor:
        return x.mul_(2).clone()

    with pytest.raises(Exception, match="mutated"):
        torch.library.opcheck(double, (torch.ones(2),))


def test_name_is_taken_once() -> None:
    def other(x: Tensor) -> Tensor:
        return x.clone()

    with pytest.raises(RuntimeError, match="for_a_test"):
        operator("for_a_test", lambda x: x)(other)
