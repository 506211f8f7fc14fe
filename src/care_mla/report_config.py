"""The options of `care report`; see configs.py, which they follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from care_mla.configs import CommonConfig
from care_mla.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class ReportConfig(CommonConfig):
    """Write FOLDER/report.html: one page, to be read offline, about every result in the folder.

    Results are what other commands write with --json FOLDER/NAME.json.
    """

    folder: Path
    """A folder with results."""

    def check_paths(self) -> None:
        super().check_paths()
        if not self.folder.is_dir():
            raise OptionError(
                f"{self.folder}: there is no such folder. Make one and put results into it: "
                f"care convert MODEL OUT --json {self.folder}/convert.json"
            )
