"""Markdown on the chat page, in a browser: what a text is there, and that none does any harm."""

from typing import Any

import pytest

from tests.chat_swarm import LESSON, chat

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


def p(inside: str) -> str:
    return f"<p>{inside}</p>"


def a(address: str, inside: str = "") -> str:
    return f'<a href="{address}">{inside or address}</a>'


MARKDOWN = [
    ("", ""),
    ("plain", p("plain")),
    (
        "**a** *b* ***c*** _d_ snake_case_name ~~e~~ ~f~",
        p(
            "<strong>a</strong> <em>b</em> <em><strong>c</strong></em> <em>d</em> "
            "snake_case_name <del>e</del> ~f~"
        ),
    ),
    ("**foo*bar**baz* 2 * 3 * 4", p("<strong>foo*bar</strong>baz* 2 * 3 * 4")),
    ("`a` ``b`c`` `` ` `` `open", p("<code>a</code> <code>b`c</code> <code>`</code> `open")),
    (
        '[x](https://a.example/b_(c) "t") [y](javascript:alert(1)) ![z](https://a.example/z.png)',
        p(
            a("https://a.example/b_(c)", "x")
            + " [y](javascript:alert(1)) "
            + a("https://a.example/z.png", "z")
        ),
    ),
    ("[a [b](https://b.example/) c] [d] ] [e](", p(f"[a {a('https://b.example/', 'b')} c] [d] ] [e](")),
    (
        "https://a.example/b_(c), (www.b.example/) xhttps://c.example http://",
        p(
            f"{a('https://a.example/b_(c)')}, ({a('https://www.b.example/', 'www.b.example/')}) "
            "xhttps://c.example http://"
        ),
    ),
    ("<https://a.example/> <b>bold</b>", p(f"{a('https://a.example/')} &lt;b&gt;bold&lt;/b&gt;")),
    ("a<br>b &lt;&#65;&#x1F600; &unknown; \\*c\\* \\q", p("a<br>b &lt;A😀 &amp;unknown; *c* \\q")),
    ("one\ntwo  \nthree\\\nfour", p("one<br>two<br>three<br>four")),
    (
        "\\(x_1^2\\) and $$y$$, 5$ and 6$",
        p('<code class="math">x_1^2</code> and <code class="math">y</code>, 5$ and 6$'),
    ),
    ("$$\nx\n= y\n$$\n\n$$ open", '<pre><code class="math">x\n= y</code></pre>' + p("$$ open")),
    ("# One\n###### Six #\n#none", "<h3>One</h3><h4>Six</h4>" + p("#none")),
    ("a\n---\nb\n***\n- - -", p("a") + "<hr>" + p("b") + "<hr><hr>"),
    (
        "- a\n- b\n  - c\n     1. d\n- e",
        "<ul><li>a</li><li>b<ul><li>c<ol><li>d</li></ol></li></ul></li><li>e</li></ul>",
    ),
    (
        "- [x] a\n- [ ] b",
        '<ul><li class="task"><input type="checkbox" disabled="" checked="" aria-label="Done">a</li>'
        '<li class="task"><input type="checkbox" disabled="" aria-label="To do">b</li></ul>',
    ),
    ("1. a\n\n   b\n\n2. c", f'<ol class="loose"><li>{p("a")}{p("b")}</li><li>{p("c")}</li></ol>'),
    ("3) a\n4) b\n- c\n* d", '<ol start="3"><li>a</li><li>b</li></ol><ul><li>c</li></ul><ul><li>d</li></ul>'),
    (
        "1. a\n```sh\nx\n```\n2. b",
        '<ol><li>a</li></ol><pre class="sh">x</pre><ol start="2"><li>b</li></ol>',
    ),
    (
        "> a\nlazy\n> > b\n\nc",
        f"<blockquote>{p('a<br>lazy')}<blockquote>{p('b')}</blockquote></blockquote>{p('c')}",
    ),
    ("```js\nlet a;\n\n  b\n```\nafter", '<pre class="js">let a;\n\n  b</pre>' + p("after")),
    ("~~~\n```\n~~~", '<pre class="text">```</pre>'),
    ("```\nopen\n**b**", '<pre class="text">open\n**b**</pre>'),
    (
        "| a | b |\n|:-:|--:|\n| `x|y` | \\| |\n| 2 |\nend",
        '<table><thead><tr><th class="center">a</th><th class="end">b</th></tr></thead><tbody>'
        '<tr><td class="center"><code>x|y</code></td><td class="end">|</td></tr>'
        '<tr><td class="center">2</td><td class="end"></td></tr></tbody></table>' + p("end"),
    ),
    ("a | b\n---", p("a | b") + "<hr>"),
]
"""Texts, and what they are on the page, without what only makes them accessible."""

