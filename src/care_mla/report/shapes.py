"""What the page needs of each command's JSON; a file that lacks it is refused by the place of the fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# A shape is a type; a mapping of keys to shapes, where `key?` may be absent or null; {"*": shape}, any keys;
# [shape], a list of one or more; (shape,), a list that may be empty; POSITIVE, a number above zero, or NaN;
# or None, anything at all.
NUMBER = float
POSITIVE = "positive"
VERIFY = {"engine": str, "relative_error": NUMBER, "passed": bool}
BEFORE_AFTER = {"before": NUMBER, "after": NUMBER}
PAIRED = {"value?": NUMBER, "stderr?": NUMBER}
LAYER = {
    "ranks": [NUMBER],
    "predicted_error": NUMBER,
    "spectrum": [None],
    "gamma": [NUMBER],
    "rope_kept?": (NUMBER,),
    "match?": {"error_before": NUMBER, "error_after": NUMBER},
}
TEXT = {
    "value": POSITIVE,
    "tokens": NUMBER,
    "block": NUMBER,
    "kl?": NUMBER,
    "kl_stderr?": NUMBER,
    "top1_agreement?": NUMBER,
    "top1_agreement_stderr?": NUMBER,
    "difference?": {"nll_stderr?": NUMBER},
    "by_position?": ({"start": NUMBER, "end": NUMBER, "value": NUMBER},),
    "word_level?": {"word_perplexity": NUMBER},
}
TASK = {
    "items": NUMBER,
    "chance?": NUMBER,
    "acc?": NUMBER,
    "acc_stderr?": NUMBER,
    "acc_norm?": NUMBER,
    "acc_norm_stderr?": NUMBER,
    "difference?": {"acc?": PAIRED, "acc_norm?": PAIRED},
}
SEARCH = {
    "lengths": [NUMBER],
    "depths": [NUMBER],
    "score": [[NUMBER]],
    "mean?": NUMBER,
    "mean_stderr?": NUMBER,
    "difference?": PAIRED,
}
ANY_RESULT: dict[str, Any] = {
    "versions?": {"*": None},
    "seconds?": NUMBER,
    "warnings?": (str,),
    "verify?": VERIFY,
}
SHAPES: dict[str, dict[str, Any]] = {
    "convert": {
        "model?": str,
        "cached_values": {"original": POSITIVE, "converted": POSITIVE},
        "kv_lora_rank": None,
        "qk_rope_head_dim": None,
        "form": str,
        "output": str,
        "layers": [LAYER],
        "verify?": VERIFY | {"kl_to_original?": NUMBER},
        "held_out_kl?": NUMBER,
        "candidates?": ({"candidate": str, "kl": NUMBER, "chosen": bool},),
        "match?": {"held_out_kl?": BEFORE_AFTER},
        "engines?": {"*": None},
        "needs_healing?": (str,),
        "stages?": {"*": NUMBER},
        "peak_memory_bytes?": NUMBER,
        "recipe?": str,
        "fingerprints?": {"*": str},
    },
    "compare": {
        "original": {"perplexity": POSITIVE, "cached_values": POSITIVE},
        "rows": [
            {"method": str, "form": str, "cached_values": POSITIVE, "perplexity": POSITIVE, "kl?": NUMBER}
        ],
        "text": {"name": str, "tokens": NUMBER, "block": NUMBER},
    },
    "evaluate": {
        "models": [
            {
                "model": str,
                "cached_values": NUMBER,
                "cache_bytes_per_token": NUMBER,
                "perplexity": {"*": TEXT},
                "tasks?": {"*": TASK},
                "needle?": SEARCH,
                "passkey?": SEARCH,
                "speed?": {"prefill_tokens_per_second?": NUMBER, "decode_tokens_per_second?": NUMBER},
            }
        ],
    },
    "heal": {
        "steps": [{"step": NUMBER, "kl": NUMBER}],
        "measurements": [{"step": NUMBER, "kl": NUMBER}],
        "tokens_per_step": NUMBER,
        "held_out": BEFORE_AFTER,
        "held_out_cross_entropy?": BEFORE_AFTER,
    },
    "verify": VERIFY,
    "generate": {"prompt": str, "models": [{"model": str, "text": str}]},
}


def faults(command: str, body: Mapping[str, Any]) -> list[str]:
    """What is wrong with a result's body, by place; empty: nothing that the page would miss."""
    return [*_faults(body, ANY_RESULT | SHAPES.get(command, {}), ""), *_unlike(command, body)]


def _faults(value: Any, shape: Any, place: str) -> Iterator[str]:
    match shape:
        case None:
            return
        case {"*": each}:
            if not isinstance(value, Mapping):
                yield f"{place} is not an object"
                return
            for key, found in value.items():
                yield from _faults(found, each, f"{place}.{key}")
        case Mapping():
            if not isinstance(value, Mapping):
                yield f"{place} is not an object"
                return
            for name, each in shape.items():
                key = name.removesuffix("?")
                inside = f"{place}.{key}".removeprefix(".")
                if value.get(key) is not None:
                    yield from _faults(value[key], each, inside)
                elif key == name and (key not in value or each is not None):
                    yield f"{inside} is missing"
        case list() | tuple():
            if not isinstance(value, list) or (isinstance(shape, list) and not value):
                yield f"{place} is not a list" if not isinstance(value, list) else f"{place} is empty"
                return
            for i, found in enumerate(value):
                yield from _faults(found, shape[0], f"{place}[{i}]")
        case str():
            if not isinstance(value, int | float) or value <= 0:
                yield f"{place} is {value!r:.40}"
        case type():
            expected = (int, float) if shape is NUMBER else shape
            if not isinstance(value, expected):
                yield f"{place} is {value!r:.40}"


def _unlike(command: str, body: Mapping[str, Any]) -> Iterator[str]:
    """Parts that must be alike and are not: layers of a model, texts and tasks of the models of one run."""
    if command == "evaluate" and isinstance(body.get("models"), list):
        for key in ("perplexity", "tasks"):
            models = [model for model in body["models"] if isinstance(model, Mapping)]
            found = [set(of) for model in models if isinstance(of := model.get(key) or {}, Mapping)]
            if any(names != found[0] for names in found):
                yield f"models have different {key}"
    if command == "convert" and isinstance(body.get("layers"), list):
        rows = [row for row in body["layers"] if isinstance(row, Mapping)]
        for key in ("ranks", "gamma"):
            if len({len(row[key]) for row in rows if isinstance(row.get(key), list)}) > 1:
                yield f"layers have different numbers of {key}"
