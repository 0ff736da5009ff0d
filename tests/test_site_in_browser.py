"""The built site in a browser: no page is wider than its screen, and none asks for anything but its own files."""

from __future__ import annotations

from pathlib import Path

import pytest

SITE = Path(__file__).parent.parent / "build" / "site"  # `make docs` builds it


@pytest.mark.parametrize("width", [320, 768, 1200])
def test_every_page_fits_the_screen_and_asks_for_nothing_from_elsewhere(browser, width):
    pages = [path for path in sorted(SITE.rglob("*.html")) if "assets" not in path.parts]
    if not pages:
        pytest.skip("no site is built, see `make docs`")
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked, wide = set(), []
    page.on("request", lambda request: asked.add(request.url))
    for path in pages:
        page.goto(path.as_uri())
        beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        wide += [f"{path.relative_to(SITE)}: {beyond} px"] * (beyond > 0)
    page.close()
    assert wide == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
