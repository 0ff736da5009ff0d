"""`eightfold serve`: an OpenAI-compatible server and a chat page."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console, generating
from eightfold.cli.options import add_bos, model_argument
from eightfold.engine.reasoning import NAMES
from eightfold.engine.settings import EngineConfig, leave_to_first
from eightfold.errors import ConfigError, DependencyError
from eightfold.files import read_text
from eightfold.hub.names import title_of
from eightfold.server import tool_parsers
from eightfold.values import PATH, SWITCH, TEXT, TEXTS, choice, number, setting, whole

if TYPE_CHECKING:
    from eightfold.engine.async_llm import AsyncLLM

KEY_VARIABLE = "EIGHTFOLD_API_KEY"
_KEYS_BYTES = 2**20  # of a file of keys

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
_SERVER = "Server"


@dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """Serve a model to many users: OpenAI's API, and a chat page at /.

    Example: eightfold serve Llama-3.2-1B-w8a8 --port 8000

    A request: curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json'
    -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'

    In several processes: torchrun --nproc_per_node 2 -m eightfold serve DIR ...

    Clients of OpenAI's need base_url http://localhost:8000/v1 and any api_key. The log on stderr has one line of JSON
    for each request, and never a prompt. The first Ctrl-C or SIGTERM lets running answers finish; a second one does
    not.
    """

    model: Path = model_argument("DIR", generating.MODEL)
    host: str = setting("127.0.0.1", TEXT, "Address to listen on; 0.0.0.0 for all addresses.", group=_SERVER)
    port: int = setting(8000, whole(0, 65535), "Port to listen on; 0 for any free one.", group=_SERVER)
    api_key: tuple[str, ...] = setting(
        (),
        TEXTS,
        f"Key that clients have to send; one of several if repeated. Prefer --api-key-file or {KEY_VARIABLE} (commas "
        "between keys): other users can see a command line.",
        metavar="KEY",
        group=_SERVER,
    )
    api_key_file: Path | None = setting(
        None, PATH, "File of keys, one in each line, any of which clients may send.", metavar="FILE", group=_SERVER
    )
    served_model_name: tuple[str, ...] = setting(
        (), TEXTS, "Name of the model for clients. Default: DIR's name.", metavar="NAME", group=_SERVER
    )
    max_waiting: int = setting(256, whole(0), "Let at most N further answers wait; others get 429.", group=_SERVER)
    drain_timeout: float = setting(
        30.0, number(0), "Time that running answers have to finish after SIGTERM.", metavar="SECONDS", group=_SERVER
    )
    cors_origin: tuple[str, ...] = setting(
        (), TEXTS, "A web origin whose pages may call the API; * for all.", metavar="ORIGIN", group=_SERVER
    )
    allowed_host: tuple[str, ...] = setting(
        (),
        TEXTS,
        "A further name by which clients may call the server. Without a key on a loopback address, only localhost and "
        "that address are answered; * for any name.",
        metavar="NAME",
        group=_SERVER,
    )
    cache_salt_per_key: bool = setting(
        False,
        SWITCH,
        "Share computed prompts only among requests with the same key: how fast an answer begins then "
        "tells a client nothing about the prompts of others.",
        group=_SERVER,
    )
    report_cached_tokens: bool = setting(
        False,
        SWITCH,
        "Tell clients how many tokens of a prompt were computed before, perhaps for another client.",
        group=_SERVER,
    )
    responses_kept: int = setting(
        1000,
        whole(0),
        "Keep the last N responses of /v1/responses in memory, for requests that build on them.",
        group=_SERVER,
    )
    log_level: str = setting(
        "info",
        choice("debug", "info", "warning", "error"),
        "Least severe messages to log: debug, info, warning or error.",
        metavar="LEVEL",
        group=_SERVER,
        read=str.lower,
    )
    chat_template: Path | None = generating.chat_template()
    reasoning_parser: str = setting(
        "auto",
        choice(*NAMES),
        "How the model's thinking is told from its answers, by vLLM's names: auto goes by the chat template and the "
        "vocabulary; none leaves it in the content.",
        metavar="NAME",
        read=lambda text: text.replace("-", "_"),
    )
    tool_call_parser: str = setting(
        tool_parsers.AUTO,
        choice(*tool_parsers.NAMES),
        "In whose form the model's calls are recognised, by vLLM's names: auto goes by the chat template; none leaves "
        "them in the content.",
        metavar="NAME",
        read=lambda text: next((name for name in tool_parsers.NAMES if _alike(name, text)), text),
    )
    add_bos: bool | None = add_bos()
    draft_model: Path | None = generating.draft_model()
    engine: dict[str, Any] = generating.engine(
        "max_num_seqs", "max_model_len", "kv_memory", "max_batched_tokens", "speculate", "draft_tokens",
        "prefix_caching", "threads", "attention_mode", "expert_parallel",
    )  # fmt: skip

    def execute(self) -> None:
        _require_packages()
        keys = _api_keys(self.api_key, self.api_key_file)
        name, *others = self.served_model_name or (title_of(self.model),)
        config = EngineConfig(**self.engine, draft_model=self.draft_model)
        template = generating.read_template(self.chat_template)
        from eightfold.format.checkpoint import require_runnable
        from eightfold.server import logs
        from eightfold.server.serve import bind, serve
        from eightfold.server.service import ServerSettings, host_name

        allowed = tuple(map(host_name, self.allowed_host))
        require_runnable(self.model)
        leave_to_first(self.model, config)
        _warn_of_strangers(self.host, keys)
        sock = bind(self.host, self.port)
        try:
            engine = _load(self.model, template, self.add_bos, config)
            logs.set_up(self.log_level)
            settings = ServerSettings(
                model_names=(name, *others),
                api_keys=keys,
                max_num_seqs=config.max_num_seqs,
                max_waiting=self.max_waiting,
                drain_timeout=self.drain_timeout,
                cors_origins=self.cors_origin,
                allowed_hosts=allowed,
                cache_salt_per_key=self.cache_salt_per_key,
                report_cached_tokens=self.report_cached_tokens,
                reasoning_parser=self.reasoning_parser,
                responses_kept=self.responses_kept,
                tool_call_parser=self.tool_call_parser,
            )
            serve(engine, settings, sock, lambda address: _announce(name, address, engine))
        finally:
            sock.close()


def _alike(one: str, other: str) -> bool:
    return one.lower().replace("-", "_") == other.lower().replace("-", "_")


def _load(model: Path, template: str | None, add_bos: bool | None, config: EngineConfig) -> AsyncLLM:
    """Load the model, see that its chat template can be used, and answer a first time: that is slower than later."""
    with console.loading():
        from eightfold.engine.async_llm import AsyncLLM
        from eightfold.engine.engine import Engine
        from eightfold.engine.sampling_params import SamplingParams
        from eightfold.tokenizer import Tokenizer

        tokenizer = Tokenizer(model, template, add_bos=add_bos)
        engine = Engine.load(model, config, tokenizer)
    if tokenizer.has_chat_template:
        tokenizer.require_template()
    else:
        console.note("this model has no chat template: /v1/chat/completions is not served. Give --chat-template.")
    for note in engine.notes:
        console.note(note)
    engine.add_request("first", [0], SamplingParams(max_tokens=1))
    while engine.has_unfinished:
        engine.step()
    return AsyncLLM(engine)


def _announce(name: str, address: str, engine: AsyncLLM) -> None:
    facts = engine.engine
    blocks = engine.stats.blocks_total
    print(f"{name}: {facts.max_model_len} tokens of context, {blocks} blocks of 128 tokens for keys and values")
    print(f"ready at {address}  (chat page {address}/, API {address}/v1)", flush=True)


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            "eightfold serve needs starlette, uvicorn and prometheus-client",
            got=f"no {' and no '.join(missing)}",
            action="Install them: pip install 'eightfold[serve]'",
        )


def _api_keys(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """Return the keys of the options, or else of the variable.

    Raises:
        ConfigError: one is empty, which must not open the server to everybody.
        InputError: the file cannot be read.
    """
    keys = [("--api-key", key) for key in given]
    if file is not None:
        lines = [line for line in read_text(file, "--api-key-file", _KEYS_BYTES)[0].splitlines() if line.strip()]
        keys += [(f"--api-key-file {file}", line) for line in lines or [""]]
    elif not given and KEY_VARIABLE in os.environ:
        keys = [(KEY_VARIABLE, key) for key in os.environ[KEY_VARIABLE].split(",")]
    for name, key in keys:
        if not key.strip():
            raise ConfigError(name, got="an empty text", expected="a key", action="Leave it out to serve everybody.")
    return tuple(dict.fromkeys(key.strip() for _, key in keys))


def _warn_of_strangers(host: str, keys: tuple[str, ...]) -> None:
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not keys and not is_local:
        console.note(f"everybody who reaches {host} can use this server: there is no API key.")
