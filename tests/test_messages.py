"""Messages are read in one way, whoever reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eightfold import LLM, SamplingParams
from eightfold.cli.batch_input import OwnBatch, read_batch
from eightfold.engine.reasoning import Thinking
from eightfold.errors import InputError
from eightfold.messages import MessageError, read_messages
from eightfold.quant import dataset
from eightfold.tokenizer import Tokenizer
from tests.conftest import write_model
from tests.conversations import CONVERSATIONS, TEMPLATE, USER, called


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_model(tmp_path_factory.mktemp("talks") / "model")
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, threads=1, max_num_seqs=1)


def of_llm(llm: LLM, messages: list[Any], path: Path) -> list[int]:
    return list(llm.chat(messages, SamplingParams(max_tokens=1))[0].prompt_ids)


def of_input_file(llm: LLM, messages: list[Any], path: Path) -> list[int]:
    path.write_text(json.dumps({"messages": messages}))
    batch = read_batch(path, {}, ())
    assert isinstance(batch, OwnBatch)
    (request,) = batch.requests
    return request.encode(llm.engine.tokenizer, Thinking(llm.engine.tokenizer))


def of_calibration(llm: LLM, messages: list[Any], path: Path) -> list[int]:
    path.write_text(json.dumps({"messages": messages}))
    (ids,) = dataset.tokenize(dataset.read_rows(path), llm.engine.tokenizer)
    return ids


READERS = (of_llm, of_input_file, of_calibration)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("read", READERS)
def test_every_reader_makes_the_same_prompt(llm, tmp_path, read, name):
    messages, expected = CONVERSATIONS[name]
    if name == "continued" and read is of_calibration:  # which has no answers to come
        expected += "]"
    assert llm.engine.tokenizer.decode(read(llm, messages, tmp_path / "f.jsonl"), keep_special=True) == expected


@pytest.mark.parametrize("read", READERS)
def test_every_reader_refuses_the_same_in_the_same_words(llm, tmp_path, read):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]
    arguments = "messages[1].tool_calls[0].function.arguments: got text that is not JSON, expected a JSON object"
    for messages, expected in (
        ([USER, called("{")], arguments),
        (image, "messages[0].content[0]: this model reads text only, not image_url"),
        ([{"role": "", "content": "a"}], "messages[0].role: got '', expected system, user, assistant or tool"),
    ):
        with pytest.raises(InputError) as caught:
            read(llm, messages, tmp_path / "f.jsonl")
        assert str(caught.value).endswith(expected)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_was_read_can_be_read_again(directory, name):
    messages = CONVERSATIONS[name][0]
    once = read_messages(messages, TEMPLATE)
    assert read_messages(once, TEMPLATE) == once
    assert read_messages(read_messages(messages, None), TEMPLATE) == once


def test_the_place_has_the_name_that_was_given():
    with pytest.raises(MessageError) as caught:
        read_messages([{"role": "user", "content": [{"type": "input_audio"}]}], TEMPLATE, "input")
    assert str(caught.value) == "input[0].content[0]: this model reads text only, not input_audio"
    assert caught.value.is_media
    with pytest.raises(MessageError) as caught:
        read_messages(None, None, "turns")
    assert (str(caught.value), caught.value.is_media) == ("turns: got null, expected a list", False)


def test_llm_chat_names_the_conversation(llm):
    with pytest.raises(InputError, match=r"^messages\[1\]\[0\]\.content: got null, expected a text$"):
        llm.chat([[USER], [{"role": "user"}]])
    assert not llm.engine.has_unfinished


def test_a_developer_is_kept_where_the_template_knows_one(directory):
    tokenizer = Tokenizer(directory, "{% set known = 'developer' %}" + TEMPLATE)
    messages = read_messages([{"role": "developer", "content": "d"}], tokenizer.template_source())
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "[developer|d]"
