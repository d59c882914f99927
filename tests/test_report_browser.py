"""The report in a real browser: it works from a file, alone, at any width, and whatever its texts hold."""

import pytest

from browsing import CHROMIUM, DRIVER, MISSING, browser, console, requested, resize, save_page
from jsae_lightning.report import write_report
from report_fixtures import make_run, make_sweep

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)]

OVERFLOWING = """
const width = document.documentElement.clientWidth;
const inBox = (node) => node.closest(".scroll, .list");
return [...document.querySelectorAll("body *")].filter((node) => !inBox(node) || node.matches(".scroll, .list"))
  .filter((node) => { const box = node.getBoundingClientRect(); return box.width && box.right > width + 1; })
  .map((node) => `${node.tagName} ${node.getAttribute("class")} ${node.textContent.slice(0, 40)}`);
"""
SMALL_TEXT = """
const small = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || node.closest("script")) continue;
  if (!node.getClientRects().length) continue;
  const svg = node.closest("svg");
  let size = parseFloat(getComputedStyle(node).fontSize);
  if (svg) size *= svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  if (size < 11.5) small.push(`${size} ${walker.currentNode.data.slice(0, 30)}`);
}
return small;
"""
CONTRAST = """
const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
const paper = luminance(rgb(getComputedStyle(document.body).backgroundColor));
return ["body", "figcaption", ".note", "a", ".se", "figure svg text"].map((selector) => {
  const style = getComputedStyle(document.querySelector(selector));
  const ink = luminance(rgb(selector.includes("svg") ? style.fill : style.color));
  return [selector, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)];
}).filter(([, ratio]) => ratio < 4.5);
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The reports of a run, whose texts are hostile, and of a sweep."""
    root = tmp_path_factory.mktemp("reports")
    run = make_run(root / "run <b>&amp;$x$", hostile=True)
    return {
        "run": write_report(run, evaluate=False),
        "sweep": write_report(make_sweep(root / "sweep"), evaluate=False),
    }


@pytest.fixture(scope="module")
def driver():
    with browser() as opened:
        resize(opened, 1280)
        yield opened


def click(driver, selector):
    """Click as a script would, where nothing that scrolls can be in the way."""
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def text_of(driver, selector):
    return driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? null", selector)


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_loads_from_a_file_without_errors_and_asks_for_nothing(driver, pages, name):
    console(driver), requested(driver)
    driver.get(pages[name].as_uri())
    assert console(driver) == []
    assert requested(driver) == [pages[name].as_uri()]
    assert driver.execute_script("return document.querySelectorAll('figure svg').length") >= 15
    assert driver.execute_script("return window.hacked === undefined")
    assert driver.execute_script("return window.scrollY") == 0, "the page opens at its top"


def test_hostile_texts_are_shown_as_they_are(driver, pages):
    driver.get(pages["run"].as_uri() + "#output-1")
    assert "</script><script>window.hacked = 1</script>" in text_of(driver, ".explanation")
    tokens = driver.execute_script("return [...document.querySelectorAll('.context .token')].map(x => x.textContent)")
    assert {"</script>", "<b>", '"', "مرحبا", "↵\n", "&amp;", "<!--"} <= set(tokens)
    assert driver.execute_script("return document.querySelectorAll('#latent-view script, .context b').length") == 0
    assert "run <b>&amp;$x$" in driver.title


def test_sorting_is_numeric_and_turns_around(driver, pages):
    driver.get(pages["sweep"].as_uri())
    read = """return [...document.querySelectorAll('#summary tbody tr')].map(
        row => row.cells[arguments[0]].dataset.value)"""
    names = driver.execute_script(
        "return [...document.querySelectorAll('#summary thead th')].map(x => x.textContent.trim())"
    )
    column = names.index("effective edges")
    before = [float(x) for x in driver.execute_script(read, column)]
    heading = f"#summary thead th:nth-child({column + 1}) button"
    click(driver, heading)
    rising = [float(x) for x in driver.execute_script(read, column)]
    assert rising == sorted(before) != before
    assert [str(x) for x in rising] != sorted(str(x) for x in rising)  # text would be in another order: 9 after 10
    click(driver, heading)
    assert [float(x) for x in driver.execute_script(read, column)] == rising[::-1]
    mark = driver.execute_script(
        "return document.querySelectorAll('#summary th')[arguments[0]].getAttribute('aria-sort')", column
    )
    assert mark == "descending"
    empty = names.index("model.random_weights")  # one run has a value: it comes first, those without last
    for _ in range(2):
        click(driver, f"#summary thead th:nth-child({empty + 1}) button")
        assert driver.execute_script(read, empty)[0] == "True"


