"Where Chromium is, and how the tests start it."
import shutil
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
NO_CHROMIUM = 'no Chromium on the PATH; CI installs it, on Debian it is `apt-get install chromium`'
FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()

@contextmanager
def chromium():
    "A headless Chromium that asks nothing of the network by itself."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try: yield browser
        finally: browser.close()
