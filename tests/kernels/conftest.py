"""The card's kernels without a card: Triton's interpreter runs them, with a card's arithmetic where it differs.

`make test` runs this folder last, in a process of its own. Other runs do not collect it (pyproject.toml), because its
environment is not theirs: PYTHONPATH=.venv/triton TRITON_INTERPRET=1.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("make test runs these: PYTHONPATH=.venv/triton TRITON_INTERPRET=1 pytest tests/kernels")

from triton.runtime import interpreter

from engine.settings import ROOT

STORED = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}


def pytest_configure(config: pytest.Config) -> None:
    # NumPy says what a card does without a word.
    config.addinivalue_line(
        "filterwarnings", "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
    )
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


def rounded(x: np.ndarray, target: torch.dtype) -> np.ndarray:
    """fp32 values as `target`, by torch: to the nearest, of two equally near ones to the even one; a NaN stays one.

    What e4m3 does not reach, an infinity too, becomes its largest: so torch has it as of 2.13, and a card.
    """
    made = torch.from_numpy(np.ascontiguousarray(x)).to(target)
    return made.view(torch.uint8 if target.itemsize == 1 else torch.uint16).numpy()


@pytest.fixture(autouse=True)
def arithmetic_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter does otherwise than a card, put right.

    - fp32 to bf16 is cut off. fp32 to e4m3 is rounded half up, a carry into the exponent is lost (31.9 becomes 16),
      and a NaN becomes 384.
    - The larger or smaller of a NaN and a number is the NaN. A card takes the number, unless it is told otherwise.
    - An instruction of the card's own is refused. Ours use one, tanh, which is exact here and errs by 2**-11 there.
    """
    convert = interpreter._convert_float

    def convert_as_a_card(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if str(source) == "fp32" and str(target) in STORED:
            return rounded(x, STORED[str(target)])
        return convert(x, source, target, rounding)

    def number_of(choose: np.ufunc) -> Callable[..., Any]:
        return lambda builder, one, other: builder.binary_op(one, other, choose)

    def tanh(_builder: Any, asm: str, _constraints: str, values: list[Any], *_: Any) -> Any:
        assert asm == "tanh.approx.f32 $0, $1;", asm
        (value,) = values
        made = interpreter.TensorHandle(np.tanh(value.data), value.dtype)
        return SimpleNamespace(get_result=[made].__getitem__)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", tanh)
    monkeypatch.setattr(interpreter, "_convert_float", convert_as_a_card)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_maxnumf", number_of(np.fmax))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_minnumf", number_of(np.fmin))


@pytest.fixture(autouse=True)
def language_is_patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter puts its own functions into Triton's language at every launch, and anew at every call that a
    kernel makes of another function, for which it searches the whole language: a third of what these tests took."""
    patched = dict[int, object]()  # what is held here keeps its number

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        names = function.fn.__globals__
        if id(names) not in patched:
            patched[id(names)] = names
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **named)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(autouse=True)
def empty_is_nan() -> Iterator[None]:
    """Room that a kernel does not write holds no leftover that might be right."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, str, str], ModuleType]:
    """A module of the engine with a piece of its source replaced, in a file: Triton reads kernels from theirs."""

    def load(name: str, old: str, new: str) -> ModuleType:
        source = (ROOT / "engine" / f"{name}.py").read_text()
        assert source.count(old) == 1, f"{old!r} is not there once"
        path = tmp_path / f"{name}.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(f"changed_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
