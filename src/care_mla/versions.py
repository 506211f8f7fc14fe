"""Versions of what decides the numbers, for results and model cards."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from care_mla import __version__


def versions() -> dict[str, str | None]:
    """Version by name; None where it is not installed."""
    found: dict[str, str | None] = {"care_mla": __version__}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "python": platform.python_version()}
