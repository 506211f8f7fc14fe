"""A model's tokenizer in the metadata of a GGUF file: the same ids in llama.cpp as in transformers.

Reads the tokenizer that transformers builds; adds keys to a GGUF writer. llama.cpp knows ways of splitting
text by name: the name is found by comparing definitions, never guessed, and a tokenizer of another kind is
refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf

from care_mla import console
from care_mla.checkpoint.folder import VOCABULARIES
from care_mla.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from care_mla.checkpoint.source import Source

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # what SentencePiece writes for a space
# Text that meets every rule of splitting: digits, contractions, several spaces, line ends, other scripts.
PROBE = (
    "Hello world, it's 2024: I'VE 1,234.5 and   three  spaces!\n\n\tNaïve café über Straße №7 "
    "中文字符 русский текст 한국어 ½ ١٢٣ 🙂👍🏽 -- x_y=z**2; \"quoted\" (end)\r\n \n  l'été we'll 12345678"
)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> list[dict[str, Any]]:
    """Pieces by a regular expression, then bytes: how Llama 3, Qwen and their kin split text."""
    pattern = {"Regex": _CONTRACTIONS + _WORDS % digits}
    return [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]


_GPT2: list[dict[str, Any]] = [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]


class Splitting(NamedTuple):
    """A way of splitting text that llama.cpp knows by a name.

    `whole_words` takes a piece that is a token itself without applying merges (`ignore_merges`).
    """

    pre_tokenizers: list[dict[str, Any]]
    whole_words: bool = False


SPLITTINGS: dict[str, Splitting] = {
    "gpt-2": Splitting(_GPT2),
    "smollm": Splitting([{"type": "Digits", "individual_digits": True}, *_GPT2]),
    "llama-bpe": Splitting(_split(r"\p{N}{1,3}"), whole_words=True),
    "smaug-bpe": Splitting(_split(r"\p{N}{1,3}")),
    "qwen2": Splitting(_split(r"\p{N}")),
}


class Vocabulary(NamedTuple):
    """What llama.cpp must know. `scores` belong to SentencePiece, `merges` and `pre` to byte-level BPE."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool = False


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds files that define a tokenizer."""
    return any((folder / file).is_file() for file in VOCABULARIES)


def write_vocabulary(writer: gguf.GGUFWriter, source: Source) -> None:
    """Add a model's tokenizer, its special tokens and its chat template.

    A folder without a tokenizer gives a file without one, which takes token ids alone; a warning says so.

    Raises:
        ExportError: llama.cpp has no such tokenizer.
    """
    if not has_tokenizer(Path(source.name)):
        console.current().warn(
            f"{source.name} has no tokenizer, so the file takes token ids alone and cannot generate text. "
            "Copy the original model's tokenizer files into it and export again."
        )
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = source.tokenizer()
    vocabulary = read_vocabulary(tokenizer, source.name, source.facts.vocab_size)
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    adds_bos, adds_eos = _added_ends(tokenizer, source.name)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)
    for role in ("bos", "eos", "unk", "pad"):
        if (token_id := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
    if (template := tokenizer.chat_template) is not None:
        writer.add_chat_template(template if isinstance(template, str) else template["default"])


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, size: int) -> Vocabulary:
    """The vocabulary of a transformers tokenizer as llama.cpp takes it.

    Args:
        tokenizer: backed by the `tokenizers` package.
        name: how error messages call the model.
        size: rows of the embedding; ids beyond the tokenizer's are filled up with unused tokens.

    Raises:
        ExportError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(name, "it is written in Python", type(tokenizer).__name__)
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise _refusal(name, "its model is not BPE", model["type"])
    added = {token["id"]: token for token in definition["added_tokens"]}
    if odd := [t["content"] for t in added.values() if t["single_word"]]:
        raise _refusal(name, "added tokens match whole words alone", ", ".join(odd[:3]))
    vocabulary = {token_id: token for token, token_id in model["vocab"].items()}
    vocabulary |= {token_id: token["content"] for token_id, token in added.items()}
    if (largest := max(vocabulary)) >= size:
        raise _refusal(
            name, f"token id {largest} has no row among the embedding's {size}", vocabulary[largest]
        )
    tokens = [vocabulary.get(token_id, f"[unused{token_id}]") for token_id in range(size)]
    types = [
        _type(token, added.get(i), model) if i in vocabulary else gguf.TokenType.UNUSED
        for i, token in enumerate(tokens)
    ]
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    if model.get("byte_fallback"):
        scores = _scores(tokens, merges, name)
        return Vocabulary(
            "llama", "default", tokens, types, scores=scores, add_space_prefix=_adds_space(definition, name)
        )
    pre = _splitting_name(definition, name)
    return Vocabulary("gpt2", pre, tokens, types, merges=[" ".join(merge) for merge in merges])


