"""Calibration text as it was found: plain text, JSON records, Parquet, or a data set of the hub.

Reads files, or the hub through the library `datasets`; writes nothing. Model and tokens play no part here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_mla.errors import CalibrationError

PLAIN, JSON, PARQUET = (".txt", ".raw"), (".json", ".jsonl"), (".parquet",)
SUFFIXES = PLAIN + JSON + PARQUET
# English has about four characters per token, and blocks should come from far more text than they use; but a
# corpus of gigabytes is not tokenised whole for a few thousand tokens.
CHARACTERS_PER_TOKEN = 64
PIECES = 16
ANOTHER = "Nothing was written. Give another text: --calibration FILE"


@dataclass(frozen=True)
class Text:
    """Text and how to call it: a file's name without its folder, or the data set's."""

    name: str
    text: str

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def read_text(calibration: str, *, tokens: int) -> Text:
    """Text of a file or data set: all of it, or far more than `tokens` tokens from all over it.

    A data set of the hub is read from its start, as much as that.

    Args:
        calibration: a `.txt`, `.raw`, `.json`, `.jsonl` or `.parquet` file, or the name of a data set.

    Raises:
        CalibrationError: naming the file or data set and, in it, the record.
    """
    path = Path(calibration).expanduser()
    if path.is_file():
        text = Text(path.name, thin(read_text_file(path), CHARACTERS_PER_TOKEN * tokens))
    elif path.suffix in SUFFIXES or path.is_absolute() or calibration.startswith((".", "~")):
        raise CalibrationError(f"--calibration {calibration}: there is no such file. {ANOTHER}")
    else:
        text = Text(calibration, _read_hub(calibration, CHARACTERS_PER_TOKEN * tokens))
    if not text.text.strip():
        raise CalibrationError(f"--calibration {calibration} is empty: no text, no tokens. {ANOTHER}")
    return text


def thin(text: str, characters: int) -> str:
    """About so many characters of a longer text: `PIECES` from all over it, each from the start of a word."""
    if len(text) <= characters:
        return text
    step, size = len(text) // PIECES, characters // PIECES
    pieces = (text[i * step : i * step + size] for i in range(PIECES))
    return "\n\n".join(piece.partition(" ")[2] if i else piece for i, piece in enumerate(pieces))


def read_text_file(path: Path) -> str:
    """A file's text: as it is, or the records of a JSON or Parquet file joined by blank lines.

    Raises:
        CalibrationError: its suffix is unknown, or it cannot be read as what the suffix says.
    """
    match path.suffix:
        case ".parquet":
            return _join(_parquet_records(path), str(path))
        case ".json" | ".jsonl":
            return _join(_json_records(_decode(path), path), str(path))
        case ".txt" | ".raw":
            return _decode(path)
        case _:
            raise CalibrationError(
                f"{path}: its suffix {path.suffix!r} does not say what it is. Known are "
                f"{', '.join(SUFFIXES)}. If it is plain text, rename it: mv {path} {path.with_suffix('.txt')}"
            )


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: byte {error.start} is not UTF-8, so its text would be guesswork. Convert "
            f"it first: iconv -f ENCODING -t UTF-8 {path} > utf8{path.suffix}"
        ) from error


def _json_records(text: str, path: Path) -> Iterator[Any]:
    """Records of a JSON list, of lines with one record each, or of any JSON values one after another."""
    decoder = json.JSONDecoder()
    position, end = 0, len(text.rstrip())
    while position < end:
        if text[position].isspace():
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"{path}: line {error.lineno}, column {error.colno}: no JSON ({error.msg}). "
                f"The file may be cut off. {ANOTHER}"
            ) from error
        if isinstance(value, list):
            yield from value
        else:
            yield value


def _parquet_records(path: Path) -> Iterator[Any]:
    if importlib.util.find_spec("pyarrow") is None:
        raise CalibrationError(
            f"{path}: Parquet files are read by pyarrow, which is not installed here. Install "
            "it (pip install pyarrow), or save the text as .jsonl."
        )
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except importlib.import_module("pyarrow").ArrowInvalid as error:
        raise CalibrationError(f"{path}: no Parquet file ({error}). {ANOTHER}") from error


def _read_hub(name: str, characters: int) -> str:
    """Text of a data set's records from the first on; `NAME:CONFIG` names one of its configurations."""
    if importlib.util.find_spec("datasets") is None:
        raise CalibrationError(
            f"--calibration {name}: no such file here, and data sets of the hub are read by the library "
            "datasets, which is not installed. Install it (pip install 'care-mla[eval]'), or save text in a "
            "file: --calibration FILE.txt"
        )
    datasets = importlib.import_module("datasets")
    repository, _, config = name.partition(":")
    records: list[Any] = []
    length = 0
    try:
        for record in datasets.load_dataset(repository, config or None, split="train", streaming=True):
            records.append(record)
            length += sum(len(value) for value in record.values() if isinstance(value, str))
            if length >= characters:
                break
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise CalibrationError(
            f"--calibration {name}: no such file here, and the hub gives no data set of that name with a "
            f"split 'train' ({str(error).strip().splitlines()[0]}). Check the spelling (a configuration goes "
            "behind a colon: NAME:CONFIG), or use a file: --calibration FILE.txt"
        ) from error
    return _join(records, name)


def _join(records: Iterable[Any], where: str) -> str:
    """Texts of all records, with a blank line between two of them."""
    texts = (_record_text(record, number, where) for number, record in enumerate(records, start=1))
    return "\n\n".join(text for text in texts if text.strip())


def _record_text(record: Any, number: int, where: str) -> str:
    """`text`, else instruction, input and output, of those that the record has, a line break between them."""
    if isinstance(record, Mapping):
        if isinstance(text := record.get("text"), str):
            return text
        parts = [record.get(key) or "" for key in ("instruction", "input", "output")]
        if "instruction" in record and "output" in record and all(isinstance(part, str) for part in parts):
            return "\n".join(part for part in parts if part)
    found = f"the keys {', '.join(map(str, record))}" if isinstance(record, Mapping) else repr(record)[:60]
    raise CalibrationError(
        f"--calibration {where}: record {number} has {found}, and neither a string 'text' nor strings "
        "'instruction' and 'output', so it is not known which of it is text. Rename the field to 'text'."
    )
