"""A Chromium for the explorer's tests: the one that playwright installed, or one that this machine has."""

import os
import shutil
from pathlib import Path

from conftest import PATIENCE
from playwright.sync_api import Browser, Error, Playwright

NAMES = (
    "google-chrome google-chrome-stable chrome chromium chromium-browser microsoft-edge microsoft-edge-stable msedge"
)
LINUX = ["/opt/google/chrome/chrome", "/snap/bin/chromium", "/opt/microsoft/msedge/msedge"]
MACOS = [f"Applications/{app}.app/Contents/MacOS/{app}" for app in ("Google Chrome", "Chromium", "Microsoft Edge")]
WINDOWS = [
    f"{app}.exe"
    for app in ("Google/Chrome/Application/chrome", "Chromium/Application/chrome", "Microsoft/Edge/Application/msedge")
]
MISSING = (
    "no browser for the explorer: type `python -m playwright install chromium`, "
    "or take your distribution's package (Debian: apt install chromium)"
)


def find_browsers(installed: str) -> list[str]:
    """The browsers that are there, the best first; installed: where playwright puts its own."""
    folders = [os.environ.get(name, "") for name in ("ProgramFiles", "ProgramFiles(x86)", "LocalAppData")]
    places = [installed, *map(shutil.which, NAMES.split()), *LINUX]
    places += [Path(root, app) for root in ("/", Path.home()) for app in MACOS]
    places += [Path(root, app) for root in folders if root for app in WINDOWS]
    return list(dict.fromkeys(str(place) for place in places if place and Path(place).is_file()))


def open_browser(playwright: Playwright, page: Path) -> Browser | str:
    """The first browser that opens `page`, a file; where there is none, what is missing.

    One that is there and cannot read the tests' files is none: a snap sees no folder for temporary files.
    """
    reason = MISSING
    for path in find_browsers(playwright.chromium.executable_path):
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=1000 * PATIENCE)
            browser.on("context", lambda context: context.set_default_timeout(1000 * PATIENCE))
            browser.new_page().goto(page.as_uri())
            return browser
        except Error as error:
            reason += f"; {path} does not open a page: {str(error).splitlines()[0]}"
    return reason
