"""Web pages as a user sees them, in Chromium without a screen: `python -m tests.browser STEPS`, on one of the tests' machines.

STEPS is a list in JSON; each step opens an address (`open`), or types a line (`type`) into the field of the dialog that is there, and waits
until the page has all of some `words`. What the page says then is printed, as a list in JSON with one text for each step.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from .hosts import ROOT, Host

_PATIENCE = 120.0  # seconds for a page to come


def missing() -> str | None:
    """Why there is no browser here; None if there is."""
    absent = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    return f"{', '.join(absent)} is not installed (Debian: chromium, chromium-driver)" if absent else None


def look(host: Host, *steps: dict[str, Any]) -> list[str]:
    """What pages say to a browser on a machine, after each step (see above)."""
    told = host.run(f"cd {ROOT}; python -m tests.browser {shlex.quote(json.dumps(steps))}").stdout
    said: list[str] = json.loads(told.splitlines()[-1])
    return said


def _walk(steps: list[dict[str, Any]]) -> list[str]:
    options = webdriver.ChromeOptions()
    for option in ("headless", "no-sandbox", "window-size=1400,1000"):
        options.add_argument(f"--{option}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    said = []

    def body() -> str:
        return driver.find_element(By.TAG_NAME, "body").text

    try:
        for step in steps:
            if "open" in step:
                driver.get(step["open"])
            if "type" in step:
                field = driver.find_element(By.CSS_SELECTOR, "[role=dialog] input")
                field.send_keys(Keys.CONTROL, "a")
                field.send_keys(step["type"], Keys.ENTER)
            wait = WebDriverWait(driver, _PATIENCE, ignored_exceptions=[StaleElementReferenceException])
            try:
                wait.until(lambda _, words=step["words"]: all(word in body() for word in words))
            except TimeoutException:
                sys.exit(f"{step}: the page says only\n{body()}")
            said.append(body())
    finally:
        driver.quit()
    return said


if __name__ == "__main__":
    print(json.dumps(_walk(json.loads(sys.argv[1]))))
