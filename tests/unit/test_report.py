"""The report: what each figure shows, which sections the page has, and what it says."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from care_mla.heal.curves import healing_figure
from care_mla.report import figures
from care_mla.report.page import page, write_report
from care_mla.report.read import Result, read_results
from care_mla.report.tables import before_after, candidates, choices, methods, number
from care_mla.report.verdict import verdicts
from report_cases import (
    BODIES,
    comparison,
    conversion,
    evaluated,
    evaluation,
    folder_with,
    healing,
    write_result,
    write_results,
)

VOID = {"meta", "link", "br", "hr", "img", "input", "col"}


class Checker(HTMLParser):
    """Follows a page's elements; fails where one is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [values[name] or "" for name in ("href", "src", "xlink:href") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def result(command: str, body: dict[str, Any]) -> Result:
    return Result(path=Path(f"{command}.json"), command=command, body=body)


# Figures: data in, labels and values in the text of the SVG.


def test_pareto_names_every_method_with_its_mean_and_the_original() -> None:
    rows = [*comparison()["rows"], *comparison(scale=1.2)["rows"], *comparison(96, scale=2)["rows"]]
    svg = figures.pareto("p", [row for row in rows if row["form"] == "decoupled"], comparison()["original"])
    assert {"fisher 42.57", "transmla 76.56", "original 29.19", "96", "192", "perplexity"} <= set(texts(svg))
    assert not any("svd" in text for text in texts(svg))


def test_methods_far_above_are_named_and_do_not_press_the_others_together(tmp_path: Path) -> None:
    original = comparison()["original"]
    rows = [row for row in comparison()["rows"] if row["form"] == "exact-rope"]
    rows.append(rows[0] | {"method": "broken", "perplexity": math.inf})
    shown = texts(figures.pareto("p", rows, original))
    assert {"svd 30,731 ↑", "broken ∞ ↑", "fisher 31.6", "50"} <= set(shown)
    assert "10,000" not in shown
    assert methods(rows, original).rows[-1][3:5] == ["∞", "∞"]
    # All of a form above: no picture, and the page says so.
    rows = [row | {"form": "partial-rope"} for row in rows if row["method"] == "svd"] + comparison()["rows"]
    write_result(tmp_path / "compare.json", "compare", comparison() | {"rows": rows})
    html = write_report(tmp_path).read_text()
    assert "All perplexities of form partial-rope are above 350" in html
    assert "Form partial-rope" not in html
    assert "Form exact-rope" in html


def test_a_method_has_one_style_and_one_scale_in_all_pictures() -> None:
    original, rows = comparison()["original"], comparison()["rows"]
    both = [figures.pareto("p", [r for r in rows if r["form"] == form], original, rows)
            for form in ("decoupled", "exact-rope")]  # fmt: skip
    ticks = [[text for text in texts(svg) if re.fullmatch(r"[\d,]+", text)] for svg in both]
    assert ticks[0] == ticks[1]
    assert all("var(--series-1)" in svg for svg in both)  # fisher, the first of all


def test_layer_figures_show_the_worst_layer_the_ranks_and_the_scale() -> None:
    layers = result("convert", conversion()).layers
    assert {"4 %", "layer"} <= set(texts(figures.layer_errors("e", layers)))
    assert "K and V together" in texts(figures.rank_profile("r", layers))
    assert {"layer 0", "layer 3"} <= set(texts(figures.spectra("s", layers)))
    assert {"0.1 %", "100 %"} <= set(texts(figures.error_by_rank("t", layers)))
    assert {"before", "after", "0.1"} <= set(texts(figures.match_errors("m", layers)))


def test_separate_latents_have_a_rank_profile_of_each() -> None:
    layers = result("convert", conversion(separate=True)).layers
    assert {"K", "V"} <= set(texts(figures.rank_profile("r", layers)))
    assert [len(spectrum) for spectrum in layers[0].spectra] == [16, 16]


def test_a_heat_map_writes_its_values_where_asked() -> None:
    options = {"across": "depth", "down": "tokens", "scale": "found", "ticks_down": ["1,024", "2,048"]}
    shown = texts(figures.heat_map("h", [[1.0, 0.25], [0.0, 0.5]], values=True, **options))
    assert {"100", "25", "0", "50", "1,024", "2,048", "depth", "tokens", "found"} <= set(shown)
    assert "25" not in texts(figures.heat_map("h", [[1.0, 0.25], [0.0, 0.5]], **options))


