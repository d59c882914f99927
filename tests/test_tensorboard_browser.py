"""TensorBoard for real: its page, opened in a browser, shows what a run has logged."""

import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest

from browsing import CHROMIUM, DRIVER, MISSING, browser, resize, save_page
from running import environment, processes, toy_overrides, train, write_documents
from tiny_models import make_model_dir

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)]

# All texts of the page, those in the shadow trees of TensorBoard's older plugins too, and the sizes of its pictures.
READ = """
const texts = [], pictures = [];
const walk = (node) => {
  if (node.nodeType === Node.TEXT_NODE && node.data.trim()) texts.push(node.data.trim());
  if (node.nodeName === "IMG" && node.naturalWidth) pictures.push(node.naturalWidth);
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) if (!["STYLE", "SCRIPT"].includes(child.nodeName)) walk(child);
};
walk(document.body);
return [texts, pictures];
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a TensorBoard on a finished run of seconds."""
    root = tmp_path_factory.mktemp("tensorboard")
    overrides = toy_overrides(
        make_model_dir("gpt_neox", root / "model"), write_documents(root / "text.txt"), root / "run"
    )
    assert train(overrides, output=root / "output") == 0, (root / "output").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={root / 'run' / 'tensorboard'}", f"--port={port}",
               "--host=127.0.0.1", "--load_fast=false"]  # fmt: skip
    with (root / "server").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
    try:
        yield wait_for(f"http://127.0.0.1:{port}", server, root / "server")
    finally:
        server.terminate()
        server.wait(30)
    assert not [line for line in processes() if str(root) in line]


def wait_for(address, server, log):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            if all(tags(address, plugin) for plugin in ("scalars", "histograms", "images")):
                return address
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(log.read_text())


def tags(address, plugin):
    with urllib.request.urlopen(f"{address}/data/plugin/{plugin}/tags", timeout=5) as answer:
        return {tag for found in json.load(answer).values() for tag in found}


@pytest.fixture(scope="module")
def driver():
    with browser() as opened:
        resize(opened, 1400, 6000)  # tall: cards that are not in view are not drawn
        yield opened


def read_until(driver, address, satisfied, picture):
    """Open a page and read it until it shows what is wanted, or for a minute and a half; save a picture of it."""
    driver.get("about:blank")
    driver.get(address)
    end = time.monotonic() + 90
    while True:
        texts, pictures = driver.execute_script(READ)
        if satisfied(texts, pictures) or time.monotonic() > end:
            save_page(driver, picture, width=1400, height=2000)
            return texts, pictures
        time.sleep(0.5)


def test_scalars_and_images(address, driver, tmp_path):
    """The page of time series has a group for every prefix, and names the cards of the Jacobian's."""
    wanted = {"jacobian", "jacobian_heat_map", "val", "train", "/effective_edges", "/log10_abs"}
    texts, _ = read_until(
        driver, f"{address}/#timeseries", lambda texts, _: wanted <= set(texts), tmp_path / "timeseries.png"
    )
    assert wanted <= set(texts), texts


@pytest.mark.parametrize(
    ("plugin", "wanted"),
    [
        ("scalars", ["jacobian/effective_edges", "jacobian/share_above_0.01", "jacobian/hoyer"]),
        ("histograms", ["jacobian/log10_abs", "jacobian/log10_abs_rms_normalized"]),
        ("images", ["jacobian_heat_map/0_abs", "jacobian_heat_map/0_rms_normalized"]),
    ],
)
def test_tags_of_the_jacobian_are_shown(address, driver, tmp_path, plugin, wanted):
    assert set(wanted) <= tags(address, plugin)
    names = [[tag, tag.split("/")[-1]] for tag in wanted]

    def shown(texts):
        return [tag for tag, name in names if any(text in (tag, name) for text in texts)]

    def satisfied(texts, pictures):
        return shown(texts) == wanted and (plugin != "images" or len(pictures) >= 2)

    pattern = "|".join(f"^{tag}$" for tag in wanted)  # a group shows a dozen cards at a time
    chosen = f"{address}/#{plugin}&tagFilter={urllib.parse.quote(pattern)}"
    texts, pictures = read_until(driver, chosen, satisfied, tmp_path / f"{plugin}.png")
    assert shown(texts) == wanted, texts
    if plugin == "images":
        assert len(pictures) >= 2 and min(pictures) > 100


def test_hyperparameters(address, driver, tmp_path):
    wanted = {"jacobian.coef", "jacobian.penalty", "jacobian/effective_edges", "val/ce_score_both"}

    def satisfied(texts, _pictures):
        return wanted <= set(texts)

    texts, _ = read_until(driver, f"{address}/#hparams", satisfied, tmp_path / "hparams.png")
    assert wanted <= set(texts), texts
