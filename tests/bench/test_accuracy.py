"""Accuracy of 8 bits in a whole forward, on a tiny transformer."""

import torch

from bench.accuracy import add_outliers, compare
from tests.engine.tiny_wan import make_wan, wan_inputs


def test_compare_tells_layers_and_forward_for_both_kinds_of_weights():
    given = {**wan_inputs(), "return_dict": False}
    results = compare(lambda: make_wan(0), ("fp8", "int8"), given)
    assert [(result.weights, result.kind) for result in results] == [
        ("random", "fp8"), ("random", "int8"), ("with outliers", "fp8"), ("with outliers", "int8"),
    ]  # fmt: skip
    assert set(results[0].layer_db) == {
        *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
        "ffn.net.0.proj", "ffn.net.2",
    }  # fmt: skip
    assert all(low <= middle for result in results for low, middle in result.layer_db.values())
    assert results[1].forward_db > results[0].forward_db > 20  # 7 bits of int8 against 3 of e4m3, weights at random


def test_outliers_are_put_into_the_blocks_only():
    model, plain = make_wan(0), make_wan(0)
    add_outliers(model)
    assert torch.equal(model.proj_out.weight, plain.proj_out.weight)
    changed = model.blocks[0].attn1.to_q.weight / plain.blocks[0].attn1.to_q.weight
    assert changed[0, 1].item() == 20.0
    assert changed[1, 1].item() == 1.0
