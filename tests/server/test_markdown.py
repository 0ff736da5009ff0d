"""Markdown for the chat page: what is rendered how, and that a text that grows changes its last two blocks only."""

from __future__ import annotations

import pytest

from eightfold.server.chat_page import MAX_CHARS
from eightfold.server.markdown import blocks_of

TEXT = r"""# Title

A paragraph
of *two* lines with `code`.

Setext
------
- a
- b

  more of b
- c
    - d

> quoted
lazy

| a | b |
|---|--:|
| 1 | 2 |

```py
x = 1

y = 2
```
1. one

2. two

    indented
***
Then, \(x_1\):
$$
x_1
=
- y
$$
The end.
"""


def html_of(text):
    return "".join(block["html"] for block in blocks_of(text))


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("<b>x</b> &amp; <script>", "<p>&lt;b&gt;x&lt;/b&gt; &amp; &lt;script&gt;</p>\n"),
        ("<!-- x -->\n<div onclick=x>", "<p>&lt;!-- x --&gt;<br />\n&lt;div onclick=x&gt;</p>\n"),
        ("[a](https://x.y/z?a=1&b=2)", '<p><a href="https://x.y/z?a=1&amp;b=2">a</a></p>\n'),
        ("<mailto:a@b.c>", '<p><a href="mailto:a@b.c">mailto:a@b.c</a></p>\n'),
        (
            "[a](javascript:x) [b](data:x) [c](/d) [e](file:x)",
            "<p>[a](javascript:x) [b](data:x) [c](/d) [e](file:x)</p>\n",
        ),
        ('![an *im*"age](http://x/y.png)', '<p><a href="http://x/y.png">an im&quot;age</a></p>\n'),
        ("![](http://x/y.png)", '<p><a href="http://x/y.png">image</a></p>\n'),
        ("[![in](http://x/y.png) z](http://z)", '<p><a href="http://z">in z</a></p>\n'),
        ("~~a~~ **b**\nc", "<p><s>a</s> <strong>b</strong><br />\nc</p>\n"),
        ("```py x\n<a>\n", '<pre><code class="language-py">&lt;a&gt;\n</code></pre>\n'),
        (r"\(a_1 * b_1*\)", r'<p><span class="formula">\(a_1 * b_1*\)</span></p>' + "\n"),
        ("\\[\na_1 < *b*\n\\]", '<p><span class="formula">\\[\na_1 &lt; *b*\n\\]</span></p>\n'),
        (
            "$$a_1$$ and $b_1 c_1$",
            '<p><span class="formula">$$a_1$$</span> and <span class="formula">$b_1 c_1$</span></p>\n',
        ),
        (
            "So:\n\\[\nx\n=\n- 5_a_\n\\]\n*b*",
            '<p>So:</p>\n<p><span class="formula">\\[\nx\n=\n- 5_a_\n\\]</span></p>\n<p><em>b</em></p>\n',
        ),
        (
            "- a\n  $$\n  + b\n  $$\n- $$ c",
            '<ul>\n<li>a<p><span class="formula">$$\n+ b\n$$</span></p>\n</li>\n<li>$$ c</li>\n</ul>\n',
        ),
        ("\\[a\n\n$$\n\n\\]", "<p>[a</p>\n<p>$$</p>\n<p>]</p>\n"),
        ("$5 and *$10*, \\(, \\[ and $$", "<p>$5 and <em>$10</em>, (, [ and $$</p>\n"),
    ],
)
def test_what_becomes_of(text, html):
    assert html_of(text) == html


def test_the_side_of_a_cell_is_a_class_because_styles_are_against_the_policy():
    html = html_of("|a|b|c|\n|:-|-:|-|\n|1|2|3|")
    assert '<td class="left">1</td>\n<td class="right">2</td>\n<td>3</td>' in html
    assert "style" not in html


def test_a_text_that_grows_changes_its_last_two_blocks_only():
    ends = range(1, len(TEXT) + 1)
    whole = [blocks_of(TEXT[:end]) for end in ends]
    for before, after, end in zip(whole, whole[1:], ends[1:], strict=False):
        line = before[-2]["line"] if len(before) > 1 else 0
        rest = blocks_of("\n".join(TEXT[:end].split("\n")[line:]))
        moved = [{**block, "line": block["line"] + line} for block in rest]
        assert before[:-2] + moved == after


def test_the_endpoint_renders_texts(serve):
    answer = serve().post("/render", {"texts": ["a\n\n- b", ""]})
    assert answer.json() == {
        "rendered": [[{"line": 0, "html": "<p>a</p>\n"}, {"line": 2, "html": "<ul>\n<li>b</li>\n</ul>\n"}], []]
    }


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("a", "texts: got 'a', expected a list"),
        ([1], "texts[0]: got 1, expected a text"),
        (["a" * MAX_CHARS, "b"], "texts: got 131073 characters, expected at most 131072"),
    ],
)
def test_other_texts_are_refused(serve, texts, words):
    refused = serve().post("/render", {"texts": texts})
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, words)
    assert refused.json()["error"]["param"] == "texts"


def test_the_endpoint_needs_the_key(serve):
    running = serve({"api_keys": ("open sesame",)})
    assert running.post("/render", {"texts": []}).status_code == 401
    allowed = running.post("/render", {"texts": []}, headers={"authorization": "Bearer open sesame"})
    assert allowed.json() == {"rendered": []}