SHOWN = """async texts => {
    const { MarkdownView } = await import("/page/show_markdown.js");
    return texts.map((text) => {
        const { element } = (() => { const view = new MarkdownView(); view.update(text); return view; })();
        for (const code of element.querySelectorAll(".code")) {
            const plain = document.createElement("pre");
            plain.className = code.querySelector(".bar span").textContent;
            plain.textContent = code.querySelector("code").textContent;
            code.replaceWith(plain);
        }
        for (const wide of element.querySelectorAll(".wide, li > span")) wide.replaceWith(...wide.childNodes);
        const extra = ["tabindex", "role", "target", "rel", "scope"];
        for (const one of element.querySelectorAll("*")) extra.forEach((name) => one.removeAttribute(name));
        for (const one of element.querySelectorAll("pre")) one.removeAttribute("aria-label");
        for (const one of element.querySelectorAll("th.start, td.start")) one.removeAttribute("class");
        return element.innerHTML;
    });
}"""

GROWN = """async text => {
    const { MarkdownView } = await import("/page/show_markdown.js");
    const [grown, whole] = [new MarkdownView(), new MarkdownView()];
    for (let end = 0; end <= text.length; end += 1) grown.update(text.slice(0, end));
    const first = grown.element.firstChild;
    whole.update(text);
    grown.update(text);
    return [grown.element.innerHTML === whole.element.innerHTML, grown.element.firstChild === first];
}"""


async def test_markdown(browser: Any) -> None:
    async with chat(browser) as it:
        found = await it.page.evaluate(SHOWN, [text for text, _ in MARKDOWN])
        for (text, expected), shown in zip(MARKDOWN, found, strict=True):
            assert shown == expected, text
        assert await it.page.evaluate(GROWN, LESSON) == [True, True], (
            "a text that grows is like one that is there"
        )


HOSTILE = [
    "[",
    "![",
    "*a ",
    "> ",
    "- ",
    "`",
    "*",
    "\\(",
    "$$",
    "\\[\n",
    "|",
    "<",
    "&#",
    "http://",
    "_a*b",
    "[a](",
    "\n",
]


async def test_no_text_holds_the_page_up(browser: Any) -> None:
    async with chat(browser) as it:
        seconds = await it.page.evaluate(
            "async parts => { const { blocksOf } = await import('/page/markdown.js');"
            " const { MarkdownView } = await import('/page/show_markdown.js');"
            " const texts = parts.flatMap(part => [part.repeat(3000), `- a\\n${part.repeat(3000)}](http://a)${part}`]);"
            " return texts.map(text => { const from = performance.now(); blocksOf(text);"
            " new MarkdownView().update(text); return (performance.now() - from) / 1000 }) }",
            HOSTILE,
        )
        assert max(seconds) < 2.0, dict(zip(HOSTILE, seconds[::2], strict=True))


EVIL = """\
<img src=x onerror=alert(1)> <script>alert(2)</script><svg onload=alert(3)>

[run](javascript:alert(4)) [data](data:text/html,x) ![track](https://evil.example/pixel.png)
[html](https://a.example/"onmouseover="alert(5)) <https://b.example/<b>>

```<b>&"'
</code></pre><img src=y onerror=alert(6)>
```

| <iframe src=//evil.example> | `<b>` |
|---|---|
| <style>*{display:none}</style> | &lt;b&gt; |
"""


async def test_what_a_model_writes_is_text(browser: Any) -> None:
    async with chat(browser) as it:
        it.script.answer("u:Evil.\na:", EVIL)
        await it.ask("Evil.")
        harm = "script, img, iframe, svg:not(.icon), style, [onerror], [onload], [onmouseover], b"
        assert await it.page.locator(f"#thread :is({harm})").count() == 0
        links = await it.answer.locator("a").evaluate_all(
            "links => links.map(link => new URL(link.href).protocol)"
        )
        assert set(links) == {"https:"}
        said = await it.answer.inner_text()
        for text in (
            "<img src=x onerror=alert(1)>",
            "<script>alert(2)</script>",
            "javascript:alert(4)",
            "<iframe",
        ):
            assert text in said
        assert not await it.reader.barriers()
