"""`python -m care_mla`: the command `care`, where its script is not on the path."""

from __future__ import annotations

import sys

from care_mla.cli.main import main

sys.exit(main())
