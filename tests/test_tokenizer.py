"""Text, token ids and chat templates, as transformers has them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import eightfold
from eightfold.errors import CheckpointError, EightfoldError, InputError
from eightfold.tokenizer import Tokenizer, stop_token_ids
from tests.conftest import CHAT_TEMPLATE, write_tokenizer
from tests.texts import TEXTS

CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "What's deep learning?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好 🙂"}],
    "turns": [
        {"role": "user", "content": "  leading spaces\nand lines  "},
        {"role": "assistant", "content": "def f():\n    return '</s>'"},
        {"role": "user", "content": ""},
    ],
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer's directory, not to be changed."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The same, the test's own."""
    write_tokenizer(tmp_path)
    return tmp_path


def with_template(directory: Path, template: Any) -> Tokenizer:
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    set_config(directory, chat_template=template)
    return Tokenizer(directory)


def set_config(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def render(tokenizer: Tokenizer, messages: list[dict[str, Any]] | None = None, prompt: bool = True) -> str:
    return tokenizer.render_chat(messages or CHATS["question"], add_generation_prompt=prompt)


# --- against transformers


def assert_as_transformers(directory: Path, texts: Iterable[str]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ours = Tokenizer(directory)
    for text in texts:
        for special in (True, False):
            assert ours.encode(text, special_tokens=special) == theirs.encode(text, add_special_tokens=special)
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for messages in CHATS.values():
        for prompt in (True, False):
            rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.render_chat(messages, add_generation_prompt=prompt) == rendered
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode_chat(messages, add_generation_prompt=prompt) == ids


def test_tiny_tokenizer_as_transformers(shared):
    assert_as_transformers(shared, TEXTS.values())


@pytest.mark.golden
def test_real_tokenizer_as_transformers(smol):
    assert_as_transformers(smol / "smol-bf16", TEXTS.values())


# What templates in the field do, each in the words of one or more of them.
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "blocks on lines of their own": "{% for m in messages %}\n    {% if loop.first %}\nA{% endif %}\n{{ m.content }}\n"
    "  {% endfor %}\n\n{{ eos_token }}",
    "tools is none": "{% if tools is not none %}tools{% endif %}{% if documents is none %}plain{% endif %}",
    "tools is defined": "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}",
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ '<é>' | tojson(ensure_ascii=true) }}",
    "tojson by position": "{{ '<é>' | tojson(true, 1) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if not loop.first %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "generation has its own scope": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
    "undefined": "{{ enable_thinking is defined }}{{ nothing }}{{ messages[0].nothing }}",
    "strings": "{{ messages[0].content.strip().split('?')[0] | upper }}{{ messages[-1]['role'][::-1] }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ pad_token is defined }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_as_transformers(directory, template):
    transformers = pytest.importorskip("transformers")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    for messages in CHATS.values():
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render(Tokenizer(directory), messages) == rendered


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("said", ["Hello", " Hello,  ", "<think>\nOkay\n", "a\n\n", "", "Hi"])
def test_a_last_message_is_left_open_as_transformers_does(directory, said, trims):
    transformers = pytest.importorskip("transformers")
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim") if trims else CHAT_TEMPLATE
    (directory / "chat_template.jinja").write_text(template)
    theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ours = Tokenizer(directory).render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == rendered
    assert rendered.endswith(said.strip() if trims else said)
    assert messages[-1]["content"] == said


# --- tokenizer.json


def test_text_survives(shared):
    tokenizer = Tokenizer(shared)
    for name, text in TEXTS.items():
        if name != "special":
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_read_from_text_and_left_out_of_it(shared):
    tokenizer = Tokenizer(shared)
    assert tokenizer.encode("<s></s>") == [256, 257]
    assert tokenizer.decode([256, *tokenizer.encode("hi"), 257]) == "hi"


def test_special_tokens_can_be_kept(shared):
    tokenizer = Tokenizer(shared)
    ids = [256, *tokenizer.encode("hi"), 257]
    assert tokenizer.decode(ids, keep_special=True) == "<s>hi</s>"
    assert tokenizer.decode(ids, keep_special=False) == "hi"


def test_the_ids_that_a_model_puts_around_a_text_come_only_when_asked_for(directory):
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.processors import TemplateProcessing

    path = str(directory / "tokenizer.json")
    fast = FastTokenizer.from_file(path)
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast.save(path)
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode("a") == [256, *tokenizer.encode("a", special_tokens=False)]
    # A template writes its own: were BOS put before a chat, there would be two.
    with_bos = with_template(directory, "{{ bos_token }}a")
    assert with_bos.encode_chat([], add_generation_prompt=True) == tokenizer.encode("a")


