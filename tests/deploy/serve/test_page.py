"""The page in a real headless Chromium."""

import shutil

import pytest

from deploy.running import running
from deploy.tiny import byte_tokenizer, shadow_model
from shadowpeft.deploy.route.artefact import fit_router
from shadowpeft.deploy.route.operating import Example
from shadowpeft.deploy.route.scores import SCORES
from shadowpeft.deploy.route.service import EdgeService
from shadowpeft.deploy.serve.app import create_app
from shadowpeft.deploy.serve.catalogue import catalogue
from shadowpeft.deploy.serve.loading import Loaded
from shadowpeft.deploy.serve.service import LocalService, Settings
from shadowpeft.deploy.server_commands import edge_service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
if CHROMIUM is None:
    pytest.skip("needs Chromium: apt install chromium", allow_module_level=True)


def test_a_chat_by_keyboard_shows_who_answered_how_surely_and_the_threshold_on_the_curve():
    examples = [
        Example(
            scores=dict.fromkeys(SCORES, -0.5 * i), edge=float(i < 4), cloud=1.0, reason=None, is_out_of_scope=False
        )
        for i in range(8)
    ]
    detached = shadow_model(adapters=("robot",)).detach()
    local = edge_service(
        Loaded(model=detached, tokenizer=byte_tokenizer(), adapters=[]), Settings(temperature=0.0, max_new_tokens=8)
    )
    service = EdgeService(local, fit_router(examples), None, never_escalate=True)
    with running(create_app(service)) as url, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#model option", state="attached")
        page.wait_for_selector("#threshold", state="attached")
        page.keyboard.type("Sit down")
        page.keyboard.press("Enter")
        page.wait_for_selector("article.edge small:last-child")
        said = page.inner_text("article.edge")
        assert "Sit down" in said and "confidence" in said and " ms" in said
        # The curve is live: it is drawn anew behind every answer, with the threshold's place on it.
        page.wait_for_function("document.getElementById('point').textContent.includes('of 1 escalated')")
        first = page.get_attribute("#live", "points")
        for text in ("Stand up", "Turn around", "x"):
            page.keyboard.type(text)
            page.keyboard.press("Enter")
            page.wait_for_function(f"document.getElementById('log').children[0].innerText.includes('{text}')")
            page.wait_for_selector("article:first-child small:last-child:not(:empty)")
        page.wait_for_function("document.getElementById('point').textContent.includes('of 4 escalated')")
        assert len(service.recent) == 4 and page.get_attribute("#live", "points") != first
        assert "nothing leaves the device" in page.inner_text("#point") and not faults
        browser.close()


def test_a_chat_with_drafts_shows_how_many_were_accepted():
    model = shadow_model(adapters=("robot",))
    service = LocalService(
        model, byte_tokenizer(), catalogue(model.networks), Settings(temperature=0.0, max_new_tokens=9)
    )
    with running(create_app(service)) as url, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#model option", state="attached")
        page.select_option("#model", "robot:speculative")
        page.fill("#prompt", "Sit down")
        page.keyboard.press("Enter")
        page.wait_for_selector("article.server small:last-child")
        drafted = int(service.metrics.value("drafted_tokens_total"))
        accepted = int(service.metrics.value("accepted_tokens_total"))
        said = page.inner_text("article.server")
        assert drafted > 0 and f"{accepted} of {drafted} drafted tokens accepted" in said
        browser.close()
