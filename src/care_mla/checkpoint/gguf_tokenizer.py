"""The tokenizer that a GGUF file describes in its metadata, as a transformers object.

transformers' own GGUF route ignores most values of `tokenizer.ggml.pre`, among them `smollm`, which splits
numbers into digits: its token ids differ from those of the training. So it is built here, and works offline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from care_mla.errors import CareError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

# llama.cpp's token types.
CONTROL, USER_DEFINED = 3, 4


class Splitting(NamedTuple):
    """How one value of `tokenizer.ggml.pre` splits text before byte-level BPE, and its switches in llama.cpp.

    `digits` is the longest run of digits in one piece (None: any, as in GPT-2). `whole_words` takes a piece
    that is a token itself without applying merges. `add_bos` holds where the file does not say.
    """

    digits: int | None
    is_gpt2: bool
    whole_words: bool = False
    add_bos: bool = False


SPLITTINGS: dict[str, Splitting] = {
    "gpt-2": Splitting(digits=None, is_gpt2=True),
    "smollm": Splitting(digits=1, is_gpt2=True),
    "llama-bpe": Splitting(digits=3, is_gpt2=False, whole_words=True, add_bos=True),
    "qwen2": Splitting(digits=1, is_gpt2=False),
}


def build_tokenizer(name: str, metadata: Callable[..., Any], max_length: int) -> PreTrainedTokenizerBase:
    """The file's tokenizer: same ids, special tokens, chat template and BOS habit as in llama.cpp.

    Args:
        name: how error messages call the model.
        metadata: value of a key of the file, with an optional default.
        max_length: the model's context.

    Raises:
        CareError: the file has no tokenizer, or one of a kind that is not known exactly.
    """
    kind, pre = metadata("tokenizer.ggml.model"), metadata("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in SPLITTINGS:
        raise CareError(
            f"{name}: its tokenizer (tokenizer.ggml.model {kind!r}, tokenizer.ggml.pre {pre!r}) cannot be "
            f"rebuilt exactly; byte-level BPE is, with pre {', '.join(SPLITTINGS)}. Wrong token ids would "
            "spoil every result. Use the model's safetensors folder, which has its tokenizer."
        )
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata("tokenizer.ggml.tokens")
    tokenizer = _backend(name, tokens, metadata, SPLITTINGS[pre])
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            special[f"{role}_token"] = tokens[token_id]
    if metadata("tokenizer.ggml.add_bos_token", SPLITTINGS[pre].add_bos):
        _prepend(tokenizer, special["bos_token"], tokens.index(special["bos_token"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        chat_template=metadata("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _backend(name: str, tokens: list[str], metadata: Callable[..., Any], splitting: Splitting) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata("tokenizer.ggml.merges", [])]
    unknown = next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocabulary.keys()), None)
    if len(vocabulary) != len(tokens) or unknown:
        raise CareError(
            f"{name}: its tokenizer is inconsistent ({len(tokens) - len(vocabulary)} duplicate tokens, merge "
            f"without tokens: {unknown}). Text would not survive it. Download the file again, or use the "
            "model's safetensors folder."
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.whole_words))
    tokenizer.pre_tokenizer = _pre_tokenizer(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = metadata("tokenizer.ggml.token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _pre_tokenizer(splitting: Splitting) -> PreTokenizer:
    """Pieces within which BPE merges, as bytes."""
    from tokenizers import Regex, pre_tokenizers

    if splitting.is_gpt2:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if splitting.digits is None:
            return words
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    digits = r"\p{N}" if splitting.digits == 1 else rf"\p{{N}}{{1,{splitting.digits}}}"
    # Alternatives in order of preference; the format is fixed by the vocabularies that were trained with it.
    alternatives = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
    split = pre_tokenizers.Split(Regex("|".join(alternatives)), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _prepend(tokenizer: Tokenizer, token: str, token_id: int) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, token_id)]
    )
