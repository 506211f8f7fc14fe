"""Tokenizers in GGUF files: llama.cpp gives transformers' ids and chat template, or the export refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from care_mla.errors import ExportError
from care_mla.export import engine_llama_cpp
from care_mla.export.gguf_vocabulary import PROBE, SPACE, SPLITTINGS, read_vocabulary
from care_mla.export.run import export_model
from care_mla.export_config import ExportConfig
from export_cases import export

from pico import CHAT_TEMPLATE, pico_text

SIZE = 700
# Words and numbers that the merges below join, and what no merge knows.
TEXTS = (
    PROBE,
    "",
    " ",
    "a",
    "  two spaces first, three last   ",
    "12 123 1234 12345 1,000,000.00",
    "don't DON'T we'll l'été",
    "line\n\n\n  indented\r\n\ttab",
    "日本語 русский ελληνικά العربية 🙂🙂",
    pico_text(60, seed=3),
)
LOG = engine_llama_cpp.Log()  # llama.cpp calls it as long as the process lives


def corpus() -> list[str]:
    numbers = " ".join(str(n) for n in range(1000, 3000, 7))
    return [pico_text(2000), numbers] + [*TEXTS, "2024 2024 don't we'll it's\n\n  l'été 12345678"] * 30


def byte_level(pre: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits text as `pre` says, with merges that only another splitting would reach."""
    splitting = SPLITTINGS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitting.whole_words))
    parts = []
    for part in splitting.pre_tokenizers:
        if part["type"] == "Split":
            parts.append(pre_tokenizers.Split(Regex(part["pattern"]["Regex"]), "isolated"))
        elif part["type"] == "Digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            use_regex = part["use_regex"]
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex))
    # Trained on words with all that clings to them, so that it shows where a splitting cuts.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 10,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def sentencepiece(*, adds_space: bool = True, is_new: bool = False) -> PreTrainedTokenizerFast:
    """As transformers writes down a SentencePiece model with byte fallback, in either spelling."""
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    training = Tokenizer(models.BPE())
    training.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    training.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=SIZE - len(head), show_progress=False, limit_alphabet=80)
    training.train_from_iterator([pico_text(2000), *TEXTS], trainer)
    trained = training.get_vocab()
    vocabulary = {token: i for i, token in enumerate([*head, *sorted(trained, key=trained.__getitem__)])}
    # All pairs that give a piece, by piece: how transformers turns scores into merges.
    merges = [
        (token[:i], token[i:])
        for token in list(vocabulary)[len(head) :]
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    if is_new:
        scheme = "always" if adds_space else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    else:
        front = [normalizers.Prepend(SPACE)] if adds_space else []
        tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", SPACE)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def llama_cpp_of(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> engine_llama_cpp.Model:
    folder = export(tmp_path, tokenizer=False, vocab=SIZE - 2).folder
    tokenizer.save_pretrained(folder)
    export_model(ExportConfig(model=folder, output=tmp_path / "x.gguf", quiet=True))
    return engine_llama_cpp.Model(tmp_path / "x.gguf", 256, 64)


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_byte_level_tokenizers(pre: str, tmp_path) -> None:
    tokenizer = byte_level(pre)
    model = llama_cpp_of(tokenizer, tmp_path)
    for text in TEXTS:
        assert model.tokenize(text) == tokenizer(text)["input_ids"], text
    assert model.tokenize("a<think>b") == tokenizer("a<think>b")["input_ids"]
    # Every other way of splitting gives other ids here, so a wrong name would not pass.
    for other in SPLITTINGS.keys() - {pre}:
        if {pre, other} != {"llama-bpe", "smaug-bpe"}:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            backend["pre_tokenizer"] = json.loads(byte_level(other).backend_tokenizer.to_str())[
                "pre_tokenizer"
            ]
            wrong = Tokenizer.from_str(json.dumps(backend))
            assert any(wrong.encode(text).ids != tokenizer(text)["input_ids"] for text in TEXTS), other


@pytest.mark.parametrize("adds_space", [True, False])
@pytest.mark.parametrize("is_new", [True, False])
def test_sentencepiece_tokenizers(adds_space: bool, is_new: bool, tmp_path) -> None:
    tokenizer = sentencepiece(adds_space=adds_space, is_new=is_new)
    model = llama_cpp_of(tokenizer, tmp_path)
    for text in TEXTS:
        # llama.cpp puts a space before a space too, as SentencePiece does; the newer spelling does not.
        if not (is_new and adds_space and text.startswith(" ")):
            assert model.tokenize(text) == tokenizer(text)["input_ids"], text
    assert model.tokenize("a")[0] == 1


def test_special_tokens_and_chat(tmp_path) -> None:
    import llama_cpp

    tokenizer = byte_level("smollm")
    model = llama_cpp_of(tokenizer, tmp_path)
    vocabulary = model.vocabulary
    assert llama_cpp.llama_vocab_bos(vocabulary) == tokenizer.bos_token_id
    assert llama_cpp.llama_vocab_eos(vocabulary) == tokenizer.eos_token_id
    assert llama_cpp.llama_vocab_is_eog(vocabulary, tokenizer.eos_token_id)
    assert llama_cpp.llama_vocab_is_control(vocabulary, tokenizer.bos_token_id)
    assert not llama_cpp.llama_vocab_is_control(vocabulary, tokenizer.convert_tokens_to_ids("<think>"))
    assert llama_cpp.llama_vocab_n_tokens(vocabulary) == SIZE
    assert llama_cpp.llama_model_chat_template(model.model, None).decode() == CHAT_TEMPLATE


def changed(change: dict[str, Any], model: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with another definition."""
    definition = json.loads(byte_level("smollm").backend_tokenizer.to_str())
    definition |= change
    definition["model"] |= model
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), bos_token="<|endoftext|>"
    )


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, {}, r"splits text in a way.*smollm.*Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, {}, r"changes text before.*Lowercase"),
        ({}, {"ignore_merges": True}, r"splits text in a way"),
        ({}, {"byte_fallback": True}, r"prepares text unlike SentencePiece|not those of a SentencePiece"),
    ],
)
def test_what_llama_cpp_has_no_name_for(change, model, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read_vocabulary(changed(change, model), "x", SIZE)


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ExportError, match=r"has no row among the embedding's 300"):
        read_vocabulary(byte_level("gpt-2"), "x", 300)


def test_a_composing_normalizer_is_fine() -> None:
    tokenizer = changed({"normalizer": {"type": "NFC"}}, {})
    assert read_vocabulary(tokenizer, "x", SIZE).pre == "smollm"
