"""One HTML page from the results of a folder: what is there is shown, what is not is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from care_mla import __version__
from care_mla.errors import OptionError
from care_mla.report import figures
from care_mla.report.drawing import inline
from care_mla.report.read import Result, Results, read_results
from care_mla.workspace import write_text

PAGE = "report.html"
# By which a page of ours is known, so that no other is overwritten.
GENERATOR = '<meta name="generator" content="care report">'


@dataclass(frozen=True)
class Table:
    """A table with its first row as its head."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on what is seen, and tables and figures (SVG) below it."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it to be shown."""
        return not (self.tables or self.pictures or self.blocks)


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html from the JSON in FOLDER; returns its path.

    Raises:
        OptionError: there is nothing to report, or a page that is not ours has its name.
    """
    results = read_results(folder)
    path = folder / PAGE
    if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace"):
        raise OptionError(
            f"{path} was not written by care report, and nothing in it was touched. Move it away."
        )
    write_text(path, page(results))
    return path


def page(results: Results) -> str:
    """The whole page. A function of the results, and of the converted folders that they name."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("care_mla.report") / "page.html.jinja").read_text("utf-8"))
    sections = [
        evaluated(results.of("evaluate")),
        *[conversion(result) for result in results.of("convert")],
        compared(results.of("compare")),
        healed(results.of("heal")),
        searched(results.of("evaluate")),
        provenance(results),
    ]
    return template.render(
        generator=GENERATOR,
        title=f"care: {results.folder.absolute().name}",
        verdicts=verdicts(results),
        sections=[section for section in sections if not section.is_empty],
        version=__version__,
    )


def verdicts(results: Results) -> list[tuple[bool, str]]:
    """The lines at the top: whether all is well, and what was done."""
    lines = []
    for result in results.of("convert"):
        body = result.body
        before, after = body["cached_values"]["original"], body["cached_values"]["converted"]
        text = (
            f"{body['output']}: {number(after)} of {number(before)} cached values per token and layer "
            f"({1 - after / before:.0%} saved), by {body['method']} in the {body['form']} form."
        )
        if body.get("held_out_kl") is not None:
            text += f" It costs {body['held_out_kl']:.3g} nats per token on held-out text."
        if body.get("needs_healing"):
            text += " It needs healing before use."
        lines.append((True, text))
        lines += _verified(body.get("verify"), str(body["output"]))
    for result in results.of("heal"):
        held_out = result.body["held_out"]
        change = f"from {held_out['before']:.3g} to {held_out['after']:.3g} nats per token"
        lines.append((True, f"{result.body['output']}: healed {change}."))
        lines += _verified(result.body.get("verify"), str(result.body["output"]))
    for result in results.of("verify"):
        lines += _verified(result.body, str(result.body.get("model", result.name)))
    return lines


def _verified(body: Mapping[str, Any] | None, name: str) -> list[tuple[bool, str]]:
    if not body:
        return []
    said = (
        f"{name} in {body['engine']}: relative error {body['relative_error']:.1e} against the stored "
        f"reference, greedy text {'equal' if body['greedy_equal'] else 'different'}."
    )
    return [(bool(body["passed"]), f"{'Passed' if body['passed'] else 'Failed'}: {said}")]


def evaluated(found: list[Result]) -> Section:
    """The models of `care evaluate` beside each other, a column each."""
    tables = []
    for result in found:
        models = result.body["models"]
        rows = [
            ["cached values per token and layer", *[number(model["cached_values"]) for model in models]],
            ["cache, bytes per token", *[f"{model['cache_bytes_per_token']:,}" for model in models]],
        ]
        for stem, text in models[0]["perplexity"].items():
            label = f"perplexity, {stem}, blocks of {text['block']:,}"
            rows.append([label, *[number(model["perplexity"][stem]["value"]) for model in models]])
            for key, label in (
                ("kl", "KL(original || model), nats"),
                ("top1_agreement", "same likeliest token"),
            ):
                found_here = [model["perplexity"][stem].get(key) for model in models]
                if any(value is not None for value in found_here):
                    shown = ["" if value is None else f"{value:.3g}" for value in found_here]
                    rows.append([f"{label}, {stem}", *shown])
        for task in models[0].get("tasks") or {}:
            for metric in ("acc", "acc_norm"):
                scores = [model["tasks"][task].get(metric) for model in models]
                if any(score is not None for score in scores):
                    shown = ["" if score is None else f"{score:.1%}" for score in scores]
                    rows.append([f"{task}, {metric}", *shown])
        tables.append(Table(["", *[short(model["model"]) for model in models]], rows))
    return Section("Before and after", "Measured in one run, the original first.", tables)


def conversion(result: Result) -> Section:
    """What a conversion did in each layer."""
    layers = result.body["layers"]
    drawn = [
        figures.layer_errors(layers), figures.rank_profile(layers), figures.spectra(layers),
        figures.rotation(layers), figures.matching(layers),
    ]  # fmt: skip
    text = (
        "What the factors of each layer lose by the method's own measure; the singular values and where "
        "they are cut; and how much of its rotation each layer's attention really sees: where gamma is 1, "
        "RoPE can go without loss."
    )
    return Section(f"Layer by layer: {result.name}", text, pictures=[svg for svg in drawn if svg])


def compared(found: list[Result]) -> Section:
    """Methods at equal caches: the picture over all budgets, and a table for each run."""
    tables = []
    for result in found:
        body = result.body
        rows = [
            [
                "original",
                "",
                number(body["original"]["cached_values"]),
                number(body["original"]["perplexity"]),
                "",
            ]
        ]
        for row in sorted(body["rows"], key=lambda row: (row["cached_values"], row["perplexity"])):
            kl = "" if row.get("kl") is None else f"{row['kl']:.3g}"
            cells = [row["method"], row["form"], number(row["cached_values"]), number(row["perplexity"]), kl]
            rows.append(cells)
        tables.append(Table([result.name, "form", "cached values", "perplexity", "KL"], rows))
    picture = figures.pareto([result.body for result in found])
    text = "One calibration, damping and precision for all; lower and further left is better."
    return Section("Methods at an equal cache", text, tables, [picture] if picture else [])


def healed(found: list[Result]) -> Section:
    """The learning curve of each healing."""
    from care_mla.heal.curves import healing_figure

    pictures, rows = [], []
    for result in found:
        body = result.body
        history = {
            "losses": body["steps"],
            "measurements": body["measurements"],
            "tokens_per_step": body["tokens_per_step"],
        }
        pictures.append(
            inline(healing_figure({"": history}, show_losses=True), f"Learning curve: {result.name}")
        )
        held_out = body["held_out"]
        rows.append(
            [
                short(body["output"]),
                f"{held_out['before']:.4g}",
                f"{held_out['after']:.4g}",
                f"{len(body['steps']):,}",
            ]
        )
    tables = [Table(["", "held-out KL before", "after", "steps"], rows)] if rows else []
    return Section("Healing", "Distilled from the original; the best measurement was kept.", tables, pictures)


def searched(found: list[Result]) -> Section:
    """Needles found, a map for each model."""
    pictures = []
    for result in found:
        for model in result.body["models"]:
            for kind in ("needle", "passkey"):
                if model.get(kind):
                    pictures.append(figures.needle(f"{short(model['model'])}, {kind}", model[kind]))
    return Section(
        "Numbers hidden in long text", "The share that each model repeats exactly.", pictures=pictures
    )


def provenance(results: Results) -> Section:
    """Recipes, versions and hashes."""
    from care_mla.export.card import CARD
    from care_mla.workspace import read_json

    blocks, rows = [], []
    for result in results.of("convert"):
        output = next(
            (path for path in _places(results.folder, result.body["output"]) if path.is_dir()), None
        )
        if output is None:
            continue
        if (recipe := output / "recipe.yaml").is_file():
            blocks.append(recipe.read_text(encoding="utf-8").strip())
        if (output / CARD).is_file():
            prints = read_json(output / CARD)["fingerprints"]
            rows += [[f"{short(output)}: {name}", value] for name, value in prints.items()]
    said = {name: value for result in results.found for name, value in result.body["versions"].items()}
    rows += [[name, value or "not installed"] for name, value in said.items()]
    files_read = ", ".join(f"{result.name}.json" for result in results.found)
    return Section("Where it comes from", f"Read: {files_read}.", [Table(["", ""], rows)], blocks=blocks)


def _places(folder: Path, output: str) -> Iterable[Path]:
    """Where a folder that a result names may be: from here, or beside the result."""
    return (Path(output), folder / output, folder / Path(output).name)


def short(name: object) -> str:
    """The last part of a path or a hub id."""
    return Path(str(name)).name or str(name)


def number(value: float) -> str:
    """Whole numbers and large ones with separators, others with four digits."""
    return f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:.4g}"
