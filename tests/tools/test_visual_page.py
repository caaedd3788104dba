"""The page that ``tools/visualize.py`` writes, in a real browser: what it shows is what the data say."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, browse
from PIL import Image
from visattn_tools.attention_page import attention_html, pack, unpack
from visattn_tools.reading import ImageViews
from visattn_tools.views import Grid, TokenMap, View

from visattn.models.dependencyvit import DependencyTree

pytestmark = pytest.mark.xdist_group("browser")

GRID, COARSE = Grid(4, 4, 0.25, 0.25), Grid(2, 2, 0.5, 0.5)
GREY = 0.5
NAME = "a </script><b>photo</b>.png"


def neighbour_view(block: int, grid: Grid, step: int) -> View:
    """Head 1 looks `step` cells ahead with 3/4, at itself and at a class token with 1/8 each; head 2 at all alike."""
    count = grid.rows * grid.columns
    weights = torch.zeros(2, count + 1, count + 1)
    rows = torch.arange(count + 1)
    weights[0, rows, (rows + step) % count] = 0.75
    weights[0, rows, rows] += 0.125
    weights[0, :, count] += 0.125
    weights[1] = 1 / (count + 1)
    if grid == COARSE:
        weights[:, 3] = 0  # a token that was dropped before
    more = ("class token",)
    return View(f"stages.{block}.blocks.0.attn", "attention", weights, grid, grid, more, more, "A note.")


def synthetic(shade: float) -> ImageViews:
    """A grey image with views, a map and a tree that are known."""
    views = [neighbour_view(0, GRID, 1), neighbour_view(1, GRID, 5), neighbour_view(2, COARSE, 1)]
    parents = np.array([-1, 0, 1, 2, *[0] * 12])
    messages = TokenMap("blocks.0.attn", "messages", torch.arange(16.0), GRID, "Numbers.")
    kept = TokenMap("blocks.0.attn", "kept tokens", (torch.arange(16) < 5).float(), GRID)
    tree = DependencyTree(parents, 0, np.zeros((16, 16)), np.arange(16.0), np.arange(16), (4, 4))
    return ImageViews(np.full((64, 64, 3), shade), views, [messages, kept], tree)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    images = [(NAME, synthetic(GREY)), ("second.png", synthetic(0.25))]
    path.write_text(attention_html("a_model", "of a test", images), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    yield from browse()


@pytest.fixture
def browser(window: Browser, page: Path) -> Iterator[Browser]:
    window.requests()
    window.open(page)
    yield window
    assert window.complaints() == []
    asked = window.requests()
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


def hover(browser: Browser, row: float, column: float, rows: int = 4) -> None:
    """Move the mouse to a cell of the grid."""
    from selenium.webdriver import ActionChains

    canvas = browser.driver.find_element("id", "canvas")
    side = canvas.size["width"]
    offset = [round(((place + 0.5) / rows - 0.5) * side) for place in (column, row)]
    ActionChains(browser.driver).move_to_element_with_offset(canvas, *offset).perform()
    browser.settle()


def press(browser: Browser, *keys: str) -> None:
    """Type on the image."""
    from selenium.webdriver.common.keys import Keys

    canvas = browser.driver.find_element("id", "canvas")
    for key in keys:
        canvas.send_keys(getattr(Keys, key, key))
    browser.settle()


def choose(browser: Browser, group: str, number: int) -> None:
    """Click one of a group's choices."""
    browser.driver.find_elements("css selector", f"#{group} label")[number].click()
    browser.settle()


def text(browser: Browser, name: str) -> str:
    return browser.driver.find_element("id", name).text


def top(browser: Browser) -> list[tuple[str, str]]:
    """The strongest places, as listed."""
    items = browser.driver.find_elements("css selector", "#top li")
    return [tuple(part.text for part in item.find_elements("tag name", "span")) for item in items]  # type: ignore[misc]


def pixels(browser: Browser, grid: Grid, canvas: str = "#canvas") -> np.ndarray:
    """Colours (rows * columns, 3) a little off the middle of every cell, away from lines and frames."""
    data = browser.run("return document.querySelector(arguments[0]).toDataURL()", canvas)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")).astype(int)
    y, x = (
        ((np.arange(count) + 0.4) * size / count).astype(int)
        for count, size in zip((grid.rows, grid.columns), picture.shape)
    )
    return picture[y[:, None], x].reshape(-1, 3)


def lit(weights: torch.Tensor, shade: float = GREY) -> np.ndarray:
    """The colours that weights (cells) should have over a grey image: a dark veil, then an orange light."""
    share = ((weights / weights.max()).numpy() ** 0.6)[:, None]
    veiled = round(255 * shade) * (1 - 0.72 * (1 - share))
    return veiled * (1 - 0.42 * share) + np.array([[246, 173, 85]]) * 0.42 * share


