"""Two packages share the name `flash_attn`: this keeps the younger from breaking libraries that mean the older.

flash-attn-4 installs a folder flash_attn/cute and no flash_attn/__init__.py. With it alone, `import flash_attn` works
and gives an empty namespace. Libraries that find the name and then reach for FlashAttention-2's version (xformers does)
fail while diffusers is imported, and diffusers catches only ImportError. So the name is hidden for that one import;
afterwards `flash_attn.cute` is there for whoever asks for it by its full name.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

from engine.hidden import answer_for_unused, hidden
from engine.unopened import MODELS, leave_unopened

NAME = "flash_attn"


def import_diffusers() -> None:
    """Import what looks for FlashAttention-2 in diffusers, and leave out what no job uses.

    Call it before anything else imports diffusers.
    """
    with namesake_hidden():
        answer_for_unused()
        leave_unopened(*MODELS)
        importlib.import_module("diffusers.models.attention_dispatch")


@contextmanager
def namesake_hidden() -> Iterator[bool]:
    """Inside the block `flash_attn` cannot be found, if it is the namesake; the value says whether it is."""
    if not _is_namesake():
        yield False
        return
    with hidden(NAME):
        yield True


def _is_namesake() -> bool:
    spec = PathFinder.find_spec(NAME)
    if spec is None:
        return False
    folders = spec.submodule_search_locations or []
    return not any((Path(folder) / "flash_attn_interface.py").exists() for folder in folders)
