"""What holds in every test: no network, one thread, torch's dtype and seed as they were found."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist runs a process per core


@pytest.fixture(autouse=True)
def _unchanged_torch() -> Iterator[None]:
    """Every test starts from the same seed, and leaves the default dtype as it was."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in ("vllm", "browser"):  # make's targets alone name them, whatever else -m says
        if mark not in config.option.markexpr:
            apart = [item for item in items if item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=apart)
            items[:] = [item for item in items if item not in apart]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
