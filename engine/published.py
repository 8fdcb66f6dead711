"""The published configurations, kept as data: what the full-size models look like without fetching them."""

import json
from pathlib import Path
from typing import Any

from engine.profile import Component

FOLDER = Path(__file__).parent / "published"

# Where the file came from and who wrote it, not what the model is.
PROVENANCE = frozenset({"_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype"})


def published_values(component: Component) -> dict[str, Any]:
    """The component's configuration file as its repository publishes it.

    Raises:
        KeyError: it has none, as tokenizers.
    """
    if component.published is None:
        raise KeyError(f"{component.name} has no published configuration")
    return dict(json.loads((FOLDER / f"{component.published}.json").read_bytes()))


def published_model(component: Component) -> Any:
    """The full-size model on the meta device: every name and shape, no memory."""
    from engine.parts import empty_model, library_class

    values = published_values(component)
    if component.library == "diffusers":
        return empty_model(component, values)
    return empty_model(component, library_class(component).config_class.from_dict(values))


def differences(component: Component, found: dict[str, Any]) -> list[str]:
    """What a fetched configuration says differently from the one kept here, as `key: kept -> found`."""
    kept = published_values(component)
    return [
        f"{key}: {kept[key]!r} -> {found[key]!r}"
        for key in sorted(kept.keys() & found.keys() - PROVENANCE)
        if kept[key] != found[key]
    ]
