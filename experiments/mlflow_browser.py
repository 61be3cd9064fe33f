"""A real MLflow server and a real browser on it: for the screenshot and for the test of the UI."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

CHROMIUM = shutil.which("chromium")
"""Debian's browser; Playwright's own is a download and not used."""

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_S = 90.0
"""How long to wait for what takes seconds on an idle machine."""


@contextmanager
def mlflow_server(store_uri: str, log: Path) -> Iterator[str]:
    """Serve a store on a free port of 127.0.0.1; yield the address once it answers.

    What the server says goes to `log`. Raises `RuntimeError` with that file's end if it stops, or
    does not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store_uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Neither the telemetry nor the queue of background jobs has anything to do here.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("wb") as output:
        # A session of its own, so that its workers end with it and nothing else does.
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | quiet, start_new_session=True
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(server)


def _wait_until_healthy(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"mlflow server does not answer: {log.read_text()[-2000:]}")


def _end(server: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, how)
            server.wait(timeout=2)  # longer it waits for clients that keep their connections
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    server.wait()


@contextmanager
def chromium_page(width: int = 1400, height: int = 1000) -> Iterator["Page"]:
    """Open an empty page of this size in CSS pixels in a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(PATIENCE_S * 1000)
        # On a first visit from the same machine MLflow unfolds its assistant over the charts.
        page.add_init_script(
            "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
        )
        try:
            yield page
        finally:
            browser.close()


def chart(page: "Page", metric: str) -> "Locator":
    """Return the chart view's card that is titled with this metric."""
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    return cards.filter(has=page.get_by_text(metric, exact=True))


def drawn_bars(card: "Locator") -> int:
    """Count the bars on a chart once there are some."""
    bars = card.locator(".bars .point path")
    bars.first.wait_for(state="attached")
    return bars.count()


# Plotly draws each run's curve twice, so paths are told apart by where they run: curves that
# coincide to a tenth of a pixel count once.
_DISTINCT_CURVES = """card => new Set(
    [...card.querySelectorAll('.scatterlayer .trace path.js-line')].map(p => p.getAttribute('d'))
).size"""


def drawn_curves(card: "Locator", at_least: int = 1) -> int:
    """Count the distinct curves on a chart once there are `at_least` so many and no more come.

    Returns fewer when they do not come.
    """
    card.locator(".scatterlayer .trace path.js-line").first.wait_for(state="attached")
    deadline = time.monotonic() + PATIENCE_S / 3
    before, count = -1, 0
    while (count < at_least or count != before) and time.monotonic() < deadline:
        before = count
        card.page.wait_for_timeout(500)
        count = int(card.evaluate(_DISTINCT_CURVES))
    return count
