"""Reports in a browser: readable on every screen, accessible, and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eightfold.report import bench_page, evaluation_page
from eightfold.report.analysis_page import render
from tests.report.samples import small_model
from tests.report.test_measuring_pages import BENCHED, RESULT, measured
from tests.server.browsing import picture

SCREENS: dict[str, dict[str, Any]] = {
    "wide": {"viewport": {"width": 1200, "height": 900}},
    "dark": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 400, "height": 800}},
    "phone-dark": {"viewport": {"width": 320, "height": 640}, "color_scheme": "dark"},
}
PAGES = {
    "analysis": lambda: render(small_model()),
    "deep": lambda: render(small_model(layers=94, is_chosen=False)),
    "eval": lambda: evaluation_page.render(measured()),
    "bench": lambda: bench_page.render(RESULT, BENCHED, "m", "W8A8"),
}


@pytest.fixture(scope="module", params=PAGES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / f"{request.param}.html"
    path.write_text(PAGES[request.param](), encoding="utf-8")
    return path


@pytest.mark.parametrize("screen", SCREENS)
def test_a_page_fits_the_screen_asks_for_nothing_and_is_accessible(browser, written, screen):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    context = browser.new_context(**SCREENS[screen], bypass_csp=True)  # for the script of axe
    page, asked, said = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(written.as_uri())
    width = SCREENS[screen]["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        page.evaluate("Math.max(...[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().right))")
        <= width
    )
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found] == []
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = false; })")
    page.set_viewport_size({"width": width, "height": page.evaluate("document.documentElement.scrollHeight")})
    picture(page, f"report-{written.stem}-{screen}")
    context.close()
    assert (asked, said) == ([written.as_uri()], [])


def test_a_page_runs_and_loads_nothing_even_where_it_is_told_to(browser, written):
    """The policy in the page, beside that there is nothing of the kind in it."""
    html = written.read_text("utf-8").replace(
        "<main>", "<main><script>document.title = 'run'</script><img src='x.png'>"
    )
    path = written.with_name("changed.html")
    path.write_text(html, encoding="utf-8")
    page = browser.new_page()
    asked: list[str] = []
    page.on("requestfinished", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert page.title() != "run"
    assert asked == [path.as_uri()]
    page.close()
