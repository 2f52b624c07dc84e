"""The server's page in a real browser: teach, see, talk, delete, reload."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import make_policy, make_run, serving

SHOTS = os.environ.get("FEDVPA_SCREENSHOTS", "")
"""Folder for pictures of the page."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        needed = os.environ.get("FEDVPA_ALL_SERVICES")
        (pytest.fail if needed else pytest.skip)(
            "Chromium is not installed: apt-get install chromium"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    os.environ["FEDVPA_CACHE"] = str(folder / "cache")
    policy = make_policy(folder / "policy", tiny_model, make_run(folder, tiny_model))
    bank = str(folder / "data" / "kind" / "test.jsonl")
    with serving(policy, store=f"sqlite:///{folder / 'users.db'}", bank=bank, most_tokens=40) as (
        address,
        _,
    ):
        yield address


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def said(page: Any, place: str, text: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator(f"#{place}")).to_contain_text(text, timeout=20_000)


@pytest.mark.slow
def test_teach_talk_and_delete(browser: Any, url: str) -> None:
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 1000, "height": 1100})
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda line: line.type == "error" and troubles.append(line.text))
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(url)
    page.fill("#user", "dora")
    page.press("#user", "Tab")
    said(page, "words", "nothing")

    def talk(text: str) -> str:
        page.fill("#line", text)
        page.press("#line", "Enter")
        expect(page.locator("#send")).to_be_enabled(timeout=20_000)
        return str(page.locator("#said-left .said:not(.user) span").last.inner_text())

    before = talk("is tea very good")
    page.click("#fresh")
    # eight choices of somebody kind, the last ones by keyboard
    page.click("#ask")
    for i in range(8):
        page.wait_for_selector("#pair:not([hidden])")
        better = "a" if "please" in page.inner_text("#a") else "b"
        if i < 4:
            page.click(f"#{better}")
        else:
            page.locator("h1").click()
            page.keyboard.press(better)
        said(page, "words", f"After {i + 1} choice")
    assert "'kind' comes nearest" in page.inner_text("#words")
    assert page.locator("#map svg circle").count() == 3
    shot(page, "taught")
    after = talk("is tea very good")
    assert after != before
    assert "drawn as mine" in page.locator("#said-left small").last.inner_text()
    # side by side, and a mix that is moved within the conversation
    page.click("#fresh")
    page.select_option("#left", "name:kind")
    page.select_option("#right", "mix")
    page.locator("#mix-kind").fill("0")
    talk("is tea very good")
    page.locator("#mix-kind").fill("2")
    talk("ask a friend")
    under = page.locator("#said-right small")
    assert "kind 0" in under.first.inner_text()
    assert "kind 2" in under.last.inner_text()
    page.fill("#name", "mostly kind")
    page.click("#save")
    page.wait_for_selector("#saved li")
    assert "mostly kind" in page.inner_text("#saved")
    shot(page, "talked")
    page.reload()
    said(page, "words", "After 8")
    assert page.input_value("#user") == "dora"
    page.click("#undo")
    said(page, "words", "After 7")
    page.click("#forget")
    said(page, "kept", "Nothing")
    page.reload()
    said(page, "words", "nothing")
    assert not troubles


@pytest.mark.slow
def test_on_a_phone_in_the_dark_nothing_is_cut_off(browser: Any, url: str) -> None:
    from playwright.sync_api import expect

    context = browser.new_context(
        viewport={"width": 375, "height": 700}, color_scheme="dark", is_mobile=True
    )
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#left option")).to_have_count(5)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(21, 23, 28)"
    # every control has a name that a screen reader can say
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea')].filter(e =>
        !e.textContent.trim() && !e.getAttribute('aria-label')
        && !document.querySelector(`label[for="${e.id}"]`)).map(e => e.id)"""
    )
    assert nameless == []
    shot(page, "phone")
    context.close()
