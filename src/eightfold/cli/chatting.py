"""`eightfold chat`: a conversation in the terminal."""

from __future__ import annotations

import bisect
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console, generating
from eightfold.cli.options import flags_of, in_flags, model_argument
from eightfold.cli.screen import Pipe, Terminal
from eightfold.engine.settings import EngineConfig
from eightfold.errors import CapacityError, EightfoldError, InputError
from eightfold.files import parse_value, read_text, write_whole
from eightfold.hub.names import title_of
from eightfold.messages import Message, read_messages, words
from eightfold.progress import unfiltered
from eightfold.values import TEXT, setting, shorten, whole

if TYPE_CHECKING:
    from eightfold.engine.engine import Engine
    from eightfold.engine.outputs import CompletionOutput, RequestOutput
    from eightfold.engine.reasoning import ReasoningParser
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

    def take_back(self) -> str | None:
        """Forget the user's last message and what came behind it; return its text, None where there is none."""
        last = max((at for at, message in enumerate(self.turns) if message["role"] == "user"), default=None)
        if last is None:
            return None
        text: str = self.turns[last]["content"]
        del self.turns[last:]
        return text

    def answer(self, prompt: Prompt, text: str, token_ids: Sequence[int], message: Message | None = None) -> None:
        """Add what the model has said to a prompt: as text, as tokens, and as the message that it is."""
        self.turns.append(message or {"role": "assistant", "content": text})
        self._known = Prompt(prompt.text + text, [*prompt.token_ids, *token_ids])

    def tokens(self) -> int:
        """Return how many tokens the conversation takes."""
        if not self.messages():
            return 0
        return len(self._encode(self._rendered(self.messages(), opens_answer=False)))

    def load(self, messages: list[Message]) -> None:
        """Go on with a conversation; a first message of the system becomes what stands before all turns."""
        has_system = messages[0]["role"] == "system"
        self.system = messages[0]["content"] if has_system else None
        self.turns[:] = messages[1:] if has_system else messages

    def _prompt(self, first: int = 0) -> Prompt:
        text = self._rendered(self.messages(first), opens_answer=True)
        return Prompt(text, self._encode(text))

    def _rendered(self, messages: list[Message], *, opens_answer: bool) -> str:
        fitted = read_messages(messages, self._tokenizer.template_source())
        return self._tokenizer.render_chat(fitted, add_generation_prompt=opens_answer)

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


MAX_CONVERSATION_BYTES = 16 << 20  # of a file

# Command -> what stands behind it, and what it does.
COMMANDS = {
    "/retry": ("", "answer the last message again"),
    "/undo": ("", "take back the last message and its answer"),
    "/reset": ("", "forget the conversation"),
    "/system": ("TEXT", "set the system prompt; - for none; without TEXT, show it"),
    "/tokens": ("", "show how much of the context is used"),
    "/save": ("FILE", "save the conversation, as `run --input-file` reads it; --overwrite FILE replaces a file"),
    "/load": ("FILE", "go on with a conversation that was saved"),
    "/help": ("", "show this"),
    "/exit": ("", "end the chat, as Ctrl-D does"),
}
HELP = "\n".join(
    [
        *(f"{f'{name} {words}':14} {does}" for name, (words, does) in COMMANDS.items()),
        "Enter sends a message. Alt-Enter, or a backslash before Enter, begins a new line; pasted lines stay together.",
        "Ctrl-C stops an answer. To send a message that begins with a slash, put a blank before it.",
    ]
)


