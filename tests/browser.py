"""Web pages as a user sees them, in headless Chromium: `python -m tests.browser STEPS`, on a test host.

STEPS is a list in JSON. Each step opens an address (`open`), or types a line (`type`) into the field of the page's dialog, and waits until
the page contains all of some `words`. The program prints the page's text after each step, as a list in JSON.
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
    """Return why this machine has no browser; None if it has one."""
    absent = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    return f"{', '.join(absent)} is not installed (Debian: chromium, chromium-driver)" if absent else None


def look(host: Host, *steps: dict[str, Any]) -> list[str]:
    """Return the page's text after each step of a browser on a host; for the steps see above."""
    printed = host.run(f"cd {ROOT}; python -m tests.browser {shlex.quote(json.dumps(steps))}").stdout
    texts: list[str] = json.loads(printed.splitlines()[-1])
    return texts


def _walk(steps: list[dict[str, Any]]) -> list[str]:
    options = webdriver.ChromeOptions()
    for option in ("headless", "no-sandbox", "window-size=1400,1000"):
        options.add_argument(f"--{option}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    texts = []

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
                sys.exit(f"{step}: the page contains only\n{body()}")
            texts.append(body())
    finally:
        driver.quit()
    return texts


if __name__ == "__main__":
    print(json.dumps(_walk(json.loads(sys.argv[1]))))
