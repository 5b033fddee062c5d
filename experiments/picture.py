"""The README's picture: the first screen of a real report, ``docs/report.png``.

python -m experiments.publish unpack experiments/published/flora runs/flora
fedlora compare experiments/flora.toml --out runs/flora --resume
python -m experiments.picture runs/flora/report.html
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from fedlora.core.files import write_atomic

PICTURE = Path(__file__).parents[1] / "docs" / "report.png"
WIDTH, HEIGHT, COLOURS = 1136, 900, 48
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")


def first_screen(report: Path) -> bytes:
    """A report's first screen in Chromium, PNG.

    Raises:
        SystemExit: chromium or chromedriver is not there.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise SystemExit("chromium and chromedriver are needed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        screen = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(report.absolute().as_uri())
        shown: bytes = browser.get_screenshot_as_png()
        browser.quit()
    return shown


def small(picture: bytes) -> bytes:
    """The same picture in few colours."""
    packed = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS).save(packed, "PNG", optimize=True)
    return packed.getvalue()


if __name__ == "__main__":
    write_atomic(PICTURE, small(first_screen(Path(sys.argv[1]))))