# What transformers 4.43.1 and 4.57.1 encode "a" as, which is 64 here; <s> is 256 and </s> 257.
@pytest.mark.parametrize(
    ("settings", "add_bos", "expected"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast"}, None, [256, 64]),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, None, [256, 64]),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, None, [64]),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}, None, [256, 64, 257]),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "add_eos_token": True}, None, [64, 257]),
        ({"tokenizer_class": "LlamaTokenizerFast", "bos_token": {"content": "</s>"}}, None, [257, 64]),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": True}, None, [64]),
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}, None, [64]),
        ({"tokenizer_class": None}, None, [256, 64]),  # the class of the model in config.json
        ({"tokenizer_class": "LlamaTokenizer"}, False, [64]),
        ({"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, False, [64, 257]),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, True, [256, 64]),
        ({"tokenizer_class": "LlamaTokenizer"}, True, [256, 64]),
    ],
)
def test_bos_and_eos_stand_where_transformers_4_puts_them_or_the_user_wants_them(
    directory, settings, add_bos, expected
):
    (directory / "config.json").write_text('{"model_type": "llama"}')
    set_config(directory, **settings)
    tokenizer = Tokenizer(directory, add_bos=add_bos)
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", special_tokens=False) == [64]
    assert len(tokenizer.notes) == (add_bos is None and expected != [64])
    with_bos, without = (with_template(directory, text + "a") for text in ("{{ bos_token }}", ""))
    for template in (with_bos, without):
        chats = Tokenizer(directory, template.template_source(), add_bos=add_bos)
        bos = tokenizer.encode("<s>", special_tokens=False) if "bos_token" not in settings else [257]
        is_there = template is with_bos or add_bos is True
        assert chats.encode_chat([], add_generation_prompt=True) == [*(bos if is_there else []), 64]


def test_a_bos_that_is_no_token_is_refused_where_it_is_needed(directory):
    set_config(directory, bos_token="<nope>")
    assert Tokenizer(directory).encode("a") == [64]
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(directory, add_bos=True)
    assert str(caught.value) == f"bos_token in {directory}: got '<nope>', expected a token of tokenizer.json"
    set_config(directory, bos_token="\ud800")
    with pytest.raises(CheckpointError, match=r"expected a token of tokenizer\.json"):
        Tokenizer(directory, add_bos=True)
    set_config(directory, bos_token=None)
    with pytest.raises(CheckpointError, match=r"^BOS in .*: got none, expected bos_token in tokenizer_config.json"):
        Tokenizer(directory, add_bos=True)


def test_padding_and_truncation_in_the_file_are_ignored(directory):
    from tokenizers import Tokenizer as FastTokenizer

    path = str(directory / "tokenizer.json")
    expected = {text: Tokenizer(directory).encode(text) for text in TEXTS.values()}
    fast = FastTokenizer.from_file(path)
    fast.enable_padding(length=16, pad_id=258, pad_token="<|system|>")
    fast.enable_truncation(4)
    fast.save(path)
    assert len(FastTokenizer.from_file(path).encode(TEXTS["english"]).ids) == 16
    tokenizer = Tokenizer(directory)
    assert {text: tokenizer.encode(text) for text in TEXTS.values()} == expected


def test_a_missing_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json in .*got no such file.*Copy it from the float model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xff", b'{"version": "1.0", "model": {"type": "Nope"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer in .*tokenizer\.json: got .*, expected a tokenizers file"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["\ud800", "half \udcff", "ok 🙂 \ude42"])
def test_text_that_is_not_unicode_is_refused(shared, text):
    with pytest.raises(InputError, match=r"text: got character \d+ that is not Unicode"):
        Tokenizer(shared).encode(text)


# --- where a template comes from


def test_template_as_a_string_in_the_settings(directory):
    tokenizer = with_template(directory, "string {{ messages[0].role }}")
    assert tokenizer.has_chat_template
    assert render(tokenizer) == "string user"


def test_template_as_a_list_of_named_ones(directory):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default {{ eos_token }}"}]
    tokenizer = with_template(directory, named)
    assert tokenizer.has_chat_template
    assert render(tokenizer) == "default </s>"


def test_template_in_an_object_and_in_files_of_other_names(directory):
    assert render(with_template(directory, {"tool_use": "tools", "default": "object"})) == "object"
    only_tools = with_template(directory, {"tool_use": "tools", "rag": "x"})
    with pytest.raises(CheckpointError, match="got only those named tool_use or rag, expected"):
        render(only_tools)
    (directory / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert render(with_template(directory, None)) == "of a processor"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "default.jinja").write_text("additional")
    (directory / "additional_chat_templates" / "rag.jinja").write_text("other")
    assert render(with_template(directory, "settings")) == "additional"


def test_template_for_tools(directory):
    tokenizer = with_template(directory, {"tool_use": "tools {{ tools[0] }}", "default": "default"})
    assert render(tokenizer) == "default"
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages, add_generation_prompt=False, tools=["f"]) == "tools f"
    assert render(tokenizer) == "default"


