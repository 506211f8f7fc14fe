"""Whether every weight of a source is a number: checked before a work folder is begun, and not again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from care_mla import console
from care_mla.workspace import Workspace, read_json

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source


def require_finite(source: Source, workspace: Workspace) -> None:
    """Read all weights once, unless the work folder holds statistics of them.

    Raises:
        CheckpointError: naming the tensor that holds NaN or Inf.
    """
    stamp = workspace.path("statistics.stamp.json")
    if stamp.exists() and read_json(stamp)["model"] == source.fingerprint():
        return
    with console.current().progress("Checking weights", len(source.names())) as progress:
        source.check_values(lambda done, total: progress.advance())
