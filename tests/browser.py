"""The distribution's Chromium under Playwright, whose own downloads are not used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
#: Why there is no browser here, or nothing.
MISSING = ""
if not CHROMIUM:
    MISSING = "no Chromium is installed (apt-get install chromium)"
elif find_spec("playwright") is None:
    MISSING = "playwright is not installed (pip install 'steer-llm[test]')"


@contextmanager
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # without a sandbox, since tests run as root in containers
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield launched
        finally:
            launched.close()
