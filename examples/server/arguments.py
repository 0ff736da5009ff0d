"""The flags of run_pa, and which of them are refused."""

from __future__ import annotations

import argparse
import json
from typing import Any

from examples.arguments import Defaults, OneLineParser, cmd_bool

from eightfold.errors import ConfigError, UnsupportedError, one_of
from eightfold.parallel.world import World

DEFAULT_TEXT = "What's deep learning?"
PARALLEL = ("dp", "tp", "moe_tp", "pp", "microbatch_size", "moe_ep", "sp", "cp")
MAX_KW_ARGS = 4096
MAX_BLOCK_SIZE = 576


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of all flags, under the name by which the help calls the script."""
    parser = OneLineParser(
        prog=prog,
        description="Answer prompts greedily with a float or quantized model.",
        formatter_class=Defaults,
        epilog="True and False are written as these words.",
    )
    parser.add_argument("--model_path", metavar="DIR", required=True, help="float or quantized model directory")
    _add_input(parser)
    _add_sizes(parser)
    _add_idle(parser)
    _add_refused(parser)
    return parser


def _add_input(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input; the first of input_dict, input_ids and input_texts that is given")
    group.add_argument(
        "--input_texts", nargs="+", metavar="TEXT", default=[DEFAULT_TEXT], help="prompts, or files that hold one each"
    )
    group.add_argument("--input_ids", nargs="+", metavar="1,2,3", type=_token_ids, help="prompts as token ids")
    group.add_argument("--input_dict", metavar="JSON", type=json_value, help='prompts as [{"prompt": "..."}]')
    group.add_argument("--input_file", metavar="FILE", help="chats, one a line as JSON; with --is_chat_model")
    group.add_argument("--is_chat_model", action="store_true", help="put prompts into the model's chat template")
    group.add_argument("--chat_template", metavar="JINJA", help="another chat template, or a file that holds one")
    group.add_argument("--load_tokenizer", type=cmd_bool, metavar="BOOL", default=True, help="False: ids in, ids out")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sizes")
    group.add_argument("--max_batch_size", type=int, default=1, metavar="N", help="copies of a single prompt, too")
    group.add_argument("--max_prefill_batch_size", type=int, metavar="N", help="without it, as max_batch_size")
    group.add_argument("--max_input_length", type=int, default=1024, metavar="N", help="tokens of the warm-up")
    group.add_argument("--max_output_length", type=int, default=20, metavar="N", help="new tokens of an answer")
    group.add_argument("--max_position_embeddings", type=int, metavar="N", help="another context than config.json's")
    group.add_argument(
        "--max_prefill_tokens", type=int, default=-1, metavar="N", help="-1: as many as the prefill batch could need"
    )
    group.add_argument("--block_size", type=int, default=128, metavar="N", help="positions of a cache block")
    group.add_argument("--ignore_eos", action="store_true", help="do not end an answer at a stop token")


def _add_idle(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("no effect on a CPU")
    group.add_argument("--enable_atb_torch", action="store_true", help="another way to run on NPUs")
    group.add_argument("--trust_remote_code", action="store_true", help="nothing in a model directory is executed")


def _add_refused(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("not made here; only these defaults are taken")
    group.add_argument("--is_embedding_model", action="store_true", help="embeddings instead of text")
    group.add_argument("--distributed_enable", action="store_true", help="several machines")
    for name in PARALLEL:
        group.add_argument(f"--{name}", type=int, default=-1, metavar="N", help="parallel size; 1 is taken, too")
    group.add_argument("--kw_args", metavar="JSON", default="", help="further settings of the model")
    group.add_argument("--lora_modules", metavar="JSON", type=json_value, help="adapters")
    group.add_argument("--max_loras", type=int, default=0, metavar="N", help="adapters at a time")
    group.add_argument("--max_lora_rank", type=int, default=0, metavar="N", help="rank of an adapter")


def json_value(text: str) -> Any:
    """Read a flag's value as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected JSON") from None


def _token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected token ids such as 1,2,3") from None


def refuse(args: argparse.Namespace) -> None:
    """Check what the parser alone cannot.

    Raises:
        UnsupportedError: a flag, or the environment, asks for something that is not made.
        ConfigError: values that make no sense, or not together.
    """
    _refuse_parallel_sizes(args)
    for name, default in (("is_embedding_model", False), ("max_loras", 0), ("max_lora_rank", 0)):
        if getattr(args, name) != default:
            raise UnsupportedError(f"--{name}", got=getattr(args, name) or None, action="It is not made.")
    if args.lora_modules:
        raise UnsupportedError("--lora_modules", got="adapters", expected="none", action="LoRA is not made.")
    _refuse_kw_args(args.kw_args)
    _refuse_sizes(args)
    if args.input_file is not None and not args.is_chat_model:
        raise ConfigError("--input_file", got="no --is_chat_model", expected="both", action="Its lines are chats.")
    if not args.load_tokenizer and (args.input_ids is None or args.input_dict is not None or args.is_chat_model):
        raise ConfigError("--load_tokenizer", got="False, and prompts that are texts", expected="--input_ids alone")


def _refuse_parallel_sizes(args: argparse.Namespace) -> None:
    action = "All processes that torchrun starts share the model by tensor parallelism; other ways are not made."
    for name in PARALLEL:
        sizes = {-1, 1, World.of_environment().size} if name == "tp" else {-1, 1}
        if getattr(args, name) not in sizes:
            expected = one_of(sorted(sizes))
            raise UnsupportedError(f"--{name}", got=getattr(args, name), expected=expected, action=action)
    if args.distributed_enable:
        raise UnsupportedError("--distributed_enable", action=action)


def _refuse_kw_args(text: str) -> None:
    if len(text) > MAX_KW_ARGS:
        raise ConfigError("--kw_args", got=f"{len(text)} characters", expected=f"at most {MAX_KW_ARGS}")
    if not text.strip():
        return
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError("--kw_args", got=text, expected="a JSON object") from None
    if settings != {}:
        raise UnsupportedError("--kw_args", got=text, expected="nothing", action="No such settings are known.")


def _refuse_sizes(args: argparse.Namespace) -> None:
    sizes = ("max_batch_size", "max_prefill_batch_size", "max_input_length", "max_output_length")
    for name in (*sizes, "max_position_embeddings"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}", got=value, expected="at least 1")
    if args.max_prefill_tokens < 1 and args.max_prefill_tokens != -1:
        raise ConfigError("--max_prefill_tokens", got=args.max_prefill_tokens, expected="-1, or at least 1")
