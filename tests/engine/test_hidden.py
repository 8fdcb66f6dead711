"""What no job uses is not imported with the libraries, is there for who does want it, and changes no sampler."""

import subprocess
import sys
import wave
from pathlib import Path

import pytest

from engine.hidden import hidden
from tests.conftest import ROOT

PACKAGES = ("peft", "scipy", "sklearn", "torchaudio", "torchvision")

BACKENDS = """
import sys
from engine.backends import import_backend
from engine.profiles import PROFILES

for name in sys.argv[1:]:
    import_backend(PROFILES[name])
"""

LOADED = "print(*sorted({name.split('.')[0] for name in sys.modules}))"

FOUND = f"""
from diffusers import utils as diffusers
from transformers import utils as transformers

asked = [(library, f"is_{{name}}_available") for library in (diffusers, transformers) for name in {PACKAGES}]
print(*(question for library, question in asked if hasattr(library, question) and getattr(library, question)()))
"""

OURS = "from engine.backends.sdxl import SCHEDULERS; sampler = SCHEDULERS['KLMS']"
PLAIN = "from diffusers import LMSDiscreteScheduler as sampler"

SIX_STEPS = """
import json
import torch

made = sampler.from_config(json.load(open("engine/published/sdxl_scheduler.json")))
made.set_timesteps(6)
latents = torch.linspace(-9.0, 9.0, 64)
for t in made.timesteps:
    latents = made.step(torch.sin(made.scale_model_input(latents, t)), t, latents).prev_sample
print(latents.tolist())
"""


def printed(*code: str, args: tuple[str, ...] = (), path: Path = ROOT) -> str:
    """What a process of its own says, with `path` before all other places for modules."""
    source = "\n".join((f"import sys; sys.path.insert(0, {str(path)!r})", *code))
    run = subprocess.run([sys.executable, "-c", source, *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The packages as another program may have left them: found, and of no use to this torch."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('built for another torch')\n")
        about = tmp_path / f"{name}-99.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n")
    return tmp_path


def test_backends_are_imported_beside_packages_that_no_job_uses_and_import_none(site: Path) -> None:
    loaded = printed(BACKENDS, LOADED, args=("wan22_i2v_svi", "wan21_i2v_480p", "sdxl"), path=site).split()
    assert {"diffusers", "transformers"} <= set(loaded)
    assert not set(PACKAGES) & set(loaded)


def test_libraries_are_told_that_they_are_not_there_also_where_they_would_ask_later(site: Path) -> None:
    assert printed(BACKENDS, FOUND, args=("wan22_i2v_svi",), path=site).split() == []


@pytest.fixture(scope="module")
def plain() -> str:
    return printed(PLAIN, SIX_STEPS)


@pytest.mark.parametrize(
    "order", [("wan22_i2v_svi", "sdxl"), pytest.param(("sdxl", "wan22_i2v_svi"), marks=pytest.mark.soak)]
)
def test_klms_takes_the_steps_of_diffusers_that_finds_scipy(plain: str, order: tuple[str, str]) -> None:
    assert printed(BACKENDS, OURS, SIX_STEPS, args=order) == plain


def test_package_is_hidden_for_the_block_only() -> None:
    with pytest.raises(ZeroDivisionError), hidden("wave", "no_such_package"):
        with pytest.raises(ModuleNotFoundError):
            __import__("wave")
        raise ZeroDivisionError
    assert sys.modules["wave"] is wave
    assert "no_such_package" not in sys.modules
