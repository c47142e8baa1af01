"""A headless Chromium for the tests of the page, driven by Selenium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.proxy import Proxy, ProxyType
from selenium.webdriver.support.ui import WebDriverWait

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    # Docker's is 64 MB; a large page's renderer ends with it.
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
]


def missing() -> str | None:
    """Which program there is not, or None."""
    names = ("chromium", "chromedriver")
    return next((f"{name} is not installed" for name in names if shutil.which(name) is None), None)


class Browser:
    """One page at a time."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, path: Path) -> None:
        self._driver.get(path.as_uri())
        # On a busy machine the driver came back from a large page that was still being read.
        WebDriverWait(self._driver, 120).until(lambda driver: self.run("return document.readyState") == "complete")

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function body run in the page."""
        return self._driver.execute_script(script, *arguments)

    def hover(self, selector: str) -> None:
        self._pointer(selector).perform()

    def click(self, selector: str) -> None:
        self._pointer(selector).click().perform()

    def press(self, *keys: str) -> None:
        ActionChains(self._driver).send_keys(*keys).perform()

    def emulate(self, media: str = "", scheme: str = "light") -> None:
        """Show the page as on that medium ("print"; "" for a screen) and under that colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def messages(self) -> list[str]:
        """What the console was told since the last call."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def _pointer(self, selector: str) -> ActionChains:
        found = self._driver.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", found)
        return ActionChains(self._driver, duration=0).move_to_element(found)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start chromedriver and Chromium with an empty profile; both end with the block."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    # It does not know this machine's ports.
    options.proxy = Proxy({"proxyType": ProxyType.DIRECT})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
