"""The command line of MindIE's quantifier, translated into one of `eightfold quantize`.

    python -m examples.convert.model_slim.quantifier --model_path FLOAT --save_directory OUT --calib_file boolq.jsonl

Every flag of the original is read. What asks for something that eightfold does not make (sparse, 4-bit and per-group
weights, quantized communication) is refused by its name; what has no effect on 8-bit schemes is taken, and the help
says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.arguments import Defaults, OneLineParser, cmd_bool, exit_code

from eightfold.architectures import Names
from eightfold.cli import console
from eightfold.cli.main import main as eightfold
from eightfold.errors import ConfigError, UnsupportedError, one_of

HERE = Path(__file__).resolve().parent
DEFAULT_CALIB_FILE = HERE / "teacher_qualification.jsonl"

ANTI_METHODS = ("m1", "m2", "m3", "m4", "m5", "m6")
GROUP_SIZES = (32, 64, 128, 256)

# Keys of --tokenizer_args that change no token: calibration takes one text at a time, so that nothing is padded.
IDLE_TOKENIZER_ARGS = ("padding_side", "pad_token", "pad_token_id", "use_fast", "legacy", "trust_remote_code")

_BOOL: dict[str, Any] = {"type": cmd_bool, "metavar": "BOOL"}

_NO_EFFECT = "no effect with 8-bit weights"

_TOKENIZER_ARGS_HELP = (
    'settings of the tokenizer as JSON in single quotes, \'{"padding_side":"left","pad_token":"<unk>"}\': without '
    "them bash cuts it at the commas, which is mended here, and takes <unk> for a redirection, which cannot be. No "
    "effect: texts are taken one by one, so nothing is padded"
)


# --- flags


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of all flags, under the name by which the help calls the script."""
    parser = OneLineParser(
        prog=prog,
        description="Quantize a float Llama-family model for MindIE: runs `eightfold quantize`.",
        formatter_class=Defaults,
        epilog="True and False are written as these words.",
    )
    _add_paths(parser)
    _add_calibration(parser)
    _add_scheme(parser)
    _add_attention(parser)
    _add_refused(parser)
    _add_idle(parser)
    return parser


def _add_paths(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model_path", metavar="DIR", required=True, help="float model directory, only read")
    group.add_argument(
        "--save_directory", metavar="DIR", required=True, help="directory to make; must not hold anything"
    )
    group.add_argument("--part_file_size", type=int, metavar="GB", help="size of a weight file; without it, one file")
    group.add_argument("--device_type", choices=("cpu", "npu"), default="cpu", help="what computes")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib_file",
        metavar="FILE",
        default=str(DEFAULT_CALIB_FILE),
        help="JSON lines with inputs_pretokenized; '' for none, or for --calib_texts",
    )
    group.add_argument("--calib_texts", nargs="+", metavar="TEXT", help="texts, together with --calib_file ''")
    group.add_argument("--tokenizer_args", nargs="+", metavar="JSON", default=(), help=_TOKENIZER_ARGS_HELP)
    group.add_argument(
        "--input_ids_name", metavar="NAME", default="input_ids", help="no effect: eightfold tokenizes by itself"
    )
    group.add_argument("--attention_mask_name", metavar="NAME", default="attention_mask", help="no effect, as above")