def test_curves_by_position_and_of_learning() -> None:
    rows = {model["model"]: model["perplexity"]["text"]["by_position"] for model in evaluation()["models"]}
    assert set(rows) <= set(texts(figures.by_position("b", rows)))
    assert {"held-out text", "text trained on"} <= set(texts(figures.learning_curve("l", healing())))


def test_a_figure_needs_nothing_outside_the_page_and_takes_its_colours() -> None:
    raw = healing_figure({"": {**healing(), "losses": healing()["steps"]}})
    svg = figures.inline("x", raw)
    assert "http" in raw
    assert "http" not in svg
    assert "DejaVu" not in svg
    assert {"--ink", "--sans", "--series-1"} <= set(re.findall(r"var\((--[a-z0-9-]+)\)", svg))
    assert set(re.findall(r'id="([^"]+?)-', svg)) == {"x"}
    assert not re.search(r"#[0-9a-f]{6}", figures.spectra("s", result("convert", conversion()).layers))


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    results = read_results(folder_with(tmp_path, "convert"))
    assert page(results) == page(results)


# The page.


def test_the_page_is_whole_and_leans_on_nothing(tmp_path: Path) -> None:
    write_results(tmp_path)
    html = write_report(tmp_path).read_text()
    checker = checked(html)
    assert len(checker.ids) == len(set(checker.ids))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in checker.links)
    assert not re.search("https?:|<script|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", html))
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    # What a model says is text, not markup.
    assert "What is &lt;gravity&gt;?" in html
    assert "<p>A <u>pull &amp; a law.</u></p>" in html
    assert checker.headings == [
        "Before and after",
        "Needle in a haystack",
        "Perplexity by position",
        "Conversion",
        "Answers side by side",
        "Perplexity against cached values",
        "Layers",
        "Rotary position embedding",
        "Block matching",
        "Healing",
        "care bench: bench.json",
        "care inspect: inspect.json",
        "Recipe, versions, hashes",
    ]
    assert "f4ab20b994bd07a3" in html
    assert "budget: 0.5" in html


@pytest.mark.parametrize("command", BODIES)
def test_every_result_alone_makes_a_page(tmp_path: Path, command: str) -> None:
    html = write_report(folder_with(tmp_path, command)).read_text()
    checker = checked(html)
    assert ("Healing" in checker.headings) == (command == "heal")
    assert ("Layers" in checker.headings) == (command == "convert")
    assert ("Perplexity against cached values" in checker.headings) == (command == "compare")
    assert checker.headings[-1] == "Recipe, versions, hashes"


def test_what_a_conversion_does_not_tell_is_left_out(tmp_path: Path) -> None:
    """As files of before have it: neither model nor recipe, no share of RoPE by head, no block matching."""
    body = {
        key: value for key, value in conversion().items() if key not in ("model", "recipe", "fingerprints")
    }
    body["match"] = None
    for row in body["layers"]:
        del row["rope_kept"], row["match"]
    write_result(tmp_path / "convert.json", "convert", body)
    html = write_report(tmp_path).read_text()
    assert "Singular spectra" in html
    assert not {"Block matching"} & set(checked(html).headings)
    assert "RoPE that each head keeps" not in html
    assert "Recipe: " not in html


def test_the_verdict_says_what_was_saved_what_it_cost_and_whether_it_passed(tmp_path: Path) -> None:
    (verdict,) = verdicts(read_results(folder_with(tmp_path, "convert", "evaluate")))
    assert verdict.title == "models/original at 50\u00a0% of its KV cache"
    assert "caches 192 values per token and layer in place of 384" in verdict.sentence
    assert "perplexity goes from 14.27 to 16.92 (+18.6\u00a0%)" in verdict.sentence
    assert "passed its check" in verdict.sentence
    assert [(value, mood) for value, _, mood in verdict.tiles] == [
        ("50\u00a0%", ""), ("+18.6\u00a0%", ""), ("0.193", ""), ("passed", "good"),
    ]  # fmt: skip
    failed = conversion() | {"verify": {**conversion()["verify"], "passed": False}}
    write_result(tmp_path / "convert.json", "convert", failed)
    (verdict,) = verdicts(read_results(tmp_path))
    assert "FAILED" in verdict.sentence
    assert verdict.tiles[-1][0::2] == ("failed", "bad")


