"""care turns a decoder with multi-head or grouped-query attention into one with Multi-head Latent Attention.

The names below are the public API; each loads its module when it is first used, so that importing care_mla
stays cheap and never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "CareError": "care_mla.errors",
    "CompareConfig": "care_mla.configs",
    "ConvertConfig": "care_mla.configs",
    "ExportConfig": "care_mla.export_config",
    "HealConfig": "care_mla.heal_config",
    "VerifyConfig": "care_mla.configs",
    "compare": "care_mla.evaluate.compare",
    "convert": "care_mla.pipeline",
    "export_model": "care_mla.export.run",
    "heal_model": "care_mla.heal.run",
    "verify": "care_mla.export.verify",
}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'care_mla' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