def _add_scheme(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scheme")
    group.add_argument("--w_bit", type=int, choices=(4, 8, 16), default=8, help="bits of a weight; only 8 is made")
    group.add_argument("--a_bit", type=int, choices=(8, 16), default=8, help="bits of an activation")
    group.add_argument("--is_dynamic", **_BOOL, default=False, help="scale activations by token (W8A8_DYNAMIC)")
    group.add_argument("--w_sym", **_BOOL, default=True, help="weights without offset; False needs --a_bit 16")
    group.add_argument("--mm_tensor", **_BOOL, help="weights are scaled by channel always, as by the original script")
    group.add_argument(
        "--act_method",
        type=int,
        choices=(1, 2, 3),
        default=1,
        help="range of static activations: min-max, histogram or the better of both",
    )
    group.add_argument(
        "--anti_method", metavar="METHOD", default="", help="suppress outliers: m1 to m6; empty for not at all"
    )
    group.add_argument("--disable_names", nargs="+", metavar="NAME", help="modules that stay float")
    group.add_argument("--disable_level", metavar="Ln", default="L0", help="Ln: n more linears stay float")
    group.add_argument("--disable_last_linear", **_BOOL, default=True, help="keep lm_head float")


def _add_attention(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attention")
    group.add_argument("--use_kvcache_quant", **_BOOL, default=False, help="int8 key/value cache (C8)")
    group.add_argument("--use_fa_quant", **_BOOL, default=False, help="int8 attention (FAQuant)")
    group.add_argument("--fa_amp", type=int, default=0, metavar="N", help="layers whose attention stays float")


def _add_refused(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("not made here; only these defaults are taken")
    group.add_argument("--co_sparse", **_BOOL, default=False, help="sparse weights (W8A8S)")
    group.add_argument("--is_lowbit", **_BOOL, default=False, help="low-bit sparse weights")
    group.add_argument("--do_smooth", **_BOOL, default=False, help="smoothing of low-bit sparse weights")
    group.add_argument("--use_sigma", **_BOOL, default=False, help="another choice of sparse weights' outliers")
    group.add_argument("--open_outlier", **_BOOL, default=True, help="False: weights scaled by group")
    group.add_argument("--use_reduce_quant", **_BOOL, default=False, help="quantized communication")
    group.add_argument("--tp_size", metavar="N", type=int, default=1, help="cards that communicate")


def _add_idle(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(_NO_EFFECT)
    group.add_argument(
        "--fraction", metavar="X", type=float, default=0.01, help="sparse weights kept apart, 0.01 to 0.1"
    )
    group.add_argument("--sigma_factor", metavar="X", type=float, default=3.0, help="of --use_sigma, 3.0 to 4.0")
    group.add_argument("--group_size", type=int, choices=GROUP_SIZES, default=64, help="of weights scaled by group")
    group.add_argument("--trust_remote_code", action="store_true", help="nothing in a model directory is executed")


def parse_tokenizer_args(words: Sequence[str]) -> dict[str, Any]:
    """Read --tokenizer_args, also as bash hands it over when it was not quoted.

    Unquoted, `{\\"a\\":1,\\"b\\":2}` arrives as the words `"a":1` and `"b":2`. With `\\"<unk>\\"}` at the end,
    everything from `<` on is a redirection (if there is a file named unk): one word arrives, and ends in
    `"pad_token":"`.

    Raises:
        ConfigError: no JSON object, or a key that would change tokens.
    """
    text = ",".join(word.strip() for word in words)
    if not text.startswith("{"):
        text = "{" + text + "}"
    if cut_by_shell(words):
        text += '<unk>"}'
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(
            "--tokenizer_args", got=" ".join(words), expected="a JSON object", action="Put it into single quotes."
        ) from None
    for name in settings:
        if name not in IDLE_TOKENIZER_ARGS:
            action = "Edit the model's tokenizer.json instead."
            raise UnsupportedError("--tokenizer_args", got=name, expected=one_of(IDLE_TOKENIZER_ARGS), action=action)
    return dict(settings)


def cut_by_shell(words: Sequence[str]) -> bool:
    """Return whether a shell took the pad token of --tokenizer_args for a redirection."""
    return bool(words) and words[-1].strip().startswith("{") and words[-1].rstrip().endswith('"pad_token":"')


# --- refusals


class _Only(NamedTuple):
    """A flag of which eightfold makes one value."""

    name: str
    value: object
    reason: str


_SPARSE = "Sparse and low-bit weights are not made."
_COMMUNICATION = "Quantized communication is not made."
_ONLY = (
    _Only("w_bit", 8, "Only 8-bit weights are made."),
    _Only("co_sparse", False, _SPARSE),
    _Only("is_lowbit", False, _SPARSE),
    _Only("do_smooth", False, _SPARSE),
    _Only("use_sigma", False, _SPARSE),
    _Only("open_outlier", True, "Weights are scaled by channel, not by group."),
    _Only("use_reduce_quant", False, _COMMUNICATION),
    _Only("tp_size", 1, _COMMUNICATION),
)


def refuse(args: argparse.Namespace) -> None:
    """Check what the parser alone cannot.

    Raises:
        UnsupportedError: a value asks for something that is not made.
        ConfigError: values that make no sense, or not together.
    """
    for name, value, reason in _ONLY:
        if getattr(args, name) != value:
            raise UnsupportedError(f"--{name}", got=getattr(args, name), expected=value, action=reason)
    _refuse_values(args)
    _refuse_pairs(args)
    parse_tokenizer_args(args.tokenizer_args)


def _refuse_values(args: argparse.Namespace) -> None:
    if args.anti_method not in ("", *ANTI_METHODS):
        raise ConfigError("--anti_method", got=args.anti_method, expected="m1 to m6, or an empty word for none")
    if not re.fullmatch(r"L(0|[1-9]\d*)", args.disable_level):
        raise ConfigError("--disable_level", got=args.disable_level, expected="L and a number, such as L5")
    if args.part_file_size is not None and args.part_file_size < 1:
        raise ConfigError("--part_file_size", got=args.part_file_size, expected="at least 1")
    if args.fa_amp < 0:
        raise ConfigError("--fa_amp", got=args.fa_amp, expected="at least 0")


def _refuse_pairs(args: argparse.Namespace) -> None:
    if args.a_bit == 8 and not args.w_sym:
        raise ConfigError(
            "--w_sym", got="False with --a_bit 8", expected="True", action="int8 activations need symmetric weights."
        )
    if args.a_bit == 16 and args.is_dynamic:
        raise ConfigError("--is_dynamic", got="True with --a_bit 16", expected="--a_bit 8")
    if args.fa_amp and not args.use_fa_quant:
        raise ConfigError("--fa_amp", got=args.fa_amp, expected="0", action="It belongs to --use_fa_quant True.")
    if args.calib_file and args.calib_texts:
        raise ConfigError(
            "--calib_texts",
            got=f"texts, and --calib_file {args.calib_file}",
            expected="one of them",
            action="Add --calib_file ''.",
        )


# --- translation


def quantize_arguments(args: argparse.Namespace) -> list[str]:
    """Return what stands after `eightfold` on the command line that does the same."""
    scheme = "w8a16" if args.a_bit == 16 else "w8a8-dynamic" if args.is_dynamic else "w8a8"
    words = ["quantize", args.model_path, args.save_directory, "--scheme", scheme, "--device", args.device_type]
    if not args.w_sym:
        words.append("--no-weight-symmetric")
    return [*words, *_calibration(args), *_linears(args, scheme), *_attention(args), *_output(args)]


def kept_names(args: argparse.Namespace) -> list[str]:
    """Return the modules that stay float by name; a list that a shell left in one word is taken apart."""
    return [name for word in args.disable_names or () for name in word.split()]


def _calibration(args: argparse.Namespace) -> list[str]:
    if args.calib_file:
        return ["--calib", args.calib_file]
    return [word for text in args.calib_texts or () for word in ("--calib-texts", text)]


def _linears(args: argparse.Namespace, scheme: str) -> list[str]:
    names = kept_names(args)
    words = [word for name in names for word in ("--keep-float", name)]
    words += ["--anti-outlier", args.anti_method or "none"]
    if scheme == "w8a8":
        words += ["--act-method", str(args.act_method)]
    if args.disable_level != "L0":
        words += ["--disable-level", args.disable_level]
    if not args.disable_last_linear and Names().head not in names:
        words.append("--quantize-lm-head")
    return words


def _attention(args: argparse.Namespace) -> list[str]:
    words = ["--fa-quant"] if args.use_fa_quant else []
    if args.fa_amp:
        words += ["--fa-amp", str(args.fa_amp)]
    if args.use_kvcache_quant:
        # The original watches the outputs of k_proj and v_proj, before the rotation.
        words += ["--kv-int8", "--kv-observe", "pre-rope"]
    return words


def _output(args: argparse.Namespace) -> list[str]:
    return [] if args.part_file_size is None else ["--part-size-gb", str(args.part_file_size)]


# --- notes


def notes(args: argparse.Namespace) -> list[str]:
    """Return what the user should know about flags that do less than their names say."""
    found = []
    if args.mm_tensor:
        found.append("--mm_tensor True changes nothing: weights are scaled by channel, as by the original script.")
    if args.trust_remote_code:
        found.append("--trust_remote_code changes nothing: nothing in a model directory is executed.")
    if cut_by_shell(args.tokenizer_args):
        found.append(
            "--tokenizer_args: the shell took <unk> for a redirection (stdout may be in a file named '\"}'); "
            "read as pad_token <unk>. Put the JSON into single quotes."
        )
    if not args.calib_file and not args.calib_texts and args.anti_method:
        found.append(
            f"--calib_file is empty and --anti_method {args.anti_method} needs texts: those of eightfold are used."
        )
    return [*found, *_pad_token_notes(args)]


def _pad_token_notes(args: argparse.Namespace) -> list[str]:
    token = parse_tokenizer_args(args.tokenizer_args).get("pad_token")
    path = Path(args.model_path) / "tokenizer.json"
    if not isinstance(token, str) or not path.is_file():
        return []
    from tokenizers import Tokenizer

    try:
        known = Tokenizer.from_file(str(path)).token_to_id(token) is not None
    except Exception:  # the library raises bare Exception; eightfold says better what is wrong with the file
        return []
    if known:
        return []
    return [f"pad_token {token} is not in the vocabulary; that changes nothing, as texts are taken one by one."]


# --- commands

# A command line -> the modules that stay float when it has no --disable_names.
DefaultNames = Callable[[argparse.Namespace], Sequence[str]]


def _no_names(args: argparse.Namespace) -> Sequence[str]:
    return ()


def read_arguments(argv: Sequence[str], prog: str, default_names: DefaultNames = _no_names) -> argparse.Namespace:
    """Return the checked flags of a command line, with the names that stay float by default.

    Raises:
        ConfigError, UnsupportedError: a flag that is refused.
    """
    args = build_parser(prog).parse_args(argv)
    refuse(args)
    if args.disable_names is None:
        args.disable_names = list(default_names(args))
    return args


def run(argv: Sequence[str], prog: str, default_names: DefaultNames = _no_names) -> int:
    """Quantize as a MindIE command line asks; return the exit code.

    Args:
        argv: the command line, without the program.
        prog: what the help calls the program.
        default_names: the modules that stay float when --disable_names is absent.
    """

    def work() -> int:
        args = read_arguments(argv, prog, default_names)
        for text in notes(args):
            console.note(text)
        sys.argv = ["eightfold", *quantize_arguments(args)]
        return eightfold()

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], "python -m examples.convert.model_slim.quantifier"))
