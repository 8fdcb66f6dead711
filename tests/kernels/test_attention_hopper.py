"""Our attention kernels as they are compiled for a Hopper: what they multiply, and that nothing waits in between."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from engine.attention_reach import KEY_TILE, WIDTH
from engine.settings import ROOT

WAYS = 2  # without and with a look for the maximum
# Where scores are made: the first tile, and the loop; where they are weighed in: the loop, and the last tile.
PLACES = 2
SEEN = WAYS * PLACES * KEY_TILE // 16  # products of weights and values, bf16 and 16 deep
# int8 products are 32 deep.
PRODUCTS = {"attention8": (WAYS * PLACES * WIDTH // 32, SEEN), "attention16": (0, WAYS * PLACES * WIDTH // 16 + SEEN)}


@pytest.fixture(scope="module", params=list(PRODUCTS))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cute = Path(triton.__file__).parents[1] / "nvidia_cutlass_dsl" / "dsl_packages"  # beside Triton, as `make` puts it
    wanted = {
        "PYTHONPATH": os.pathsep.join([environment["PYTHONPATH"], str(cute)]),
        "CUTE_DSL_ARCH": "sm_90a",
        "CUTE_DSL_KEEP": "cubin",
        "CUTE_DSL_DUMP_DIR": str(tmp_path_factory.mktemp("compiled")),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled_hopper", request.param],
        cwd=ROOT, env=environment | wanted, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {"name": request.param, **json.loads(done.stdout)}


def of_kind(compiled: dict[str, Any], start: str) -> int:
    return sum(count for name, count in compiled["instructions"].items() if name.startswith(start))


def test_products_are_of_the_kind_that_the_kernel_is_named_after(compiled: dict[str, Any]) -> None:
    assert (of_kind(compiled, "IGMMA"), of_kind(compiled, "HGMMA")) == PRODUCTS[compiled["name"]]


def test_no_number_leaves_the_registers(compiled: dict[str, Any]) -> None:
    assert "STACK:0" in compiled["resources"]
    assert of_kind(compiled, "LDL") == of_kind(compiled, "STL") == 0


def test_products_are_waited_for_where_the_kernel_says_so(compiled: dict[str, Any]) -> None:
    """Where the compiler finds no other way it waits after each product, at a third of the speed."""
    assert of_kind(compiled, "WARPGROUP.DEPBAR") == WAYS * 4
    assert of_kind(compiled, "WARPGROUP.ARRIVE") == WAYS * 2 * PLACES


def test_one_way_looks_for_no_maximum(compiled: dict[str, Any]) -> None:
    """Two maxima for each number of a thread's row, one to begin with and those between four threads, in one way."""
    weighed = PLACES * 2 * (KEY_TILE // 4)
    assert weighed <= of_kind(compiled, "FMNMX") < 1.5 * weighed
    assert of_kind(compiled, "MUFU.EX2") < WAYS * weighed * 1.1


def test_what_is_taken_from_a_score_comes_with_its_scale(compiled: dict[str, Any]) -> None:
    """Of the numbers that become weights in both ways, but in one place in which the compiler has its own order."""
    weighed = PLACES * 2 * (KEY_TILE // 4)
    assert of_kind(compiled, "FFMA") >= 1.5 * weighed
