"""The options of `care report`; see configs.py, which they follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from care_mla.configs import CommonConfig


@dataclass(frozen=True, kw_only=True)
class ReportConfig(CommonConfig):
    """Write FOLDER/report.html, one page that needs nothing else, from every JSON of care in FOLDER."""

    folder: Path
    """Holds the JSON of --json, such as FOLDER/convert.json and FOLDER/evaluate.json."""
