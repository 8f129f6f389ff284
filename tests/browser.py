"""A headless Chromium for tests of pages, where one is installed."""

import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(PATH is None, reason="no Chrome or Chromium is installed")


@contextmanager
def browser():
    """Playwright's browser over the Chromium that is there."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()
