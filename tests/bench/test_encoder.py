"""The encoder's measurement: on the twin's sizes it orders the forms as it should, and weighs what it says."""

import pytest

from bench import encoder
from engine.linear8 import KINDS
from engine.twins import twin_values


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "published_values", twin_values)


def test_every_form_is_measured_against_bf16(small: None) -> None:
    rows = {(row.weights, row.form): row for row in encoder.measure(2, 64, 16, "cpu")}
    assert rows.keys() == {(weights, form) for weights in ("random", "loud channels") for form in ("bf16", *KINDS)}
    assert rows["random", "bf16"].snr_db == float("inf")
    for precision in ("fp8", "int8"):
        assert rows["random", f"{precision}-weights"].snr_db > rows["random", precision].snr_db > 15
        assert rows["loud channels", precision].snr_db < rows["random", precision].snr_db
    assert rows["random", "fp8-weights"].weights_gib < 0.7 * rows["random", "bf16"].weights_gib


def test_loud_channels_are_loud(small: None) -> None:
    model = encoder.random_encoder(1, 64, "cpu")
    encoder.make_loud(model)
    factors = model.get_parameter("encoder.block.0.layer.0.layer_norm.weight")
    assert sorted(set(factors.tolist())) == [1.0, 100.0]
    assert int((factors == 100).sum()) == 8