def _type(token: str, added: dict[str, Any] | None, model: dict[str, Any]) -> int:
    if token == model.get("unk_token"):
        return gguf.TokenType.UNKNOWN
    if added is not None:
        return gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    is_byte = model.get("byte_fallback") and BYTE.fullmatch(token)
    return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL


def _splitting_name(definition: dict[str, Any], name: str) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text, found by its definition."""
    normalizer, pre = definition["normalizer"], definition["pre_tokenizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refusal(name, "it changes text before splitting it", json.dumps(normalizer))
    # llama.cpp does not compose accents; text that comes decomposed is rare and gets other ids.
    parts = pre["pretokenizers"] if pre is not None and pre["type"] == "Sequence" else [pre]
    found = [_essential(part) for part in parts if part is not None]
    whole_words = bool(definition["model"].get("ignore_merges"))
    for known, splitting in SPLITTINGS.items():
        if found == splitting.pre_tokenizers and whole_words == splitting.whole_words:
            return known
    raise _refusal(
        name, f"it splits text in a way that is none of {', '.join(SPLITTINGS)}", json.dumps(found)
    )


def _essential(part: dict[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer without what does not change ids."""
    return {key: value for key, value in part.items() if key != "trim_offsets"}


def _scores(tokens: list[str], merges: list[tuple[str, ...]], name: str) -> list[float]:
    """Scores under which SentencePiece merges as the list of merges says: earlier first.

    SentencePiece ranks results and BPE ranks pairs; both agree if all pairs of one result stand together.
    """
    scores = [0.0] * len(tokens)
    place = {token: token_id for token_id, token in enumerate(tokens)}
    ranked: set[str] = set()
    previous = ""
    for merge in merges:
        result = "".join(merge)
        if result == previous:
            continue
        if result in ranked:
            raise _refusal(name, "its merges are not those of a SentencePiece model", " ".join(merge))
        ranked.add(result)
        scores[place[result]] = -float(len(ranked))
        previous = result
    return scores


def _adds_space(definition: dict[str, Any], name: str) -> bool:
    """Whether text gets a space in front, from the two ways in which SentencePiece is written down."""
    normalizer, pre = definition["normalizer"], definition["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if pre is None and normalizer is not None:
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        if steps == [replace]:
            return False
        if steps == [{"type": "Prepend", "prepend": SPACE}, replace]:
            return True
    if normalizer is None and pre is not None and pre["type"] == "Metaspace" and not pre["split"]:
        return pre["prepend_scheme"] != "never"
    raise _refusal(
        name,
        "it prepares text unlike SentencePiece",
        json.dumps({"normalizer": normalizer, "pre_tokenizer": pre}),
    )


def _added_ends(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS in front of a text and EOS behind it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for adds_bos in (False, True):
        for adds_eos in (False, True):
            front = [tokenizer.bos_token_id] if adds_bos else []
            if full == front + plain + ([tokenizer.eos_token_id] if adds_eos else []):
                return adds_bos, adds_eos
    raise _refusal(name, "it adds more to a text than BOS and EOS", f"'a' becomes {full}")


def _refusal(name: str, reason: str, value: str) -> ExportError:
    return ExportError(
        f"{name}: llama.cpp cannot have its tokenizer, since {reason} ({value[:300]}), and wrong token ids "
        "would spoil every answer. Nothing was written. Use the model in transformers: --profile deepseek-v3"
    )
