"""Texts in which tokenizers differ, by what is in them."""

from __future__ import annotations

TEXTS = {
    "nothing": "",
    "english": "The quick brown fox; it's 3.14159 o'clock.",
    "chinese": "深度学习是机器学习的一个分支。",
    "emoji": "🙂👩‍👩‍👧‍👦🇩🇪 ok",
    "accents": "Zwölf große Boxkämpfer — e\u0301 ﬁ",
    "code": "def f(x):\n\treturn {'a': x[1:],  'b': None}\n",
    "spaces": "  two  and\n\n\nthree   ",
    "special": "<s>hi</s><|user|> there </s>",
}