def test_hovering_shows_where_a_patch_looks(browser: Browser) -> None:
    view = neighbour_view(0, GRID, 1)
    choose(browser, "layers", 0)
    for row, column in ((0, 0), (1, 2), (3, 3)):
        hover(browser, row, column)
        cell = 4 * row + column
        weights = view.all_heads()[cell]
        assert text(browser, "where") == f"Row {row + 1}, column {column + 1}"
        ahead = (cell + 1) % 16
        assert top(browser)[0] == (f"row {ahead // 4 + 1}, column {ahead % 4 + 1}", "40 %")
        assert ("class token", "9.2 %") in top(browser)
        np.testing.assert_allclose(pixels(browser, GRID), lit(weights[:16]), atol=4)
    assert text(browser, "note") == "A note."
    assert "40 %" in text(browser, "high")


def test_layers_and_heads(browser: Browser) -> None:
    choose(browser, "layers", 1)
    choose(browser, "heads", 1)
    hover(browser, 0, 1)
    assert text(browser, "what") == "Attention, stage 2, block 1, head 1"
    assert top(browser)[0] == ("row 2, column 3", "75 %")  # five ahead
    np.testing.assert_allclose(pixels(browser, GRID), lit(neighbour_view(1, GRID, 5).weights[0, 1, :16]), atol=4)
    choose(browser, "heads", 2)
    assert text(browser, "summary") == "Sees 16 of 16; half of the weight lies on 9"
    # The coarser layer is asked about the same place of the image.
    choose(browser, "layers", 2)
    assert text(browser, "where") == "Row 1, column 1"
    hover(browser, 1, 1, rows=2)
    assert (text(browser, "summary"), top(browser)) == ("Sees nothing here", [])
    np.testing.assert_allclose(pixels(browser, COARSE), lit(torch.tensor([1.0, 0]))[[1] * 4], atol=4)
    hover(browser, 0, 0, rows=2)
    press(browser, "h")
    assert text(browser, "what").endswith("all heads")
    press(browser, "PAGE_UP", "PAGE_UP", "PAGE_UP", "h")
    assert text(browser, "what") == "Attention, stage 1, block 1, head 1"
    film = [pixels(browser, grid, f"#layers label:nth-of-type({i + 1}) canvas") for i, grid in enumerate([GRID, GRID])]
    # Coming from the coarser grid, the middle of its cell: row 2, column 2.
    assert film[0][6] == pytest.approx(film[1][10], abs=4), "thumbnails show their own layer"
    assert min(film[0][6][0] - film[1][6][0], film[1][10][0] - film[0][10][0]) > 30


def test_keyboard(browser: Browser) -> None:
    choose(browser, "layers", 0)
    hover(browser, 0, 0)
    press(browser, "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_DOWN")
    assert text(browser, "where") == "Row 2, column 3"
    press(browser, *["ARROW_LEFT"] * 5, *["ARROW_UP"] * 3)
    assert text(browser, "where") == "Row 1, column 1", "the border holds"
    label = browser.driver.find_element("id", "canvas").get_attribute("aria-label")
    assert label.startswith(f"{NAME}, attention, stage 1, block 1. Row 1, column 1: sees 16 of 16;")
    assert text(browser, "live") == label.split(". ", 1)[1]
    press(browser, "SPACE")
    assert text(browser, "pin") == "Pinned"
    hover(browser, 2, 2)
    assert text(browser, "where") == "Row 1, column 1", "pinned"
    press(browser, "ARROW_DOWN", "ENTER")
    hover(browser, 2, 2)
    assert text(browser, "where") == "Row 3, column 3"


def test_turned_round_and_reach(browser: Browser) -> None:
    view = neighbour_view(0, GRID, 1)
    choose(browser, "layers", 0)
    choose(browser, "heads", 1)
    hover(browser, 1, 1)
    press(browser, "r")
    assert top(browser)[0] == ("row 2, column 1", "75 %")
    assert text(browser, "summary").startswith("Is seen by 2 of 16")
    np.testing.assert_allclose(pixels(browser, GRID), lit(view.weights[0, :16, 5]), atol=4)
    press(browser, "r", "b")
    np.testing.assert_allclose(pixels(browser, GRID), lit((view.weights[0, 5, :16] > 0).float()), atol=4)
    assert (text(browser, "low"), text(browser, "high")) == ("unseen", "seen")


