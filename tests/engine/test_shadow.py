"""Shadows: everything of a module but its memory, its hooks and its place."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from engine.linear8 import replace_linears
from engine.shadow import Spec, describe, fakes, shadow
from tests.engine.tiny_wan import make_wan

CARD = torch.device("cuda", 0)


def test_shadow_has_the_shapes_types_and_names_on_the_other_device():
    model = make_wan(0, layers=1)
    replace_linears(model, "fp8")
    with FakeTensorMode():
        twin = shadow(model, CARD)
    real, told = model.state_dict(), twin.state_dict()
    assert [(name, x.shape, x.dtype) for name, x in told.items()] == [
        (name, x.shape, x.dtype) for name, x in real.items()
    ]
    assert {x.device for x in [*twin.parameters(), *twin.buffers()]} == {CARD}


def test_shadow_leaves_the_module_alone():
    block = nn.Sequential(nn.Linear(4, 4))
    block[0].register_forward_hook(lambda *_: pytest.fail("a shadow has no hooks"))
    block.forward = lambda _x: pytest.fail("nor a forward of its own")
    weight = block[0].weight
    with FakeTensorMode():
        out = shadow(block, torch.device("cpu"))(torch.empty(2, 4))
    assert out.shape == (2, 4)
    assert block[0].weight is weight
    assert not isinstance(weight, FakeTensor)
    assert len(block[0]._forward_hooks) == 1


def test_tensor_that_is_there_twice_is_one_in_the_shadow():
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pair[1].weight = pair[0].weight
    with FakeTensorMode():
        twin = shadow(pair, CARD)
    assert twin[0].weight is twin[1].weight
    assert twin[0].bias is not twin[1].bias


def test_specs_describe_and_rebuild_nested_tensors():
    x = torch.randn(2, 3).t()
    specs = describe((x, (x, x)))
    one = Spec((3, 2), (1, 3), torch.float32, x.device)
    assert specs == (one, (one, one))
    rebuilt = fakes(specs)
    assert (rebuilt[1][0].shape, rebuilt[1][0].stride()) == ((3, 2), (1, 3))


def test_what_is_no_tensor_has_no_spec():
    with pytest.raises(TypeError, match="a float is no tensor"):
        describe((torch.ones(1), 1.0))
