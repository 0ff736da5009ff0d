"""`eightfold chat`: a conversation in the terminal."""

from __future__ import annotations

import bisect
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console, generating
from eightfold.cli.options import argument, flags_of, in_flags
from eightfold.engine.settings import EngineConfig
from eightfold.errors import CapacityError, EightfoldError
from eightfold.files import write_whole
from eightfold.progress import unfiltered
from eightfold.values import TEXT, setting, whole

if TYPE_CHECKING:
    from eightfold.engine.engine import Engine
    from eightfold.engine.outputs import CompletionOutput, RequestOutput
    from eightfold.messages import Message
    from eightfold.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What the model is given: the conversation as the chat template renders it."""

    text: str
    token_ids: list[int]
    forgotten: int = 0  # turns that had to be dropped for it


class Conversation:
    """What was said so far.

    Attributes:
        system: what stands before all turns; None for nothing.
        turns: messages of the user and the model, in order.
    """

    def __init__(self, tokenizer: Tokenizer, room: int, system: str | None = None) -> None:
        """Begin a conversation; `room`: tokens that a prompt may have."""
        self._tokenizer, self._room, self.system = tokenizer, room, system
        self.turns: list[Message] = []
        self._known = Prompt("", [])  # the last prompt with its answer

    def messages(self, first: int = 0) -> list[Message]:
        """Return the system's message and the turns from one on."""
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self.turns[first:]

    def ask(self, text: str) -> Prompt:
        """Add what the user says and return the prompt; the oldest turns are dropped if it would be too long.

        Then so many are dropped that half of the room is free: the next turns find what is left in the cache.

        Raises:
            CapacityError: this message alone is too long. It is not added.
            InputError: the chat template refuses it. It is not added.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
            return prompt if len(prompt.token_ids) <= self._room else self._forget()
        except BaseException:
            self.take_back()
            raise

    def take_back(self) -> None:
        self.turns.pop()

    def answer(self, prompt: Prompt, text: str, token_ids: Sequence[int]) -> None:
        self.turns.append({"role": "assistant", "content": text})
        self._known = Prompt(prompt.text + text, [*prompt.token_ids, *token_ids])

    def _prompt(self, first: int = 0) -> Prompt:
        text = self._tokenizer.render_chat(self.messages(first), add_generation_prompt=True)
        return Prompt(text, self._encode(text))

    def _encode(self, text: str) -> list[int]:
        known = self._known
        if known.text and text.startswith(known.text):
            new = self._tokenizer.encode(text[len(known.text) :], special_tokens=False)
            if new and self._is_special(new[0]):
                return known.token_ids + new
        return self._tokenizer.encode(text, special_tokens=False)

    def _is_special(self, token: int) -> bool:
        return bool(self._tokenizer.decode([token], keep_special=True)) and not self._tokenizer.decode([token])

    def _forget(self) -> Prompt:
        """Drop the oldest turns until half of the room is free, or only the last message is left."""
        starts = [at for at, message in enumerate(self.turns) if message["role"] == "user"]
        fits = bisect.bisect_left(
            range(1, len(starts) - 1), True, key=lambda k: len(self._prompt(starts[k]).token_ids) <= self._room // 2
        )
        dropped = min(fits + 1, len(starts) - 1)
        prompt = self._prompt(starts[dropped])
        if len(prompt.token_ids) > self._room:
            raise CapacityError(
                "message",
                got=f"{len(prompt.token_ids)} tokens",
                expected=f"at most {self._room}, which leaves room for an answer",
                action="Shorten it, or raise --max-model-len.",
            )
        del self.turns[: starts[dropped]]
        return replace(prompt, forgotten=dropped)


HELP = """\
/reset              forget the conversation
/system TEXT        set the system prompt; - for none; without TEXT, show it
/save FILE          save the conversation as JSON, a line that `run --input-file` reads
/save --overwrite FILE
                    save it to a file that exists