def test_tokens_without_a_place(browser: Browser) -> None:
    choose(browser, "layers", 1)
    choose(browser, "heads", 1)
    browser.driver.find_element("css selector", "#extras button").click()
    browser.settle()
    assert text(browser, "where") == "Class token"
    assert top(browser)[0] == ("row 2, column 2", "75 %")
    choose(browser, "layers", 2)
    assert text(browser, "where") == "Class token", "kept on another grid"


def test_images_maps_and_tree(browser: Browser) -> None:
    choose(browser, "images", 1)
    choose(browser, "layers", 0)
    hover(browser, 0, 1)
    np.testing.assert_allclose(pixels(browser, GRID), lit(neighbour_view(0, GRID, 1).all_heads()[1, :16], 0.25), atol=4)
    choose(browser, "modes", 1)
    hover(browser, 3, 3)
    assert text(browser, "summary") == "Messages: 15.0"
    assert (text(browser, "low"), text(browser, "high")) == ("0.00", "15.0")
    light = pixels(browser, GRID).sum(1)
    assert (np.diff(light) > 0).all(), "brighter where the number is larger"
    choose(browser, "modes", 2)
    hover(browser, 1, 0)
    assert text(browser, "summary") == "Goes on"
    light = pixels(browser, GRID)[:, 0]
    assert light[:5].min() > 2 * light[5:].max()
    choose(browser, "modes", 3)
    hover(browser, 0, 2)
    assert text(browser, "summary") == "2 links to the root; 1 token below it"
    assert not browser.driver.find_element("id", "heads").is_displayed()
    assert not browser.driver.find_element("id", "bar").is_displayed()


def test_tapping(browser: Browser) -> None:
    choose(browser, "layers", 0)
    browser.command("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        box = browser.run(
            "const b = document.getElementById('canvas').getBoundingClientRect(); return [b.x, b.y, b.width]"
        )
        point = {"x": box[0] + box[2] * 0.9, "y": box[1] + box[2] * 0.6}
        browser.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        browser.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        browser.settle()
    finally:
        browser.command("Emulation.setTouchEmulationEnabled", enabled=False)
    assert text(browser, "where") == "Row 3, column 4"
    assert text(browser, "pin") == "Pin"


def test_everything_has_a_name(browser: Browser) -> None:
    elements = browser.driver.find_elements("css selector", "input, button, canvas[tabindex]")
    names = [element.accessible_name for element in elements]
    assert len(names) > 12
    assert all(names)
    assert {NAME, "head 2", "stage 2, block 1"} <= set(names)
    assert browser.driver.title == "Where a_model looks"
    assert browser.run("return document.querySelectorAll('b').length") == 0, "a name is no markup"


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as the accessibility guidelines define it."""
    values = np.array([float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    linear = np.where(values <= 0.03928, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser: Browser, page: Path, scheme: str) -> None:
    browser.requests()
    browser.open(page, scheme=scheme)
    script = """
        const style = (name) => getComputedStyle(document.querySelector(name));
        const ground = style("body").backgroundColor;
        const card = style(".readout").backgroundColor;
        return [[style("h1").color, ground], [style("#source").color, ground], [style("#note").color, card],
            [style("#where").color, card], [style("#modes input:checked + span").color,
            style("#modes input:checked + span").backgroundColor]];
    """
    pairs = [tuple(map(luminance, pair)) for pair in browser.run(script)]
    assert (pairs[0][1] > 0.5) == (scheme == "light")
    for pair in pairs:
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5, "hard to read"


@pytest.mark.parametrize("width", [360, 820])
def test_narrow_windows(browser: Browser, page: Path, width: int) -> None:
    browser.requests()
    browser.open(page, width=width, height=800)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    canvas = browser.driver.find_element("id", "canvas")
    assert canvas.size["width"] >= min(300, 0.4 * width)
    assert canvas.size["width"] == canvas.size["height"]


@pytest.mark.parametrize("random", [True, False])
def test_random_weights_are_announced(window: Browser, tmp_path: Path, random: bool) -> None:
    path = tmp_path / "page.html"
    path.write_text(attention_html("a_model", "of a test", [("one", synthetic(GREY))], random), encoding="utf-8")
    window.open(path)
    banner: Any = window.driver.find_element("id", "random")
    assert banner.is_displayed() == random
    assert not window.driver.find_element("id", "images").is_displayed(), "one image needs no choice"


def test_packing_keeps_who_sees_whom() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(20, 30, generator=generator) ** 8
    weights = weights * (torch.rand(20, 30, generator=generator) > 0.3)
    weights[3] = 0
    found = unpack(pack(weights), 20)
    assert ((found > 0) == (weights.numpy() > 0)).all()
    assert (np.abs(found - weights.numpy()) <= weights.amax(1, keepdim=True).numpy() / 255 + 1e-9).all()
    assert pack(weights) == pack(weights.clone())
