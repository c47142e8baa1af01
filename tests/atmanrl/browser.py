"""A headless Chromium spoken to through chromedriver's own protocol (W3C WebDriver), without a client package."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Without the environment's proxy, which does not know this machine's ports.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
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

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{session['sessionId']}"

    def open(self, path: Path) -> None:
        self._call("POST", f"{self._session}/url", {"url": path.as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function body run in the page."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def hover(self, selector: str) -> None:
        self._pointer(selector, [])

    def click(self, selector: str) -> None:
        self._pointer(selector, [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}])

    def press(self, *keys: str) -> None:
        """Keys by their WebDriver code points."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keyboard", "actions": strokes})

    def emulate(self, media: str = "", scheme: str = "light") -> None:
        """Show the page as on that medium ("print"; "" for a screen) and under that colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"media": media, "features": features}}
        self._call("POST", f"{self._session}/goog/cdp/execute", command)

    def messages(self) -> list[str]:
        """What the console was told since the last call."""
        return [entry["message"] for entry in self._call("POST", f"{self._session}/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._call("DELETE", self._session, None)

    def _pointer(self, selector: str, buttons: list[dict[str, Any]]) -> None:
        found = self._call("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        self.run("arguments[0].scrollIntoView({block: 'center'})", found)
        move = {"type": "pointerMove", "origin": {_ELEMENT: found[_ELEMENT]}, "x": 0, "y": 0, "duration": 0}
        self._act({"type": "pointer", "id": "mouse", "actions": [move, *buttons]})

    def _act(self, source: dict[str, Any]) -> None:
        self._call("POST", f"{self._session}/actions", {"actions": [source]})

    def _call(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with _DIRECT.open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start chromedriver and Chromium; both end with the block."""
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        try:
            page = Browser(f"http://127.0.0.1:{_port(driver)}", profile)
            try:
                yield page
            finally:
                page.close()
        finally:
            driver.terminate()


def _port(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout is not None
    # Its end is that of the lines below.
    overdue = threading.Timer(60, driver.kill)
    overdue.start()
    try:
        for line in driver.stdout:
            if "started successfully on port" in line:
                return int(line.rstrip(".\n ").rsplit(" ", 1)[1])
    finally:
        overdue.cancel()
    raise RuntimeError("chromedriver did not start")