def test_from_an_output_latent_to_an_input_latent_and_back(driver, pages):
    driver.get(pages["run"].as_uri())
    driver.execute_script("document.getElementById('latent-number').value = '12'")
    click(driver, "#explorer-form button")
    assert driver.execute_script("return location.hash") == "#output-12"
    assert text_of(driver, "#latent-view h3") == "Output latent 12"
    strengths = driver.execute_script(
        "return [...document.querySelectorAll('.edge .values')].map(x => Number(x.textContent.match(/[0-9.e-]+/)[0]))"
    )
    assert len(strengths) > 5 and strengths == sorted(strengths, reverse=True)
    widths = driver.execute_script(
        "return [...document.querySelectorAll('.bar.size')].map(x => x.getBoundingClientRect().width)"
    )
    assert widths[0] / widths[-1] == pytest.approx(strengths[0] / strengths[-1], rel=0.15)
    target = text_of(driver, ".edge a")
    click(driver, ".edge a")
    driver.implicitly_wait(2)
    assert driver.execute_script("return location.hash") == "#" + target.replace(" ", "-")
    assert text_of(driver, "#latent-view h3") == target.capitalize().replace(" ", " latent ")
    feeds = driver.execute_script("return [...document.querySelectorAll('.edge a')].map(x => x.textContent)")
    assert "output 12" in feeds
    assert driver.execute_script("return document.querySelectorAll('#latent-view .context').length") >= 1
    driver.back()
    assert text_of(driver, "#latent-view h3") == "Output latent 12"
    assert console(driver) == []


def test_links_orders_and_mistakes(driver, pages):
    driver.get(pages["run"].as_uri() + "#input-3")
    assert text_of(driver, "#latent-view h3") == "Input latent 3"
    driver.execute_script("document.getElementById('latent-number').value = '99999'")
    click(driver, "#explorer-form button")
    assert "no input latent 99999" in text_of(driver, "#explorer-message")
    driver.execute_script("document.getElementById('latent-number').value = 'x'")
    click(driver, "#explorer-form button")
    assert "number of a latent" in text_of(driver, "#explorer-message")
    choose = """const choice = document.getElementById('order-choice'); choice.value = arguments[0];
        choice.dispatchEvent(new Event('change'));
        return [...document.querySelectorAll('#latent-list a')].map(
            link => [...link.children].map(x => Number(x.textContent.match(/[0-9.]+/)[0])))"""
    for order, column, falls in (("number", 0, False), ("count", 1, True), ("strength", 1, True)):
        shown = [row[column] for row in driver.execute_script(choose, order)]
        assert len(set(shown)) > 4 and shown == sorted(shown, reverse=falls), order
    driver.get(pages["run"].as_uri() + "#output-2")
    assert text_of(driver, ".explanation") == "Explanation: none"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_fits_its_width_and_can_be_read(pages, name, width, dark, tmp_path):
    with browser(dark=dark) as driver:
        resize(driver, width)
        driver.get(pages[name].as_uri())
        driver.execute_script("document.querySelectorAll('details').forEach(x => x.open = true)")
        assert driver.execute_script("return innerWidth") == width
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script(OVERFLOWING) == []
        assert driver.execute_script(SMALL_TEXT) == []
        assert driver.execute_script(CONTRAST) == []
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(21, 24, 28)") == dark
        driver.execute_script("document.querySelectorAll('details').forEach(x => x.open = false)")
        save_page(driver, tmp_path / f"{name}-{width}-{'dark' if dark else 'light'}.png", width=width)