def test_template_as_a_file_wins_over_the_settings(directory):
    set_config(directory, chat_template="settings")
    (directory / "chat_template.jinja").write_text("file ü", encoding="utf-8")
    assert render(Tokenizer(directory)) == "file ü"


def test_a_template_that_is_given_wins_over_the_models(directory):
    assert render(Tokenizer(directory, "given {{ eos_token }}")) == "given </s>"
    (directory / "chat_template.jinja").unlink()
    assert not Tokenizer(directory).has_chat_template
    tokenizer = Tokenizer(directory, chat_template="{{ messages[0].role }}")
    assert tokenizer.has_chat_template
    assert render(tokenizer) == "user"
    with pytest.raises(CheckpointError, match=r"^chat template: got .*, expected a jinja2 template$"):
        render(Tokenizer(directory, "{% for %}"))


@pytest.mark.parametrize(
    "template", [None, [], [{"name": "default", "template": 5}], 5, ["default"], {"default": None}]
)
def test_a_model_without_a_template_is_a_base_model(directory, template):
    tokenizer = with_template(directory, template)
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match=r"chat template in .*got none.*leave out `chat`"):
        render(tokenizer)


def test_a_template_that_is_no_template_is_named(directory):
    tokenizer = with_template(directory, "{% for m in messages %}")
    assert tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match=r"chat template in .*expected a jinja2 template"):
        render(tokenizer)
    (directory / "chat_template.jinja").write_bytes(b"ok\xff")
    with pytest.raises(CheckpointError, match=r"chat template in .*got byte 2 that is not UTF-8"):
        render(Tokenizer(directory))


# --- special tokens


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False, "special": True}])
def test_special_tokens_are_strings_or_objects(directory, token):
    set_config(directory, eos_token=token, bos_token=token)
    assert render(with_template(directory, "{{ bos_token }}|{{ eos_token }}")) == "</s>|</s>"


def test_special_tokens_come_from_either_file_and_the_settings_win(directory):
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "map", "unk_token": {"content": "U"}}))
    set_config(directory, eos_token="settings", pad_token=None)
    tokenizer = with_template(directory, "{{ eos_token }} {{ unk_token }} {{ bos_token }} {{ pad_token is defined }}")
    assert render(tokenizer) == "settings U <s> False"
    (directory / "tokenizer_config.json").unlink()
    (directory / "chat_template.jinja").write_text("{{ eos_token }} {{ bos_token is defined }}")
    assert render(Tokenizer(directory)) == "map False"


def test_special_tokens_that_are_no_text_are_left_out(directory):
    set_config(directory, eos_token=5, bos_token={"special": True}, unk_token=["x"])
    template = "{{ eos_token is defined }}{{ bos_token is defined }}{{ unk_token is defined }}"
    assert render(with_template(directory, template)) == "FalseFalseFalse"


# --- templates are a stranger's programs


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate."),
        ("{{ raise_exception('two\nlines') }}", "two lines"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7].content }}", "list object has no element 7"),
        ("{{ nothing.content }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages[0].content.index('z') }}", "substring not found"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ range(10**9) | length }}", "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."),
        ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
    ],
)
def test_a_template_that_refuses_or_fails_gives_one_clear_line(directory, template, message):
    tokenizer = with_template(directory, template)
    with pytest.raises(InputError) as failure:
        render(tokenizer)
    assert str(failure.value).startswith(f"messages: got {message}")
    assert str(failure.value).endswith(", expected roles and contents that the chat template accepts")
    assert "\n" not in str(failure.value)


BOMBS = {
    "loops within loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "the same of one list": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "a power that is computed while compiling": "{{ 10 ** (10 ** 9) }}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a long text that is not shown": "{% set a = 'a' * 10 ** 15 %}",
    "doubling": "{% set n = namespace(a='a') %}{% for i in range(40) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "lists of lists": (
        "{% set n = namespace(a=[]) %}{% for i in range(40) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}"
    ),
    "padding": "{{ 'a'.center(10 ** 10) }}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "a replacement of nothing": "{{ ('a' * 10 ** 6).replace('', 'b' * 10 ** 6) }}",
    "a conversation without end": "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "white space of JSON": "{{ [1] | tojson(indent=10 ** 10) }}",
}


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS)
def test_a_template_that_takes_too_much_is_stopped_and_the_next_is_rendered(directory, template, monkeypatch):
    monkeypatch.setattr("eightfold.template._idle", [])
    monkeypatch.setattr("eightfold.template.RENDER_SECONDS", 2)
    tokenizer = with_template(directory, template)
    with pytest.raises(CheckpointError) as failure:
        render(tokenizer)
    message = str(failure.value)
    assert message.startswith(f"chat template in {directory}: got more than ")
    assert message.endswith(", expected one that ends within its limits")
    assert render(Tokenizer(directory, "{{ messages[0].role }}")) == "user"