/help               show this
/exit               end the chat, as Ctrl-D does
A line that ends in a backslash continues on the next line. Ctrl-C stops an answer.
To send a message that begins with a slash, put a blank before it."""


@dataclass(frozen=True, kw_only=True)
class ChatCommand:
    """Talk with a model; answers are shown as they are generated.

    Example: eightfold chat Llama-3.2-1B-w8a8 --system "Answer in one sentence."

    /help shows the commands. Ctrl-C stops an answer; Ctrl-C twice at the prompt, or Ctrl-D, ends the chat. Earlier
    turns stay in the cache, so only new tokens are computed. When the conversation outgrows the context, the oldest
    turns are forgotten, and a note says so.

    If the input is a pipe, each line is a turn; answers go to stdout and everything else to stderr.
    """

    model: Path = argument("DIR", generating.MODEL)
    system: str | None = setting(None, TEXT, "System prompt, before the conversation.")
    max_new_tokens: int = setting(1024, whole(1), "Stop an answer after N tokens.")
    chat_template: Path | None = generating.chat_template()
    sampling: dict[str, Any] = generating.sampling(
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", temperature=0.7
    )
    engine: dict[str, Any] = generating.engine(
        "max_model_len", "kv_memory", "speculate", "threads", "attention_mode", "dynamic"
    )

    def execute(self) -> None:
        if note := generating.idle_note(self.sampling):
            console.note(note)
        generating.sampling_params(self.sampling)  # what makes no sense is said before the model is loaded
        engine = self._load(generating.read_template(self.chat_template))
        from eightfold.model.native.model import PAGE

        stdout = unfiltered(sys.stdout)
        if isinstance(stdout, io.TextIOWrapper):
            stdout.reconfigure(errors="replace")  # a model may say what the terminal cannot show
        context = min(engine.max_model_len, engine.blocks.total * PAGE + 1)
        # An answer can have a quarter of the context, whatever was said before.
        room = max(context - min(self.max_new_tokens, context // 4), 1)
        is_typed = sys.stdin.isatty()
        kind = console.Terminal if is_typed else console.Pipe
        with kind() as screen:
            if is_typed:
                screen.note(f"{self.model.resolve().name}, {context} tokens of context. /help shows the commands.")
            conversation = Conversation(engine.tokenizer, room, self.system)
            talk = Talk(engine, conversation, screen, self.sampling, self.max_new_tokens, context)
            while (text := screen.read()) is not None and talk.hear(text):
                pass

    def _load(self, template: str | None) -> Engine:
        with console.loading():
            from eightfold.engine.engine import Engine
            from eightfold.format.directory import require_model
            from eightfold.tokenizer import Tokenizer

            require_model(self.model)
            tokenizer = Tokenizer(self.model, template)
            generating.require_template(tokenizer, "let the model continue a text: eightfold run DIR --prompt")
            engine = Engine.load(self.model, EngineConfig(max_num_seqs=1, **self.engine), tokenizer)
        for note in engine.notes:
            console.note(note)
        return engine


@dataclass(frozen=True)
class Talk:
    """A conversation with an engine: hears lines, which are messages or commands, and answers on a screen."""

    engine: Engine
    conversation: Conversation
    screen: console.Pipe
    sampling: dict[str, Any]
    max_new_tokens: int
    context: int

    def hear(self, text: str) -> bool:
        """Take a line; return whether there may be another. What cannot be done is said, and the chat goes on."""
        try:
            if text.startswith("/"):
                return self._obey(text)
            if text.strip():
                self._answer(text.removeprefix(" ") if text.startswith(" /") else text)
        except EightfoldError as error:
            self.screen.note(f"eightfold: {in_flags(error, flags_of(EngineConfig))}")
        return True

    def _obey(self, text: str) -> bool:
        name, _, rest = text.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self.conversation.turns.clear()
            self.screen.note("Forgotten.")
        elif name == "/system":
            self._set_system(rest.strip())
        elif name == "/save":
            self._save(rest.strip())
        elif name == "/help":
            self.screen.note(HELP)
        else:
            self.screen.note(f"{name} is no command: /help shows them. To say it, put a blank before it.")
        return True

    def _set_system(self, text: str) -> None:
        conversation = self.conversation
        if text:
            conversation.system = None if text == "-" else text
            turns = "; what was said is kept, /reset forgets it" if conversation.turns else ""
            self.screen.note(f"Set{turns}.")
        else:
            self.screen.note(conversation.system or "There is none.")

    def _save(self, rest: str) -> None:
        flag, _, name = rest.partition(" ")
        overwrites = flag == "--overwrite"
        path = Path((name if overwrites else rest).strip()).expanduser()
        if path.name == "":
            self.screen.note("/save FILE")
            return
        content = json.dumps({"messages": self.conversation.messages()}, ensure_ascii=False) + "\n"
        try:
            raw = content.encode("utf-8", "backslashreplace")
            if overwrites:
                write_whole(path, raw)
            else:
                with path.open("xb") as file:
                    file.write(raw)
        except FileExistsError:
            self.screen.note(f"{path} is there already: /save --overwrite {path} replaces it.")
        except OSError as error:
            self.screen.note(f"eightfold: {path}: {error.strerror or error}")
        else:
            self.screen.note(f"{len(self.conversation.turns)} messages are in {path}.")

    def _answer(self, text: str) -> None:
        prompt = self.conversation.ask(text)
        if prompt.forgotten:
            turns = "turn is" if prompt.forgotten == 1 else f"{prompt.forgotten} turns are"
            self.screen.note(f"The conversation has outgrown {self.context} tokens: the oldest {turns} forgotten.")
        limit = min(self.max_new_tokens, self.context - len(prompt.token_ids))
        try:
            self.engine.add_request(
                "chat", prompt.token_ids, generating.sampling_params(self.sampling, max_tokens=limit)
            )
        except EightfoldError:
            self.conversation.take_back()
            raise
        self._stream(prompt)

    def _stream(self, prompt: Prompt) -> None:
        """Show the answer to a request as it comes, and remember it as far as it came."""
        engine, times, output = self.engine, [time.monotonic()], None
        while engine.has_unfinished:
            outputs = engine.step()
            if self.screen.interrupted and (last := engine.abort("chat")) is not None:
                outputs.append(last)
            for output in outputs:
                times.append(time.monotonic())
                self.screen.write(output.outputs[0].delta_text)
        assert output is not None
        (answer,) = output.outputs
        self.conversation.answer(prompt, answer.text, answer.token_ids)
        self.screen.write("\n")
        self.screen.note(_summary(output, answer, times))


def _summary(output: RequestOutput, answer: CompletionOutput, times: list[float]) -> str:
    """Say what an answer took; `times`: when it was asked for, of the first token, and of those after it."""
    count = len(answer.token_ids)
    cached = f" ({output.cached_tokens} from the cache)" if output.cached_tokens else ""
    facts = [f"{len(output.prompt_ids)}{cached} + {count} tokens", f"first after {times[1] - times[0]:.2f} s"]
    if count > 1 and times[-1] > times[1]:
        facts.append(f"{(count - 1) / (times[-1] - times[1]):.1f} tok/s")
    if answer.finish_reason != "stop":
        facts.append({"abort": "stopped", "length": "cut off"}[str(answer.finish_reason)])
    return f"[{', '.join(facts)}]"
