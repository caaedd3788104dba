"""A headless Chromium that opens pages, and what it asked the network for."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromedriver")


class Browser:
    """A window with one page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Open a page and wait until it is drawn."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.complaints()
        self.driver.get(path.as_uri())
        self.settle()

    def command(self, name: str, **arguments: Any) -> Any:
        """One of Chromium's own commands."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def settle(self, seconds: float = 20) -> None:
        """Wait until the page has drawn the last thing that was asked for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            asked, ready = self.run("return [document.body.dataset.asked, document.body.dataset.ready]")
            if asked and asked == ready:
                return
            time.sleep(0.02)
        raise AssertionError(f"the page did not come to rest: {self.complaints()}")

    def complaints(self) -> list[str]:
        """Console messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def browse() -> Iterator[Browser]:
    """A browser, for as long as its tests run. Without one they are skipped, but in CI they fail."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    missing += [] if find_spec("selenium") else ["package selenium"]
    if missing:
        message = f"no {', no '.join(missing)}: tools/install_browser.sh, as root, and requirements/dev.txt bring them"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    switches = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    for switch in [*switches, *(["--no-sandbox"] if os.geteuid() == 0 else [])]:  # Chromium refuses root otherwise
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With the driver's place given, selenium looks for none and fetches none.
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
