"""The report in a browser: it shows what it should, hovering and choosing work, and nothing is complained of."""

from __future__ import annotations

import shutil

import pytest
from helpers import TINY, write_source
from report_runs import write_run

from uoe_jax import cli

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "no Chromium: apt install chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"]
        )  # as root it has none
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """file -> its page, drawn, without a network; what it complains of and what it asks for fails the test."""
    said = []
    context = browser.new_context(viewport={"width": 1480, "height": 1000}, offline=True)

    def open_(file):
        page = context.new_page()
        page.on(
            "console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else said.append(r.url),
        )
        page.goto(f"file://{file}")
        page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        return page

    yield open_
    context.close()
    assert said == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """That of a run of a language model with patches of one token."""
    place = tmp_path_factory.mktemp("page")
    options = [
        f"--config.data.path={write_source(place / 'source')}",
        "--config.train.steps=12",
        "--config.train.report=true",
    ]
    assert cli.main(["train", f"--config={TINY}", *options, f"--workdir={place / 'run'}"]) == 0
    return place / "run" / "report.html"


def pixels(page):
    """For every canvas, also those inside Bokeh's shadow roots, how many colours it shows."""
    return page.evaluate(
        """() => {
          const all = [], walk = (root) => {
            for (const e of root.querySelectorAll("*")) { if (e.tagName === "CANVAS") all.push(e); if (e.shadowRoot) walk(e.shadowRoot); }
          };
          walk(document);
          return all.filter((c) => c.width && c.height).map((c) => {
            const d = new Uint32Array(c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer);
            return new Set(d).size;
          });
        }"""
    )


def backgrounds(page):
    return page.eval_on_selector_all(".passage span", "spans => spans.map(s => s.style.background)")


def test_the_pictures_are_there(opened, report):
    page = opened(report)
    page.wait_for_timeout(500)
    shown = pixels(page)
    assert len(shown) >= 11 and sum(n > 10 for n in shown) >= 11, (
        shown
    )  # six curves and five of the routing
    assert page.locator(".passage").count() == 2
    assert page.locator("#legend .key").count() == 4
    assert len(set(backgrounds(page)) - {""}) == 4  # every expert is the best of some token


def test_choosing_a_layer_a_block_and_an_expert(opened, report):
    page = opened(report)

    def load():
        return page.evaluate(
            "Bokeh.documents.map(d => d.get_model_by_name('cells')).find(s => s).data.value"
        )

    first, colours = list(load()), backgrounds(page)
    page.select_option("#layer", "1")
    assert list(load()) != first and backgrounds(page) != colours
    second = list(load())
    page.select_option("#block", "uome")
    assert list(load()) != second
    page.select_option("#expert", "2")
    shaded = set(backgrounds(page))
    assert "" in shaded and len(shaded) > 1 and all(c == "" or "31, 119, 180" in c for c in shaded)
    assert page.locator("#layer").input_value() == "1"  # what was chosen stays chosen
    page.select_option("#over", "tokens")
    labels = page.evaluate(
        "Bokeh.documents.flatMap(d => d.roots()).flatMap(r => [...r.references()]).filter(m => m.tags.includes('over')).map(m => m.axis_label)"
    )
    assert labels and set(labels) == {"tokens"}


def test_hovering(opened, report):
    """Over a token: who took it. Over a curve: its values."""
    page = opened(report)
    token = page.locator(".passage span").nth(5)
    token.hover()
    tip = page.locator("#tip")
    assert tip.is_visible() and "patch 5" in tip.inner_text() and "expert" in tip.inner_text()
    page.mouse.move(2, 2)
    figure = page.locator(".bk-Figure").first
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2)
    page.wait_for_selector(".bk-Tooltip", timeout=5_000)
    said = page.locator(".bk-Tooltip").first.evaluate("e => e.shadowRoot.textContent")
    assert "training" in said and "loss" in said


def test_pictures_and_their_squares(opened, tmp_path):
    assert (
        cli.main(
            [
                "train",
                "--config=digits:tiny",
                f"--workdir={tmp_path / 'run'}",
                "--config.train.report=true",
            ]
        )
        == 0
    )
    page = opened(tmp_path / "run" / "report.html")
    page.wait_for_selector(".pictures canvas")
    page.wait_for_timeout(300)
    experts = page.locator("#expert option").count() - 1
    assert page.locator(".pictures").count() == 6 and page.locator(
        ".pictures canvas"
    ).count() == 6 * (experts + 1)
    page.locator(".pictures canvas").nth(1).hover(position={"x": 3, "y": 3})
    assert "square 0, 0" in page.locator("#tip").inner_text()
    page.select_option("#expert", "0")
    page.wait_for_timeout(300)
    assert page.locator(".pictures canvas").count() == 12


def test_20000_logged_steps_of_two_runs(opened, tmp_path):
    """Under 5 MB, and drawn."""
    long = write_run(tmp_path / "long", 20_000, layers=8)
    short = write_run(tmp_path / "short", 300)
    alone, both = tmp_path / "alone.html", tmp_path / "both.html"
    assert cli.main(["report", f"--workdir={long}", f"--out={alone}"]) == 0
    assert cli.main(["report", f"--workdir={long}", f"--workdir={short}", f"--out={both}"]) == 0
    for file in (alone, both):
        assert file.stat().st_size < 5_000_000
    page = opened(both)
    page.wait_for_timeout(500)
    assert sum(n > 10 for n in pixels(page)) >= 11
    page.select_option("#run", "1")
    assert page.locator("#layer option").count() == 2
    assert "no checkpoints" in page.locator("#why").inner_text()


def test_words_and_names_that_look_like_the_pages_own(opened, tmp_path):
    """They are shown as they are, and swallow no script."""
    odd, source = ["<!--", "<script>", "</script>"], tmp_path / "text"
    source.mkdir()
    for i in range(300):
        (source / f"{i}.txt").write_text(" ".join([*odd, str(i % 7), *odd]), encoding="utf-8")
    run = tmp_path / "<!--<script>&amp;"
    data = ["data.source=text", f"data.path={source}", "data.tokenizer=words", "data.held_out=10"]
    options = [f"--config.{one}" for one in (*data, "train.steps=3", "train.report=true")]
    assert cli.main(["train", f"--config={TINY}", *options, f"--workdir={run}"]) == 0
    other = write_run(tmp_path / "</script><b>", 20)
    both = tmp_path / "both.html"
    assert cli.main(["report", f"--workdir={run}", f"--workdir={other}", f"--out={both}"]) == 0
    for file in (run / "report.html", both):
        page = opened(file)
        assert "<!--<script></script>" in page.locator(".passage").first.inner_text()
        assert page.locator("h1").inner_text().startswith(run.name)
        assert page.locator("h1 *").count() == 0
    assert page.locator("#run option").all_inner_texts() == [run.name, other.name]