def test_a_message_of_a_template_is_cut(directory):
    with pytest.raises(InputError) as failure:
        render(with_template(directory, "{{ raise_exception('long ' * 10000) }}"))
    assert 300 < len(str(failure.value)) < 400


def test_an_interrupted_rendering_does_not_answer_the_next(directory, monkeypatch):
    tokenizer = with_template(directory, "{{ messages[0].role }}")
    assert render(tokenizer) == "user"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Not by `exec`: Python would remember an interrupt that left it, and end by SIGINT.
        patch.setattr("eightfold.template.json.loads", mock.Mock(side_effect=KeyboardInterrupt))
        render(tokenizer)
    assert render(tokenizer) == "user"


def test_the_program_that_renders_does_not_look_for_modules_where_it_is_called(directory, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('executed')")
    (tmp_path / "jinja2.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *sys.path])
    monkeypatch.setattr("eightfold.template._idle", [])
    assert render(with_template(directory, "{{ messages[0].role }}")) == "user"


def test_no_module_of_ours_hides_one_of_python():
    """The program that renders begins with our folder in its path."""
    names = {path.stem for path in Path(eightfold.__file__).parent.iterdir()}
    assert names & set(sys.stdlib_module_names) <= {"__main__"}


class PanicException(BaseException):
    """As pyo3 raises it."""


class Panicking:
    def __getattr__(self, name):
        def panic(*args, **kwargs):
            raise PanicException("index out of bounds: " + "x" * 1000)

        return panic


def test_a_panic_of_the_library_is_one_line(directory, monkeypatch):
    tokenizer = Tokenizer(directory)
    monkeypatch.setattr(tokenizer, "_fast", Panicking())
    for call, expected in (
        (lambda: tokenizer.encode("a"), "encodes every text"),
        (lambda: tokenizer.decode([1]), "decodes every token"),
    ):
        with pytest.raises(CheckpointError, match=f"expected one that {expected}") as failure:
            call()
        assert len(str(failure.value)) < 600


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ strftime_now.__closure__[0] }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))(1) }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ dict.mro() }}",
    "{{ self._TemplateReference__context.environment.globals }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_that_reaches_for_python_is_stopped(directory, template):
    with pytest.raises(InputError, match=r"^messages: got .*unsafe|^messages: got .*(undefined|no attribute)"):
        render(with_template(directory, template))


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ ''|attr('__class__') }}"]
)
def test_what_a_template_may_not_see_prints_as_nothing(directory, template):
    assert render(with_template(directory, template)) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages.pop() }}",
        "{% set _ = messages.clear() %}",
        "{% set _ = messages.reverse() %}",
        "{{ messages.insert(0, 1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{% set _ = messages[0].setdefault('x', 1) %}",
    ],
)
def test_a_template_cannot_change_what_it_is_given(directory, template):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InputError, match=r"got access to attribute '\w+' of '(list|dict)' object is unsafe"):
        render(with_template(directory, template), messages)
    assert messages == [{"role": "user", "content": "hi"}]


def test_one_template_renders_many_chats(directory):
    tokenizer = with_template(directory, "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}")
    assert [render(tokenizer) for _ in range(3)] == ["1", "1", "1"]


def test_the_date_is_there_for_templates_that_print_it(directory):
    assert render(with_template(directory, "{{ strftime_now('%Y')|int > 2000 }}")) == "True"


# --- stop tokens


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (5, 7, {5}),
        ([5, 6], 7, {5, 6}),
        (0, 7, {0}),
        (None, 7, {7}),
        (None, [7, 8], {7, 8}),
        ([], 7, set()),  # said, and said to be none
        (None, None, set()),
        ("5", None, set()),
        ([5, None, "6", True, 7.0], None, {5}),
        (True, None, set()),
    ],
)
def test_stop_tokens_are_those_of_the_generation_settings_else_the_configs(tmp_path, generation, config, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert stop_token_ids(tmp_path, {"eos_token_id": config}) == expected


@pytest.mark.parametrize(
    ("config", "expected"), [({"eos_token_id": 7}, {7}), ({"eos_token_id": None}, set()), ({}, set())]
)
def test_stop_tokens_without_generation_settings_are_the_configs(tmp_path, config, expected):
    assert stop_token_ids(tmp_path, config) == expected
    (tmp_path / "generation_config.json").write_text("{}")
    assert stop_token_ids(tmp_path, config) == expected


def test_damaged_generation_settings_are_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(EightfoldError, match=r"generation_config\.json"):
        stop_token_ids(tmp_path, {})
