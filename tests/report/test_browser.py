"""The page in a browser: it draws, obeys, asks for nothing, and fits a phone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedkit.report.page import write_page
from tests.helpers.browser import Page, browser_page, find_browser
from tests.helpers.runs import cluster_lines, write_lines, write_run

BROWSER = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: see .ci/browser"),
]
SHOWN = "(part => part.checkVisibility() && part.getClientRects().length > 0)"
DRAWN = f"""[...document.querySelectorAll("svg[role=img] :is(path, circle, rect)")].filter({SHOWN})
    .map(part => part.getBBox()).map(box => Math.max(box.width, box.height))"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
TEXTS = "h1, h2, h3, p, td, th, li, summary, caption, text:not(.inside)"
CONTRAST = f"""(() => {{
  const light = colour => {{
    const [r, g, b] = colour.match(/[0-9.]+/g).map(v => v / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  }};
  const behind = part => {{
    const fill = getComputedStyle(part).backgroundColor;
    return fill === "rgba(0, 0, 0, 0)" ? behind(part.parentElement) : light(fill);
  }};
  const contrast = part => {{
    const style = getComputedStyle(part), ink = light(part.tagName === "text" ? style.fill : style.color);
    const [low, high] = [ink, behind(part)].sort((a, b) => a - b);
    return (high + .05) / (low + .05);
  }};
  return Math.min(...[...document.querySelectorAll("{TEXTS}")].filter({SHOWN}).map(contrast));
}})()"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    assert BROWSER is not None
    with browser_page(BROWSER) as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    arms = write_run(folder / "run", ["tac", "aquila", "fedavg"], seeds=3, rounds=12, status="interrupted")
    write_lines(arms[0] / "clusters.jsonl", cluster_lines(12, ["0", "1", "10", "2"]))
    write_page([folder / "run"], folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_draws_without_errors_readably_and_within_the_screen(
    page: Page, report: Path, width: int, dark: bool
) -> None:
    page.open(report, width=width, dark=dark)
    sizes = page.value(DRAWN)
    assert len(sizes) > 500
    assert min(sizes) > 0
    assert page.value(OVERFLOW) <= 0
    assert page.value(CONTRAST) >= 4.5, "of text, as WCAG AA asks for"
    assert page.complaints == []
    assert {url for url in page.requests if not url.startswith("data:")} == {report.as_uri()}
    folder = Path(os.environ.get("FEDKIT_PICTURES", report.parent))
    picture = page.picture(folder / f"report-{width}-{'dark' if dark else 'light'}.png")
    assert picture.stat().st_size > 20_000


def test_the_slider_goes_through_the_rounds_also_by_keyboard(page: Page, report: Path) -> None:
    page.open(report)
    frames = f"[...document.querySelectorAll('.map g[data-caption]')].filter({SHOWN})"
    shown = f"{frames}.map(frame => frame.dataset.caption)"
    assert page.value(shown) == ["round 12  ARI 1.00  purity 1.00"]
    first = f"{frames}[0].querySelector('g').getAttribute('transform')"
    before = page.value(first)
    page.value("document.querySelector('input[type=range]').focus()")
    page.press("ArrowLeft")
    assert page.value(shown) == ["round 11  ARI 1.00  purity 1.00"]
    page.press("Home")
    assert page.value(shown) == ["round 1  ARI 0.50  purity 0.75"]
    assert page.value("document.querySelector('output').textContent") == "round 1  ARI 0.50  purity 0.75"
    assert page.value(first) != before
    assert page.complaints == []


def test_a_strategy_can_be_hidden(page: Page, report: Path) -> None:
    page.open(report)
    visible = f"[...document.querySelectorAll('[data-series=\"1\"]')].filter({SHOWN}).length"
    assert page.value(visible) > 5
    page.value("document.querySelector('input[data-toggle=\"1\"]').click()")
    assert page.value(visible) == 0
    page.value("document.querySelector('input[data-toggle=\"1\"]').click()")
    assert page.value(visible) > 5


def test_it_prints_with_its_sections_unfolded(page: Page, report: Path) -> None:
    page.open(report)
    folded = "document.querySelectorAll('section > details:not([open])').length"
    before = page.value(folded)
    assert before > 0
    page.value("dispatchEvent(new Event('beforeprint'))")
    assert page.value(folded) == 0
    page.value("dispatchEvent(new Event('afterprint'))")
    assert page.value(folded) == before
    assert len(page.call("Page.printToPDF", printBackground=True)["data"]) > 20_000
