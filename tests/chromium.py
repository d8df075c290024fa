"""The Chromium of the machine, headless; RELAY_CHROMIUM names another."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, async_playwright

ARGUMENTS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 15_000


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    binary = os.environ.get("RELAY_CHROMIUM") or shutil.which("chromium")
    assert binary, "No chromium is found: install it or name it in RELAY_CHROMIUM."
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=binary, args=ARGUMENTS)
        yield browser
        await browser.close()
