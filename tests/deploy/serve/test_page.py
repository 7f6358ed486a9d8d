"""The page in a real headless Chromium."""

import contextlib
import shutil
from dataclasses import replace

import pytest

from deploy.running import free_port, held_steps, running, wait_until
from deploy.tiny import byte_tokenizer, shadow_model
from shadowpeft.deploy.route.artefact import fit_router
from shadowpeft.deploy.route.cloud import Cloud, CloudSettings
from shadowpeft.deploy.route.operating import ALL_TO_CLOUD, Example
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


EXAMPLES = [
    Example(scores=dict.fromkeys(SCORES, -0.5 * i), edge=float(i < 4), cloud=1.0, reason=None, is_out_of_scope=False)
    for i in range(8)
]


def device(**settings):
    detached = shadow_model(adapters=("robot",)).detach()
    loaded = Loaded(model=detached, tokenizer=byte_tokenizer(), adapters=[])
    return edge_service(loaded, Settings(**{"temperature": 0.0, "max_new_tokens": 8} | settings))


def server():
    model = shadow_model(adapters=("robot",))
    return LocalService(model, byte_tokenizer(), catalogue(model.networks), Settings(temperature=0.0, max_new_tokens=9))


@contextlib.contextmanager
def opened(url):
    """The page in a browser; a fault of its script fails the test."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, faults = browser.new_page(), []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        yield page
        browser.close()
        assert not faults


def say(page, text):
    page.wait_for_selector("#model option", state="attached")
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("article:first-child small:last-child:not(:empty)")


def test_a_chat_by_keyboard_shows_who_answered_how_surely_and_the_threshold_on_the_curve():
    service = EdgeService(device(), fit_router(EXAMPLES), None, never_escalate=True)
    with running(create_app(service)) as url, opened(url) as page:
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
        assert "nothing leaves the device" in page.inner_text("#point")


def test_answers_of_the_cloud_and_of_an_edge_whose_cloud_is_gone_are_told_apart():
    fitted = fit_router(EXAMPLES)
    router = replace(fitted, point=replace(fitted.point, threshold=ALL_TO_CLOUD))
    with running(create_app(server())) as cloud_url:
        local = device()
        cloud = Cloud(CloudSettings(url=cloud_url, model="robot:speculative"), local.metrics)
        with running(create_app(EdgeService(local, router, cloud))) as url, opened(url) as page:
            say(page, "Sit down")
            said = page.inner_text("article.cloud")
            assert "cloud" in said and "low_confidence" in said and "drafted tokens accepted" in said
    local = device()
    gone = Cloud(CloudSettings(url=f"http://127.0.0.1:{free_port()}", model="robot", first_pause=0.01), local.metrics)
    with running(create_app(EdgeService(local, router, gone))) as url, opened(url) as page:
        say(page, "Sit down")
        assert "edge (degraded: cloud down)" in page.inner_text("article.degraded")


def test_a_chat_goes_on_until_a_new_one_is_begun():
    service = server()
    asked, ask = [], service.ask

    async def watched(request):
        asked.append([(turn.role, turn.text) for turn in request.messages])
        return await ask(request)

    service.ask = watched
    with running(create_app(service)) as url, opened(url) as page:
        say(page, "Sit")
        said = page.inner_text("article p")
        say(page, "Stand")
        page.click("#new")
        assert not page.query_selector_all("article")
        say(page, "Go")
    assert [turn for turn in asked[1] if turn[0] == "user"] == [("user", "Sit"), ("user", "Stand")]
    assert [role for role, _ in asked[1]] == ["user", "assistant", "user"] and asked[1][1][1].strip() == said.strip()
    assert asked[2] == [("user", "Go")]


def test_escape_stops_an_answer_and_frees_its_place(monkeypatch):
    service = server()
    with held_steps(monkeypatch) as go, running(create_app(service)) as url, opened(url) as page:
        page.wait_for_selector("#model option", state="attached")
        page.fill("#prompt", "Sit")
        page.keyboard.press("Enter")
        wait_until(lambda: service.metrics.value("batch_rows_count") > 0)
        page.keyboard.press("Escape")
        page.wait_for_selector("article:first-child small:last-child:not(:empty)")
        assert page.inner_text("article small:last-child") == "stopped"
        go()
        wait_until(lambda: service.metrics.value("cancelled_total") == 1)


def test_a_page_without_the_key_says_what_is_missing_and_goes_on_with_it():
    with running(create_app(server(), api_key="secret")) as url, opened(url) as page:
        page.wait_for_selector("#notice:not(:empty)")
        assert "a valid key is needed" in page.inner_text("#notice")
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        say(page, "Sit")
        assert page.inner_text("#notice") == "" and page.query_selector("article.server")


def test_a_chat_with_drafts_shows_how_many_were_accepted():
    service = server()
    with running(create_app(service)) as url, opened(url) as page:
        page.wait_for_selector("#model option", state="attached")
        page.select_option("#model", "robot:speculative")
        say(page, "Sit down")
        drafted = int(service.metrics.value("drafted_tokens_total"))
        accepted = int(service.metrics.value("accepted_tokens_total"))
        said = page.inner_text("article.server")
        assert drafted > 0 and f"{accepted} of {drafted} drafted tokens accepted" in said
