"""Figures within sentences, made from the JSON of the benchmarks.

In Markdown, `<!-- figure: convert/first.json peak_memory_bytes .2e -->1.10e+09<!-- end -->`: a file in
`benchmarks`, a key in it, and Python's format. A key is a path with dots; `name=value` in it chooses from a
list (several with commas between), and a slash divides one by another: `rows.method=svd,form=exact-rope.kl`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURE = re.compile(
    r"(<!-- figure: (?P<file>\S+) (?P<key>\S+) (?P<format>\S+) -->)[^<]*(?P<end><!-- end -->)", re.DOTALL
)


def with_figures(text: str) -> str:
    """A page's text with every figure as its JSON has it."""
    return FIGURE.sub(lambda found: found[1] + figure(**found.groupdict()) + found["end"], text)


def figure(file: str, key: str, format: str, **_: str) -> str:
    """One figure as text.

    Raises:
        LookupError: the JSON has no such key, or no or several rows of that description.
    """
    result = json.loads((HERE / file).read_text(encoding="utf-8"))
    number, *divisor = (look_up(result, path) for path in key.split("/"))
    return f"{number / divisor[0] if divisor else number:{format}}"


def look_up(value: Any, path: str) -> Any:
    """What lies under a path in a result."""
    for name in path.split("."):
        if "=" in name:
            wanted = dict(pair.split("=") for pair in name.split(","))
            rows = [row for row in value if all(str(row[key]) == wanted[key] for key in wanted)]
            if len(rows) != 1:
                raise LookupError(f"{path}: {len(rows)} rows have {name}, and one is needed.")
            value = rows[0]
        else:
            value = value[name]
    return value
