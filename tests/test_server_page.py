"""The page at `/`: served without a key, under a strict policy, with nothing inline."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import data_url, serving

from cmg_gguf.chat.heat import heat_block
from cmg_gguf.heat.geometry import Picture, Tile
from cmg_gguf.heat.maps import Heat
from cmg_gguf.server.service import Defaults, Service
from cmg_gguf.server.web import ASSETS, HEADERS, SCENE, SCENES
from cmg_gguf.tiny.pair import embedded_guidance
from cmg_gguf.tiny.scenes import draw, make_scene

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def locked() -> Any:
    with serving(keys=[KEY]) as served, served.client() as client:
        yield client


@pytest.mark.parametrize("path", ASSETS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_assets_need_no_key_and_have_policy_and_type(locked: Any, path: Any, method: Any) -> None:
    response = locked.request(method, path)
    assert response.status_code == 200
    assert response.headers["content-type"] == f"{ASSETS[path][1]}; charset=utf-8"
    assert response.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_other_paths_need_the_key(locked: Any) -> None:
    assert locked.get("/page/other.js").status_code == 401
    assert locked.get("/v1/models").status_code == 401


def test_index_has_nothing_inline_and_nothing_from_elsewhere(locked: Any) -> None:
    text = locked.get("/").text
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://", text)
    assert all(re.search(r'src="/page/', tag) for tag in re.findall("<script[^>]*>", text))
    assert set(re.findall(r'"(/page/[^"]+)"', text)) <= set(ASSETS)


def test_scripts_make_no_markup_of_text(locked: Any) -> None:
    for path in ASSETS:
        assert not re.search(
            "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", locked.get(path).text
        )


def test_scenes_are_drawn_for_the_built_in_model_alone(locked: Any) -> None:
    assert locked.get(SCENES).json() == []
    assert locked.get(SCENE, params={"kind": "counter", "index": 7}).status_code == 404
    with serving(keys=[KEY], draws_scenes=True) as served, served.client() as client:
        assert client.get(SCENES).json() == ["typical", "counter", "strong"]
        got = client.get(SCENE, params={"kind": "counter", "index": 7})
        assert got.headers["content-type"] == "image/png"
        found = np.asarray(Image.open(io.BytesIO(got.content)))
        np.testing.assert_array_equal(found, draw(make_scene("test", 7, "counter")))
        wrongs: list[tuple[dict[str, Any], int]] = [
            ({"kind": "<b>", "index": 7}, 404),
            ({"kind": "counter"}, 400),
        ]
        for wrong, status in wrongs:
            assert client.get(SCENE, params=wrong).status_code == status
        for index in ("-1", "x", str(2**31)):
            got = client.get(SCENE, params={"kind": "counter", "index": index})
            assert got.status_code == 400


HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
SAY = """
const [text, done] = arguments;
import("/page/answer.js").then(({ Answer }) => {
  const token = { token: text, logprob: -1, top_logprobs: [{ token: text, logprob: -1 }] };
  const answer = new Answer(document.getElementById("guided"));
  answer.said({ choices: [{ delta: { content: text }, logprobs: { content: [token] } }] });
  answer.said({ choices: [], cmg: { n_changed: 1, changed: [{ index: 0, plain: text }] } });
  done();
});
"""


@pytest.fixture
def browser() -> Any:
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="no selenium: pip install 'cmg-gguf[test]'"
    )
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    driver.set_script_timeout(10)
    yield driver
    driver.quit()


def by_id(browser: Any, name: Any) -> Any:
    return browser.find_element("id", name)


def test_asks_for_the_key_and_marks_what_guidance_changed(browser: Any, tmp_path: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    picture = tmp_path / "<img src=x onerror=alert(1)>.png"
    picture.write_bytes(base64.b64decode(data_url().partition(",")[2]))
    defaults = Defaults(guidance=replace(embedded_guidance(), alpha=0.5))  # the page alone has 1
    with serving(keys=[KEY], defaults=defaults) as served:
        browser.get(served.url)
        wait = WebDriverWait(browser, 60)
        by_id(browser, "file").send_keys(str(picture))
        wait.until(lambda _: by_id(browser, "picture").is_displayed())
        assert by_id(browser, "name").text == picture.name
        by_id(browser, "ask").click()
        wait.until(lambda _: by_id(browser, "key").is_displayed())
        by_id(browser, "key").send_keys(KEY)
        wait.until(lambda _: by_id(browser, "ask").is_enabled())
        by_id(browser, "ask").click()
        wait.until(lambda _: "complete" in by_id(browser, "status").text)
        plain, guided = by_id(browser, "plain").text, by_id(browser, "guided").text
        (mark, *_) = browser.find_elements("css selector", "#guided mark")
        assert plain != guided
        assert guided.partition(mark.text)[0] == plain[: guided.index(mark.text)]
        assert by_id(browser, "alpha").get_attribute("value") == "0.5"
        browser.execute_script("arguments[0].focus()", mark)
        shown = "return getComputedStyle(arguments[0], '::after').content"
        assert "Likeliest" in browser.execute_script(shown, mark)
        assert len(browser.find_elements("css selector", "img")) == 1


ASK_MAP = """
const done = arguments[0];
import("/page/heat.js").then(({ Heat }) => {
  const heat = new Heat(arguments_heat);
  const map = (k, scale) => Array.from(heat.map([1], 1, scale, 28, 28, k));
  done([Array.from(heat.of([0, 2], "mean")), map(0, "relative"), map(1, "relative"),
    map(1, "absolute")]);
});
"""


def test_a_word_shows_its_heat_from_the_keyboard(browser: Any, tmp_path: Any) -> None:
    from selenium.webdriver.support.ui import Select, WebDriverWait

    picture = tmp_path / "scene.png"
    picture.write_bytes(base64.b64decode(data_url().partition(",")[2]))
    with serving() as served:
        browser.get(served.url)
        wait = WebDriverWait(browser, 60)
        by_id(browser, "file").send_keys(str(picture))
        wait.until(lambda _: by_id(browser, "picture").is_displayed())
        by_id(browser, "ask").click()
        wait.until(lambda _: "complete" in by_id(browser, "status").text)
        assert not by_id(browser, "heat").is_displayed()
        doubted = browser.find_elements("css selector", ".doubt")
        assert doubted
        assert all("supports" in word.get_attribute("data-tip") for word in doubted)
        word = browser.find_elements("css selector", "#guided .word")[-1]
        browser.execute_script("arguments[0].focus()", word)
        word.send_keys("\n")
        wait.until(lambda _: by_id(browser, "heat").is_displayed())
        assert f"“{word.text}”" in by_id(browser, "heat-h").text
        drawn = "return document.getElementById('map').toDataURL()"
        maps = [browser.execute_script(drawn)]
        for name, value in (("layer", "0"), ("scale", "absolute")):
            Select(by_id(browser, name)).select_by_value(value)
            maps.append(browser.execute_script(drawn))
        assert len(set(maps)) == 3
        assert by_id(browser, "ticks").text.split() == ["0.25x", "1x", "4x", "16x"]
        assert "strongest" in by_id(browser, "map").get_attribute("aria-label")
        assert browser.get_log("browser") == []


def test_each_of_two_pictures_has_its_map(browser: Any, tmp_path: Any) -> None:
    from selenium.webdriver.support.ui import Select, WebDriverWait

    pictures = [tmp_path / f"{i}.png" for i in range(2)]
    for i, picture in enumerate(pictures):
        picture.write_bytes(base64.b64decode(data_url(i).partition(",")[2]))
    with serving() as served:
        browser.get(served.url)
        wait = WebDriverWait(browser, 60)
        by_id(browser, "file").send_keys("\n".join(map(str, pictures)))
        wait.until(lambda _: by_id(browser, "picture").is_displayed())
        assert by_id(browser, "name").text == "0.png, 1.png"
        by_id(browser, "ask").click()
        wait.until(lambda _: by_id(browser, "export").is_enabled())
        browser.find_elements("css selector", "#guided .word")[-1].send_keys("\n")
        assert by_id(browser, "heat").is_displayed()
        drawn = "return document.getElementById('map').toDataURL()"
        first = browser.execute_script(drawn)
        Select(by_id(browser, "which")).select_by_visible_text("2")
        assert browser.execute_script(drawn) != first
        assert browser.get_log("browser") == []


def test_a_drawn_scene_is_taken(browser: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    with serving(draws_scenes=True) as served:
        browser.get(served.url)
        wait = WebDriverWait(browser, 60)
        wait.until(lambda _: by_id(browser, "scene").is_displayed())
        by_id(browser, "scene").click()
        wait.until(lambda _: by_id(browser, "picture").is_displayed())
        assert by_id(browser, "name").text.startswith("typical scene ")
        width = "return document.getElementById('picture').naturalWidth"
        wait.until(lambda _: browser.execute_script(width) == 112)


def test_the_pages_maps_are_the_librarys(browser: Any) -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([[x, y, x + 14, y + 14] for y in (0, 14) for x in (0, 14)], float)
    weights = rng.random((3, 2, 8), np.float32).astype(np.float16).astype(np.float32)
    images = tuple(Picture(28, 28, (Tile(first, 4, boxes),)) for first in (0, 4))
    heat = Heat(weights, (0, 1), (1,), images)
    script = ASK_MAP.replace("arguments_heat", json.dumps(heat_block(heat)))
    with serving() as served:
        browser.get(served.url)
        mean, *relative, absolute = browser.execute_async_script(script)
    np.testing.assert_allclose(mean, heat.of([0, 2], relative=False), rtol=1e-6)
    for k, found in enumerate(relative):
        np.testing.assert_allclose(found, heat.map(k, [1], layer=1).ravel(), rtol=1e-6)
    evenly = 0.5 / 28**2  # of each picture's half
    expected = heat.map(1, [1], layer=1, relative=False).ravel() / evenly
    np.testing.assert_allclose(absolute, expected, rtol=1e-6)


EXPORT = """
const [text, done] = arguments;
import("/page/export.js").then(({ exported }) => {
  const answer = document.createElement("p");
  const mark = document.createElement("mark");
  mark.textContent = text;
  mark.dataset.tip = `"${text}`;
  answer.append(text, mark);
  const map = { title: text, url: "data:,", label: text, scale: text };
  done(exported({ pictures: ["data:,"], question: text, plain: answer, guided: answer, note: text,
    map, request: text }));
});
"""


def test_an_exported_comparison_holds_all_as_text_and_needs_nothing_else(
    browser: Any, tmp_path: Any
) -> None:
    with serving() as served:
        browser.get(served.url)
        text = browser.execute_async_script(EXPORT, HOSTILE)
    page = tmp_path / "comparison.html"
    page.write_text(text, "utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/1999/xhtml)", text)
    browser.get(page.as_uri())
    assert browser.title == "cmg-gguf: plain and guided"
    assert browser.find_elements("css selector", "script, [onerror], img[src=x]") == []
    assert [m.text for m in browser.find_elements("css selector", "mark")] == [HOSTILE] * 2
    assert by_tag(browser, "pre") == HOSTILE
    assert by_tag(browser, "mark", "title") == f'"{HOSTILE}'


def test_layers_gate_and_rows_are_those_that_are_filled_in(browser: Any, monkeypatch: Any) -> None:
    from selenium.webdriver.support.ui import Select, WebDriverWait

    asked: list[Any] = []
    request = Service.request

    def noted(self: Service, *args: Any, **given: Any) -> Any:
        asked.append(given["cmg"])
        return request(self, *args, **given)

    monkeypatch.setattr(Service, "request", noted)
    with serving() as served:
        browser.get(served.url)
        browser.find_element("css selector", "form summary").click()
        for name, value in (("start", "0.5"), ("gate", "2")):
            by_id(browser, name).send_keys(value)
        Select(by_id(browser, "scope")).select_by_visible_text("decode")
        by_id(browser, "ask").click()
        WebDriverWait(browser, 60).until(lambda _: "complete" in by_id(browser, "status").text)
    settings = {
        "layers": {"rule": "layer_range", "start": 0.5, "stop": 1},
        "gate": {"rule": "disagreement", "factor": 2},
        "scope": "decode",
    }
    assert settings in asked
    assert "off" in asked


def test_the_history_brings_an_answer_back_with_its_maps(browser: Any, tmp_path: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    picture = tmp_path / "scene.png"
    picture.write_bytes(base64.b64decode(data_url().partition(",")[2]))
    said = []
    with serving() as served:
        browser.get(served.url)
        wait = WebDriverWait(browser, 60)
        by_id(browser, "file").send_keys(str(picture))
        wait.until(lambda _: by_id(browser, "picture").is_displayed())
        for question in ("Describe the image.", HOSTILE):
            by_id(browser, "question").clear()
            by_id(browser, "question").send_keys(question)
            by_id(browser, "ask").click()
            wait.until(lambda _: by_id(browser, "export").is_enabled())
            said.append(by_id(browser, "guided").text)
        assert said[0] != said[1]
        browser.find_element("css selector", "#past summary").click()
        newest, first = browser.find_elements("css selector", "#history button")
        assert newest.text == HOSTILE
        first.click()
        assert by_id(browser, "guided").text == said[0]
        assert by_id(browser, "question").get_attribute("value") == "Describe the image."
        browser.find_elements("css selector", "#guided .word")[-1].send_keys("\n")
        assert by_id(browser, "heat").is_displayed()


def test_a_comparison_is_saved_with_the_open_map(browser: Any, tmp_path: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    picture = tmp_path / "scene.png"
    picture.write_bytes(base64.b64decode(data_url().partition(",")[2]))
    saved = tmp_path / "comparison.html"
    browser.execute_cdp_cmd(
        "Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    with serving() as served:
        browser.get(served.url)
        wait = WebDriverWait(browser, 60)
        by_id(browser, "file").send_keys(str(picture))
        wait.until(lambda _: by_id(browser, "picture").is_displayed())
        assert not by_id(browser, "export").is_enabled()
        by_id(browser, "ask").click()
        wait.until(lambda _: by_id(browser, "export").is_enabled())
        browser.find_elements("css selector", "#guided .word")[-1].send_keys("\n")
        guided = by_id(browser, "guided").text
        by_id(browser, "export").click()
        wait.until(lambda _: saved.exists())
    browser.get(saved.as_uri())
    assert guided in browser.find_element("tag name", "body").text
    pictures = browser.find_elements("css selector", "img[src^='data:image/png']")
    widths = [browser.execute_script("return arguments[0].naturalWidth", p) for p in pictures]
    assert widths == [112, 512]


def by_tag(browser: Any, name: Any, attribute: Any = "textContent") -> Any:
    return browser.find_element("css selector", name).get_attribute(attribute)


def test_what_a_model_says_is_never_markup(browser: Any) -> None:
    with serving() as served:
        browser.get(served.url)
        title = browser.title
        browser.execute_async_script(SAY, HOSTILE)
        assert by_id(browser, "guided").text == HOSTILE
        assert by_id(browser, "guided").find_elements("css selector", "img, script") == []
        assert browser.title == title
        assert browser.get_log("browser") == []
