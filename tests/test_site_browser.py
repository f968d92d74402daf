"""The docs site in headless Chromium, from the disk: nothing from the network, phone and desktop, light and dark."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PAGES = ("index.html", "tutorial.html", "methods.html", "methods/repq-vit.html", "results.html", "cli.html", "api.html")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not installed"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(target)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return target


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_show_and_ask_for_nothing(site, width, dark):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        media = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        scheme = "slate" if dark else "default"
        for page in PAGES:
            driver.get((site / page).as_uri())
            shown = f"return document.body.getAttribute('data-md-color-scheme') === '{scheme}'"
            WebDriverWait(driver, 30).until(lambda d, shown=shown: d.execute_script(shown), page)
            wider = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            assert wider <= 0, f"{page} scrolls sideways"
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        assert any(url.endswith(".css") for url in asked)
        assert not {url for url in asked if not url.startswith(("file:", "data:", "blob:"))}
        assert not [e for e in driver.get_log("browser") if e["level"] == "SEVERE" and "search" not in e["message"]]
    finally:
        driver.quit()
