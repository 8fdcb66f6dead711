"""docs/api.md and docs/schema.json say what the contract says."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from builder import generate_docs
from schemas.errors import InvalidInput, Problem, error_response
from schemas.input_schema import INPUT_SCHEMA, parse_request
from tests.schemas.payloads import FULL, LEAST
from tests.schemas.test_fuzz import payloads
from tests.schemas.test_output_schema import PNG, VIDEO, Made, answer
from tests.schemas.test_worker_sdxl import PAYLOADS

SCHEMA = generate_docs.schema()


def validator(part: str) -> Draft202012Validator:
    return Draft202012Validator({**SCHEMA["properties"][part], "$defs": SCHEMA["$defs"]})


def test_docs_in_the_repository_are_what_the_contract_says() -> None:
    assert generate_docs.main(["--check"]) == 0


def test_check_fails_when_a_document_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_docs.main(["--check"], tmp_path) == 1
    assert generate_docs.main([], tmp_path) == 0
    assert generate_docs.main(["--check"], tmp_path) == 0
    (tmp_path / "api.md").write_text((tmp_path / "api.md").read_text().replace("`81`", "`80`"))
    assert generate_docs.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.endswith("says: api.md; run builder/generate_docs.py\n")


def test_check_writes_nothing(tmp_path: Path) -> None:
    generate_docs.main(["--check"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_schema_is_a_json_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("payload", [*LEAST.values(), *FULL.values(), *PAYLOADS.values()])
def test_schema_takes_what_the_parser_takes(payload: dict[str, Any]) -> None:
    assert validator("input").is_valid(payload)


@pytest.mark.parametrize("mode", INPUT_SCHEMA)
def test_schema_takes_every_request_that_the_parser_takes(mode: str) -> None:
    published = validator("input")

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(payloads(mode))
    def fuzz(payload: dict[str, Any]) -> None:
        try:
            parse_request(payload)
        except InvalidInput:
            return
        assert published.is_valid(payload), payload

    fuzz()


@pytest.mark.parametrize(
    "payload",
    [
        {"mode": "video"},
        {"image_url": "a", "num_frames": 81},
        {"prompt": "x", "height": 1001},
        {"prompt": "x", "scheduler": "EULER"},
        {**LEAST["video"], "fps": 61},
        {**LEAST["svi_endframe"], "image_refs": ["a", "b"]},
        {**LEAST["svi_endframe"], "width": 20},
    ],
)
def test_schema_refuses_what_it_can_express(payload: dict[str, Any]) -> None:
    assert not validator("input").is_valid(payload)


def test_schema_takes_the_responses() -> None:
    refused = InvalidInput([Problem("fps", "must be at most 60, got 61")])
    video = answer(LEAST["video"], "wan21_i2v_480p", Made((VIDEO,)))
    for response in (answer({"prompt": "x"}, "sdxl", Made((PNG,))), video, error_response(refused)):
        assert validator("output").is_valid(response)
    assert not validator("output").is_valid({**video, "num_frames": "81"})


@pytest.mark.parametrize("mode", INPUT_SCHEMA)
def test_every_field_is_described(mode: str) -> None:
    properties = SCHEMA["$defs"][INPUT_SCHEMA[mode].__name__]["properties"]
    assert list(properties)[: len(INPUT_SCHEMA[mode].names())] == INPUT_SCHEMA[mode].names()
    assert [name for name, one in properties.items() if not one.get("description")] == []


def test_every_error_has_its_row() -> None:
    rows = [line for line in generate_docs.api().splitlines() if line.startswith("| `")]
    for error in generate_docs.error_classes():
        assert any(row.startswith(f"| `{error.code}` | {error.http_status} |") for row in rows)


def test_schema_in_the_repository_is_json_that_any_parser_reads() -> None:
    text = (generate_docs.ROOT / "docs" / "schema.json").read_text()
    assert json.loads(text)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
