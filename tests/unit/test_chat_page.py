"""The chat page as it is served: who may read it, its headers, and that it is whole and keeps to itself."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from swarm.client.http.site import PAGE
from swarm.net.virtual_time import in_virtual_time
from tests.unit.test_http_api import api

FILES = sorted(file.name for file in PAGE.iterdir())
IMPORT = re.compile(r'^import .* from "\./([\w.]+)";$', re.MULTILINE)
ADDRESS = re.compile(r"https?://(?!www\.w3\.org/2000/svg)[\w.]+\w")


class Tags(HTMLParser):
    """What the page refers to, the elements it names, and whether its markup does anything."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []
        self.ids: list[str] = []
        self.acts = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.files += [str(named[name]) for name in ("src", "href") if name in named]
        self.ids += [str(named["id"])] if "id" in named else []
        self.acts |= any(name.startswith("on") or name == "style" for name in named)


def text(name: str) -> str:
    return (PAGE / name).read_text()


@pytest.fixture
def tags() -> Tags:
    tags = Tags()
    tags.feed(text("page.html"))
    return tags


@in_virtual_time
async def test_the_page_and_its_files_need_no_key() -> None:
    async with api(site={"keys": ("one",)}) as it:
        page = await it.http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "<main>" in page.text
        for name in FILES:
            if name != "page.html":
                assert (await it.http.get(f"/page/{name}")).status_code == 200
        assert (await it.http.get("/v1/models")).status_code == 401
        for path in ("/page/page.html", "/page/", "/page/..%2fsite.py", "/page/none.js"):
            assert (await it.http.get(path)).status_code == 404
        assert (await it.http.post("/")).status_code == 405


@in_virtual_time
async def test_a_local_page_is_shown_under_its_own_name_alone() -> None:
    async with api() as it:
        for path in ("/", "/page/main.js"):
            assert (await it.http.get(path, headers={"host": "evil.example"})).status_code == 403


@in_virtual_time
async def test_the_page_may_load_nothing_from_elsewhere() -> None:
    async with api() as it:
        for path in ("/", "/page/main.js", "/page/page.css"):
            headers = (await it.http.get(path)).headers
            policy = dict(
                part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            allowed = {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")}
            assert allowed == {"'self'"}
            assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
            assert policy["require-trusted-types-for"] == "'script'"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"


@in_virtual_time
async def test_browsers_keep_what_is_the_same() -> None:
    async with api() as it:
        first = await it.http.get("/page/main.js")
        again = await it.http.get("/page/main.js", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = await it.http.get("/page/page.css", headers={"if-none-match": first.headers["etag"]})
        assert other.status_code == 200


def test_the_page_refers_to_what_there_is(tags: Tags) -> None:
    files = [name for name in tags.files if not name.startswith("#")]
    assert {Path(name).parent for name in files} == {Path("page")}
    assert {Path(name).name for name in files} <= set(FILES)
    assert not tags.acts
    assert len(set(tags.ids)) == len(tags.ids)


def test_every_module_is_used_and_there(tags: Tags) -> None:
    reached, left = set[str](), {"main.js"}
    while left:
        name = left.pop()
        reached.add(name)
        left |= set(IMPORT.findall(text(name))) - reached
    assert reached == {name for name in FILES if name.endswith(".js")}


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host_or_makes_markup(name: str) -> None:
    code = text(name)
    assert not ADDRESS.search(code)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", code
    )


def test_what_scripts_look_for_is_on_the_page(tags: Tags) -> None:
    wanted = set(re.findall(r'place\("([\w-]+)"\)', text("main.js"))) | {"status"}
    assert wanted <= set(tags.ids)
