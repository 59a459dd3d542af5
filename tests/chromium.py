"""Pages in headless Chromium, over its debugging protocol; skipped where there is no Chromium."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def has_chromium() -> bool:
    """Whether pages can be looked at here."""
    return _BROWSER is not None


needs_chromium = pytest.mark.skipif(not has_chromium(), reason="needs Chromium")
SHOTS = "TRACE_RAY_SCREENSHOTS"
"""Folder in which screenshots are kept; unset = they are not."""
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"width": 1200, "scheme": "light", "media": "screen"},
    "dark": {"width": 1200, "scheme": "dark", "media": "screen"},
    "phone": {"width": 400, "scheme": "light", "media": "screen"},
    "print": {"width": 800, "scheme": "light", "media": "print"},
}


def opened(url: str, ready: str, name: str) -> tuple[str, list[str]]:
    """Return a page's document once its text holds ``ready``, and what the browser complained of.

    It is looked at light, dark, on a phone and in print: as ``<name>-<look>.png`` in TRACE_RAY_SCREENSHOTS.
    Text wider than the window is a complaint.
    """
    # Its processes end a moment after the first one, and may still write.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [str(_BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"]
        words += ["--disable-background-networking", "--remote-debugging-port=0"]
        words += [f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True) as browser:
            try:
                seen = _looked_at(url, ready, name, Path(profile, "DevToolsActivePort"))
                return asyncio.run(asyncio.wait_for(seen, 120))
            finally:
                browser.terminate()
                browser.wait(30)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(browser.pid, signal.SIGKILL)


async def _looked_at(url: str, ready: str, name: str, port_file: Path) -> tuple[str, list[str]]:
    while not port_file.exists() or port_file.read_text().count("\n") < 1:
        await asyncio.sleep(0.1)
    at = f"http://127.0.0.1:{port_file.read_text().split()[0]}"
    complaints: list[str] = []
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{at}/json/new?about:blank") as answer:
            target = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(target, max_msg_size=0) as page:
            numbers = itertools.count(1)

            async def call(method: str, **given: Any) -> dict[str, Any]:
                mine = next(numbers)
                await page.send_json({"id": mine, "method": method, "params": given})
                while (said := await page.receive_json()).get("id") != mine:
                    if said["method"] in ("Log.entryAdded", "Runtime.exceptionThrown"):
                        complaints.append(str(said["params"]))
                return said["result"]

            async def value(code: str) -> Any:
                return (await call("Runtime.evaluate", expression=code))["result"].get("value")

            for method in ("Log.enable", "Runtime.enable"):
                await call(method)
            await call("Page.navigate", url=url)
            while ready not in (await value("document.body ? document.body.innerText : ''")):
                await asyncio.sleep(0.1)
            for look, how in LOOKS.items():
                scheme = {"name": "prefers-color-scheme", "value": how["scheme"]}
                await call("Emulation.setEmulatedMedia", media=how["media"], features=[scheme])
                size = {"width": how["width"], "height": 1000, "deviceScaleFactor": 1}
                await call("Emulation.setDeviceMetricsOverride", mobile=False, **size)
                wide = await value("document.documentElement.scrollWidth")
                if wide > how["width"]:
                    complaints.append(f"{look}: {wide} px wide in a window of {how['width']}")
                if folder := os.environ.get(SHOTS):
                    shot = await call("Page.captureScreenshot", captureBeyondViewport=True)
                    kept = Path(folder, f"{name}-{look}.png")
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_bytes(base64.b64decode(shot["data"]))
            return await value("document.documentElement.outerHTML"), complaints
