"""A model of copied blocks is the model that its own code builds, and no block changes with another."""

from typing import Any

import pytest
import torch

from engine.parts import empty_frame, empty_model, frame
from engine.profile import Component
from engine.profiles import PROFILES
from engine.published import published_values
from engine.stack import STACKS, copied

EXPERTS = [PROFILES["wan22_i2v_svi"], PROFILES["wan22_i2v_svi"].baked_in("fp8"), PROFILES["wan21_i2v_480p"]]
BLOCKS = 3


def expert(profile: Any) -> tuple[Component, dict[str, Any]]:
    component = profile.component("transformer")
    assert component.class_name in STACKS
    return component, {**published_values(component), "num_layers": BLOCKS}


@pytest.mark.parametrize("profile", EXPERTS, ids=lambda profile: profile.folder)
def test_model_of_copies_is_the_model_that_its_code_builds(profile: Any) -> None:
    component, config = expert(profile)
    made, built = empty_frame(component, config), frame(component, empty_model(component, config))
    assert (repr(made), dict(made.config)) == (repr(built), dict(built.config))
    assert made.attn_processors.keys() == built.attn_processors.keys()
    ours, theirs = (
        [
            (name, type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
            for name, x in model.state_dict(keep_vars=True).items()
        ]
        for model in (made, built)
    )
    assert ours == theirs


@pytest.mark.parametrize("profile", EXPERTS, ids=lambda profile: profile.folder)
def test_no_two_blocks_share_what_either_could_change(profile: Any) -> None:
    model = empty_frame(*expert(profile))
    tensors = [*model.parameters(), *model.buffers()]
    assert len({id(x) for x in model.state_dict(keep_vars=True).values()}) == len(model.state_dict())
    assert len({id(x) for x in tensors}) == len(tensors)
    first, second, third = model.blocks
    first.attn1.register_forward_hook(lambda *_: None)
    first.attn1.to_q.bias = None
    first.register_buffer("more", torch.zeros(1), persistent=False)
    first.mark = 3
    for block in (second, third, copied(second)):
        assert not block.attn1._forward_hooks
        assert block.attn1.to_q.bias is not None
        assert not hasattr(block, "more")
        assert "more" not in block._non_persistent_buffers_set
        assert not hasattr(block, "mark")
    assert second.training and first.eval().training is False and second.training


def test_number_that_is_left_to_the_class_is_the_classs() -> None:
    component, config = expert(EXPERTS[0])
    del config["num_layers"]
    small = {**config, "ffn_dim": 16, "num_attention_heads": 1, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 8}
    assert len(empty_frame(component, small).blocks) == len(empty_model(component, small).blocks) > BLOCKS