def test_a_verdict_says_no_more_than_was_measured(tmp_path: Path) -> None:
    """Without a choice convert measures no divergence; and another model's perplexity is not this one's."""
    body = conversion() | {"held_out_kl": None, "candidates": []}
    write_result(tmp_path / "convert.json", "convert", body)
    other = evaluation()
    other["models"][1]["model"] = "somewhere/else"
    write_result(tmp_path / "evaluate.json", "evaluate", other)
    (verdict,) = verdicts(read_results(tmp_path))
    assert "KL to the original is 0.265 nats per token of its check" in verdict.sentence
    assert [tile[0] for tile in verdict.tiles] == ["50\u00a0%", "0.265", "passed"]
    write_result(tmp_path / "convert.json", "convert", body | {"verify": None})
    (verdict,) = verdicts(read_results(tmp_path))
    assert "what that costs was not measured. It was not checked." in verdict.sentence
    assert [tile[0] for tile in verdict.tiles] == ["50\u00a0%", "not checked"]


def test_models_stand_side_by_side_with_what_changed() -> None:
    table = before_after(result("evaluate", evaluation()))
    assert table.columns == ["", "original", "model", "change"]
    rows = {row[0]: [cell.replace("\u00a0", " ") for cell in row[1:]] for row in table.rows}
    assert rows["cached values per token and layer"] == ["384", "192", "−50.0 %"]
    perplexity = rows["text: perplexity (4,088 tokens in blocks of 512)"]
    assert perplexity == ["14.27", "16.92", "+18.6 ± 1.2 %"]  # 0.01 nats of 1.186
    assert rows["arc_easy: acc (100 items, guessing 0.25)"] == [
        "0.550 ± 0.040", "0.550 ± 0.040", "−0.060 ± 0.034",
    ]  # fmt: skip
    assert rows["text: KL to the original, nats per token"] == ["–", "0.210 ± 0.010", "–"]
    assert rows["needle: share found"] == ["0.62 ± 0.10", "0.62 ± 0.10", "0"]
    assert rows["decode, tokens per second"] == ["21.25", "21.25", "+0.0 %"]
    three = before_after(result("evaluate", {"models": [*evaluation()["models"], evaluated("x", 96, 20)]}))
    assert three.columns == ["", "original", "model", "change", "x", "change"]
    assert {len(row) for row in three.rows} == {6}


def test_methods_are_in_order_and_numbers_are_readable() -> None:
    both = [*comparison()["rows"], *comparison(scale=1.1)["rows"]]
    names = [row[:2] for row in methods(both, comparison()["original"]).rows]
    assert names[0][0] == "original"
    assert [row[0] for row in names[1:]] == ["fisher", "fisher", "transmla", "svd"]
    values = (None, True, 1234, 0.123456, 30731.4, [1, 3], math.inf, math.nan)
    assert [number(value) for value in values] == [
        "–", "yes", "1,234", "0.1235", "30,731", "1 to 3", "∞", "NaN",
    ]  # fmt: skip


def test_a_conversion_tells_what_it_chose_among_and_what_loads_it() -> None:
    converted = result("convert", conversion())
    table = candidates(converted)
    assert table is not None
    assert [row[1:] for row in table.rows] == [["0.1926", "yes"], ["0.25", "no"]]
    assert candidates(result("convert", conversion() | {"candidates": []})) is None
    rows = {row[0]: row[1] for row in choices(converted).rows}
    assert rows["loads in"] == "transformers, llama.cpp"
    assert rows["not in vllm"] == "tied embeddings"


def test_warnings_come_first_and_once(tmp_path: Path) -> None:
    for name in ("convert", "compare"):
        write_result(tmp_path / f"{name}.json", name, BODIES[name] | {"warnings": ["few <tokens>"]})
    html = write_report(tmp_path).read_text()
    assert checked(html).headings[0] == "Warnings"
    assert html.count("few &lt;tokens&gt;") == 1
    assert "compare.json, convert.json" in html


def test_results_of_one_command_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_result(tmp_path / f"{name}.json", "evaluate", evaluation())
        write_result(tmp_path / f"{name}-convert.json", "convert", conversion())
    headings = checked(write_report(tmp_path).read_text()).headings
    assert len(headings) == len(set(headings))
    assert {"Before and after (a)", "Needle in a haystack (b)", "Layers (a-convert)"} <= set(headings)


def test_answers_are_underlined_from_where_they_part(tmp_path: Path) -> None:
    texts = ["One two\nthree.", "One two\nfour.", "One two", "One two\nthree. More"]
    models = [{"model": str(i), "text": text} for i, text in enumerate(texts)]
    write_result(tmp_path / "g.json", "generate", {"prompt": "?", "models": models})
    html = write_report(tmp_path).read_text()
    shown = re.findall(r"<blockquote><h3>.*</h3><p>([^§]*?)</p></blockquote>", html)
    assert shown == [
        "One two\nthree.", "One two\n<u>four.</u>", "One two", "One two\nthree. <u>More</u>",
    ]  # fmt: skip
    assert "Underlined" in html