@dataclass(frozen=True, kw_only=True)
class ChatCommand:
    """Talk with a model; answers are shown as they are generated.

    Example: eightfold chat Llama-3.2-1B-w8a8 --system "Answer in one sentence."

    /help shows the commands: an answer can be given again (/retry), taken back (/undo), and a conversation saved and
    loaded. Alt-Enter begins a new line. Ctrl-C stops an answer; Ctrl-C twice at the prompt, or Ctrl-D, ends the chat.
    Earlier turns stay in the cache, so only new tokens are computed. When the conversation outgrows the context, the
    oldest turns are forgotten, and a note says so. What a model thinks before it answers is shown paler.

    If the input is a pipe, each line is a turn; answers go to stdout and everything else to stderr.
    """

    model: Path = model_argument("DIR", generating.MODEL)
    system: str | None = setting(None, TEXT, "System prompt, before the conversation.")
    max_new_tokens: int = setting(1024, whole(1), "Stop an answer after N tokens.")
    chat_template: Path | None = generating.chat_template()
    sampling: dict[str, Any] = generating.sampling(
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", temperature=0.7
    )
    draft_model: Path | None = generating.draft_model()
    engine: dict[str, Any] = generating.engine(
        "max_model_len", "kv_memory", "speculate", "draft_tokens", "threads", "attention_mode", "dynamic"
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
        with Terminal(tuple(COMMANDS)) if is_typed else Pipe() as screen:
            if is_typed:
                screen.note(f"{title_of(self.model)}, {context} tokens of context. /help shows the commands.")
            conversation = Conversation(engine.tokenizer, room, self.system)
            talk = Talk(engine, conversation, screen, self.sampling, self.max_new_tokens, context)
            while (text := screen.read()) is not None and talk.hear(text):
                pass

    def _load(self, template: str | None) -> Engine:
        with console.loading():
            from eightfold.engine.engine import Engine
            from eightfold.format.checkpoint import require_runnable
            from eightfold.tokenizer import Tokenizer

            require_runnable(self.model)
            tokenizer = Tokenizer(self.model, template)
            generating.require_template(tokenizer, "let the model continue a text: eightfold run DIR --prompt")
            config = EngineConfig(max_num_seqs=1, **self.engine, draft_model=self.draft_model)
            engine = Engine.load(self.model, config, tokenizer)
        for note in engine.notes:
            console.note(note)
        return engine


class Talk:
    """A conversation with an engine: hears lines, which are messages or commands, and answers on a screen.

    Args:
        engine: that answers.
        conversation: so far.
        screen: where it is shown.
        sampling: the options of sampling that were given.
        max_new_tokens: of an answer.
        context: tokens of prompt and answer together.
    """

    def __init__(
        self,
        engine: Engine,
        conversation: Conversation,
        screen: Pipe,
        sampling: dict[str, Any],
        max_new_tokens: int,
        context: int,
    ) -> None:
        from eightfold.engine.reasoning import Thinking

        self._engine, self._conversation, self._screen = engine, conversation, screen
        self._sampling, self._max_new_tokens, self._context = sampling, max_new_tokens, context
        self._thinking = Thinking(engine.tokenizer)
        self._obey: dict[str, Callable[[str], None]] = {
            "/retry": self._retry, "/undo": self._undo, "/reset": self._reset, "/system": self._set_system,
            "/tokens": self._count, "/save": self._save, "/load": self._load,
            "/help": lambda rest: screen.note(HELP),
        }  # fmt: skip

    def hear(self, text: str) -> bool:
        """Take a line; return whether there may be another. What cannot be done is said, and the chat goes on."""
        name, _, rest = text.strip().partition(" ")
        try:
            if not text.startswith("/"):
                if text.strip():
                    self._answer(text.removeprefix(" ") if text.startswith(" /") else text)
            elif name in ("/exit", "/quit"):
                return False
            elif name in self._obey:
                self._obey[name](rest.strip())
            else:
                self._screen.note(f"{name} is no command: /help shows them. To say it, put a blank before it.")
        except EightfoldError as error:
            self._screen.note(f"eightfold: {in_flags(error, flags_of(EngineConfig))}")
        return True

    def _retry(self, rest: str) -> None:
        turns = list(self._conversation.turns)
        text = self._conversation.take_back()
        if text is None:
            self._screen.note("There is no message yet.")
            return
        if "seed" in self._sampling:  # the same seed would give the same answer
            self._sampling = {**self._sampling, "seed": (self._sampling["seed"] + 1) % 2**63}
        elif generating.sampling_params(self._sampling).is_greedy:
            self._screen.note("The likeliest token is taken each time, so the answer is the same.")
        try:
            self._answer(text)
        except BaseException:
            self._conversation.turns[:] = turns
            raise

    def _undo(self, rest: str) -> None:
        text = self._conversation.take_back()
        self._screen.note("There is no message yet." if text is None else f"Taken back: {shorten(text)}")

    def _reset(self, rest: str) -> None:
        self._conversation.turns.clear()
        self._screen.note("Forgotten.")

    def _count(self, rest: str) -> None:
        self._screen.note(f"{self._size()}, {self._conversation.tokens()} of {self._context} tokens")

    def _size(self) -> str:
        count = len(self._conversation.turns)
        return "1 message" if count == 1 else f"{count} messages"

    def _set_system(self, text: str) -> None:
        conversation = self._conversation
        if text:
            conversation.system = None if text == "-" else text
            turns = "; what was said is kept, /reset forgets it" if conversation.turns else ""
            self._screen.note(f"Set{turns}.")
        else:
            self._screen.note(conversation.system or "There is none.")

    def _save(self, rest: str) -> None:
        flag, _, name = rest.partition(" ")
        overwrites = flag == "--overwrite"
        path = Path((name if overwrites else rest).strip()).expanduser()
        if path.name == "":
            self._screen.note("/save FILE")
            return
        if not self._conversation.messages():
            self._screen.note("There is no message yet.")
            return
        content = json.dumps({"messages": self._conversation.messages()}, ensure_ascii=False) + "\n"
        try:
            raw = content.encode("utf-8", "backslashreplace")
            if overwrites:
                write_whole(path, raw)
            else:
                with path.open("xb") as file:
                    file.write(raw)
        except FileExistsError:
            self._screen.note(f"{path} is there already: /save --overwrite {path} replaces it.")
        except OSError as error:
            self._screen.note(f"eightfold: {path}: {error.strerror or error}")
        else:
            self._screen.note(f"{len(self._conversation.turns)} messages are in {path}.")

    def _load(self, rest: str) -> None:
        if not rest:
            self._screen.note("/load FILE")
            return
        messages = _read_conversation(Path(rest).expanduser())
        is_asked = messages[-1]["role"] == "user"
        self._conversation.load(messages[:-1] if is_asked else messages)
        self._screen.note(
            f"{self._size()} of {rest}" + (" before the last, which is answered now." if is_asked else ".")
        )
        if is_asked:
            self._answer(messages[-1]["content"])

    def _answer(self, text: str) -> None:
        prompt = self._conversation.ask(text)
        if prompt.forgotten:
            turns = "turn is" if prompt.forgotten == 1 else f"{prompt.forgotten} turns are"
            self._screen.note(f"The conversation has outgrown {self._context} tokens: the oldest {turns} forgotten.")
        limit = min(self._max_new_tokens, self._context - len(prompt.token_ids))
        _, start = self._thinking.start(prompt.text)
        params = start.params(generating.sampling_params(self._sampling, max_tokens=limit))
        try:
            self._engine.add_request("chat", prompt.token_ids, params)
        except EightfoldError:
            self._conversation.take_back()
            raise
        self._stream(prompt, start.parser())

    def _stream(self, prompt: Prompt, parser: ReasoningParser) -> None:
        """Show the answer to a request as it comes, and remember it as far as it came."""
        engine, times, output = self._engine, [time.monotonic()], None
        said = [("", "")]

        def show(thought: str, content: str) -> None:
            said.append((thought, content))
            if thought:
                self._screen.think(thought)
            if content:
                self._screen.write(content)

        while engine.has_unfinished:
            outputs = engine.step()
            if self._screen.interrupted and (last := engine.abort("chat")) is not None:
                outputs.append(last)
            for output in outputs:
                times.append(time.monotonic())
                show(*parser.push(output.outputs[0].delta_text))
        show(*parser.finish())
        assert output is not None
        (answer,) = output.outputs
        thought, content = map("".join, zip(*said, strict=True))
        message = {"role": "assistant", "content": content, **({"reasoning_content": thought} if thought else {})}
        self._conversation.answer(prompt, answer.text, answer.token_ids, message)
        self._screen.finish()
        self._screen.note(_summary(output, answer, times))


def _read_conversation(path: Path) -> list[Message]:
    """Return the messages of a file, with contents as texts: a list of them, or an object that has one, as of /save.

    Raises:
        InputError: it cannot be read, or holds no conversation.
    """
    text, _ = read_text(path, "conversation", MAX_CONVERSATION_BYTES)
    try:
        content = parse_value(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise InputError("conversation", where=path, got=str(error), expected="what /save writes") from None
    messages = content.get("messages") if isinstance(content, dict) else content
    try:
        return [{**each, "content": words(each)} for each in read_messages(messages, None)]
    except InputError as error:
        raise InputError(f"conversation in {path}: {error}") from None


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
