"""The page at `/`: served without a key, under a strict policy, with nothing inline."""

from __future__ import annotations

import re

import pytest
from served import serving

from cmg_gguf.server.web import ASSETS, HEADERS

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def locked():
    with serving(keys=[KEY]) as served, served.client() as client:
        yield client


@pytest.mark.parametrize("path", ASSETS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_assets_need_no_key_and_have_policy_and_type(locked, path, method):
    response = locked.request(method, path)
    assert response.status_code == 200
    assert response.headers["content-type"] == f"{ASSETS[path][1]}; charset=utf-8"
    assert response.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_other_paths_need_the_key(locked):
    assert locked.get("/page/other.js").status_code == 401
    assert locked.get("/v1/models").status_code == 401


def test_index_has_nothing_inline_and_nothing_from_elsewhere(locked):
    text = locked.get("/").text
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://", text)
    assert all(re.search(r'src="/page/', tag) for tag in re.findall("<script[^>]*>", text))
    assert set(re.findall(r'"(/page/[^"]+)"', text)) <= set(ASSETS)


def test_scripts_make_no_markup_of_text(locked):
    for path in ASSETS:
        assert not re.search(
            "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", locked.get(path).text
        )
