"""Whatever is posted, the answer is a request or InvalidInput with sentences that can be sent."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.profiles import resolve
from schemas.effective import as_run
from schemas.errors import InvalidInput, error_response
from schemas.input_schema import INPUT_SCHEMA, effective, media_fields, parse_request
from tests.figures import Figure
from tests.schemas.payloads import FULL, LEAST

pytest_plugins = ["tests.figures"]

TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=30)  # lone surrogates and controls too
HUGE = st.integers(18, 5000).map(lambda digits: 10**digits)  # Python itself refuses to print the longest
ODD = HUGE | st.sampled_from([-(2**63), 1e308, float("nan"), float("inf"), "\ud800", "a\0", "-1", "81", "x" * 6000])
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | ODD
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)
ANY_KEY = st.dictionaries(TEXT | st.integers() | st.none() | st.floats(), JSON, max_size=5)


def payloads(mode: str) -> st.SearchStrategy[dict[str, Any]]:
    """A right request with some fields replaced: right by themselves, near to it and far from it."""
    names = st.sampled_from(INPUT_SCHEMA[mode].names()) | TEXT
    near = st.integers(-2, 300) | st.floats(-1, 10) | st.sampled_from(list(FULL[mode].values()))
    right = st.lists(st.sampled_from(list(FULL[mode].items())), max_size=4)
    wrong = st.lists(st.tuples(names, near | JSON), max_size=6)
    changed = st.builds(lambda one, other: dict(one + other), right, st.just([]) | wrong)
    return st.builds(
        lambda base, change: {**base, **change, "mode": mode},
        st.sampled_from([LEAST[mode], FULL[mode]]),
        changed,
    )


FITTING: dict[str, list[Any]] = {
    "model_type": ["wan_2_2_i2v_lightning_svi_3_3", "wan_2_2_i2v_lightning_svi_endframe"],
    "prompt": ["x"],
    "prompts": [["x"], ["x", "y"], ["x"] * 16],
    "negative_prompt": [""],
    "image_start": [["a"], ["a"] * 2, ["a"] * 9],
    "image_end": [None],
    "image_refs": [["c"]],
    "prefix_video": ["d"],
    "svi2pro": [True, False],
    "layout": ["svi", "svi_latent", "svi_upstream", "svi_pixel4", "flf", "kijai_end"],
    "video_length": [5, 9, 81, 85, 233, 1221],
    "segments": [1, 2, 3, 16],
    "overlap": [4, 8, 20],
    "frame_policy": ["window"],
    "lock_end": [True, False],
    "num_inference_steps": [2, 8, 100],
    "guidance_scale": [0, 3],
    "flow_shift": [0.01, 100],
    "switch_threshold": [500],
    "high_steps": [1, 2, 99],
    "low_steps": [1, 6, 99],
    "seed": [-1, 2**63 - 1],
    "return_state": [True],
    "state": ["aaaa"],
}
"""Values of svi_endframe's fields that are each right; whether they go together is another matter."""


def combinations() -> st.SearchStrategy[dict[str, Any]]:
    some = st.lists(st.sampled_from(list(FITTING)), max_size=5, unique=True)
    chosen = some.flatmap(lambda names: st.fixed_dictionaries({name: st.sampled_from(FITTING[name]) for name in names}))
    return chosen.map(lambda fields: {**LEAST["svi_endframe"], **fields})


def check(payload: object) -> bool:
    """Parse, look at what comes back, and say it as a finished job does; True if it was taken."""
    try:
        request = parse_request(payload)
    except InvalidInput as error:
        assert error.problems
        assert all(len(problem.field) < 200 and 0 < len(problem.message) < 1200 for problem in error.problems)
        json.dumps(error_response(error), allow_nan=False, ensure_ascii=False).encode()  # what the wire does to it
        return False
    media: dict[str, Any] = {}
    for kind in ("picture", "video", "latent"):
        media |= media_fields(request, kind)
    hashes = {name: ["00"] * len(text) if isinstance(text, list) else "00" for name, text in media.items()}
    for one in (request, as_run(request, resolve(request), 480, 832)):
        one.warnings()
        ran = json.loads(json.dumps(effective(one, 7, hashes), allow_nan=False))
        assert parse_request({**ran, **media}).explicit() == {**one.explicit(), "seed": 7}
    return True


@pytest.mark.parametrize("mode", INPUT_SCHEMA)
def test_parse_answers_every_request_of_a_mode(mode: str) -> None:
    taken = []

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(payloads(mode))
    def fuzz(payload: dict[str, Any]) -> None:
        taken.append(check(payload))

    fuzz()
    assert 0.02 < sum(taken) / len(taken) < 0.98  # both answers were tried


def test_every_request_that_is_taken_can_be_answered_as_it_ran() -> None:
    taken = []

    @settings(max_examples=600, deadline=None, derandomize=True)
    @given(combinations())
    def fuzz(payload: dict[str, Any]) -> None:
        taken.append(check(payload))

    fuzz()
    assert 0.2 < sum(taken) / len(taken) < 0.9  # both answers were tried


@settings(max_examples=300, deadline=None, derandomize=True)
@given(JSON | ANY_KEY)
def test_parse_answers_every_json_value(payload: object) -> None:
    check(payload)


@pytest.mark.soak
@pytest.mark.parametrize("mode", INPUT_SCHEMA)
def test_parse_answers_ten_thousand_requests_of_a_mode(mode: str, figure: Figure) -> None:
    taken = []

    @settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(payloads(mode))
    def fuzz(payload: dict[str, Any]) -> None:
        taken.append(check(payload))

    fuzz()
    figure(f"fuzzed requests of {mode}", f"{len(taken):,}, {sum(taken):,} of them taken, 0 uncaught")
    assert len(taken) >= 10_000


@pytest.mark.soak
def test_parse_answers_ten_thousand_json_values(figure: Figure) -> None:
    taken = []

    @settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(JSON | ANY_KEY)
    def fuzz(payload: object) -> None:
        taken.append(check(payload))

    fuzz()
    figure("fuzzed JSON values", f"{len(taken):,}, 0 uncaught")
    assert len(taken) >= 10_000


def test_fuzz_notices_a_value_that_is_repeated_without_care(monkeypatch: pytest.MonkeyPatch) -> None:
    check({"prompt": 10**5000})
    monkeypatch.setattr("schemas.sentences.shown", str)
    with pytest.raises(ValueError, match="Exceeds the limit"):
        check({"prompt": 10**5000})


def test_fuzz_notices_a_lone_surrogate_in_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    check({"\ud800": 1})
    monkeypatch.setattr("schemas.input_schema.printable", str)
    with pytest.raises(UnicodeEncodeError):
        check({"\ud800": 1})
