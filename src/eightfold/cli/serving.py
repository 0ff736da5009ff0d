"""`eightfold serve`: an OpenAI-compatible server and a chat page."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eightfold.cli import console, sampling
from eightfold.cli.choices import AttentionMode
from eightfold.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from eightfold.engine.async_llm import AsyncLLM

KEY_VARIABLE = "EIGHTFOLD_API_KEY"

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_LEVELS = ("debug", "info", "warning", "error")


def serve(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized or float model directory.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"What clients have to send as their key. Better as {KEY_VARIABLE}: others see this one."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What clients call the model; may be repeated. Default: DIR's name."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, metavar="N", help="Answers that are computed at a time.")] = 64,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Tokens of prompt and answer. Default: the model's context.")
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for keys and values, such as 2GiB. Default: what is needed and free."
        ),
    ] = None,
    max_batched_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens of a step: fewer let long prompts disturb running answers less."),
    ] = None,
    speculate: Annotated[
        int, typer.Option(min=0, max=32, metavar="K", help="Guess K tokens from the prompt at a time; 0: do not.")
    ] = 0,
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Compute what prompts begin with only once.")
    ] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many threads compute. Default: one a CPU.")
    ] = None,
    attention_mode: Annotated[
        AttentionMode,
        typer.Option(help="What a prompt attends over with int8 keys and values; mindie computes prompts whole."),
    ] = AttentionMode.cache,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A jinja2 chat template in place of the model's.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, metavar="N", help="Answers that may wait beyond those; others get 429.")
    ] = 256,
    drain_timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long running answers may go on after SIGTERM.")
    ] = 30.0,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web origin whose pages may call the API; may be repeated; * for all."),
    ] = None,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model to many users: OpenAI's API, and a chat page at /.

    Example: eightfold serve Llama-3.2-1B-w8a8 --port 8000

    then: curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json'
    -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'

    In several processes: torchrun --nproc_per_node 2 -m eightfold serve DIR ...

    Clients of OpenAI's need base_url http://localhost:8000/v1 and any api_key.
    The log on stderr has one line of JSON for each request, and never a prompt.
    The first Ctrl-C or SIGTERM lets running answers finish, the second does not.
    """
    _require_packages()
    level = _log_level(log_level)
    key = _api_key(api_key)
    names = tuple(served_model_name or (model.resolve().name,))
    memory = None if kv_memory is None else parse_size(kv_memory)
    template = None if chat_template is None else sampling.read_template(chat_template)
    from eightfold.engine.loading import leave_to_first
    from eightfold.format.checkpoint import require_directory
    from eightfold.server import logs
    from eightfold.server.serve import bind
    from eightfold.server.serve import serve as run
    from eightfold.server.service import ServerSettings

    require_directory(model)
    leave_to_first(model, threads=threads, attention=attention_mode.mode)
    _warn_of_strangers(host, key)
    sock = bind(host, port)
    try:
        engine = _load(
            model,
            template,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_memory=memory,
            prefix_caching=prefix_caching,
            speculate=speculate,
            threads=threads,
            attention_mode=attention_mode.mode,
            **({} if max_batched_tokens is None else {"max_batched_tokens": max_batched_tokens}),
        )
        logs.set_up(level)
        settings = ServerSettings(
            model_names=names,
            api_key=key,
            max_num_seqs=max_num_seqs,
            max_waiting=max_waiting,
            drain_timeout=drain_timeout,
            cors_origins=tuple(cors_origin or ()),
        )
        run(engine, settings, sock, lambda address: _announce(names[0], address, engine))
    finally:
        sock.close()


def _load(model: Path, template: str | None, **limits: object) -> AsyncLLM:
    """Load the model, see that its chat template can be used, and answer a first time: that is slower than later."""
    with console.loading():
        from eightfold.engine.async_llm import AsyncLLM
        from eightfold.engine.engine import Engine
        from eightfold.engine.sampling_params import SamplingParams
        from eightfold.engine.settings import EngineConfig
        from eightfold.tokenizer import Tokenizer

        tokenizer = Tokenizer(model, template)
        engine = Engine.load(model, EngineConfig(**limits), tokenizer)  # type: ignore[arg-type]
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


def _log_level(level: str) -> str:
    if level.lower() not in _LEVELS:
        raise ConfigError("--log-level", got=level, expected="debug, info, warning or error")
    return level.lower()


def _api_key(given: str | None) -> str | None:
    """Return the key; an empty one is a mistake, which must not open the server to everybody."""
    key = os.environ.get(KEY_VARIABLE) if given is None else given
    if key is not None and not key.strip():
        name = KEY_VARIABLE if given is None else "--api-key"
        raise ConfigError(name, got="an empty text", expected="a key", action="Leave it out to serve everybody.")
    return None if key is None else key.strip()


def _warn_of_strangers(host: str, key: str | None) -> None:
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if key is None and not is_local:
        console.note(f"everybody who reaches {host} can use this server: there is no API key.")


def parse_size(text: str, option: str = "--kv-memory") -> int:
    """Return how many bytes a size such as 2GiB, 500M or 1000000 is.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(option, got=text, expected="a size such as 2GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
