"""vLLM reads our directories as they are: an out-of-tree plugin, found by its entry point `vllm.general_plugins`.

    pip install 'eightfold[vllm]'; vllm serve OUT

Loading this package loads nothing else. vLLM calls register() in each of its processes.
"""

from __future__ import annotations

NAME = "eightfold"  # of the quantization method, as in vLLM's --quantization


def register() -> None:
    """Tell vLLM of the quantization method, and let it be chosen wherever a directory has a description.

    Where vllm-ascend is installed, that reads the same directories, on NPUs: then this does nothing. Nor does it where
    vLLM has not what is used here, as an exception would stop every model, ours or not.
    """
    import logging
    from importlib.util import find_spec

    if find_spec("vllm_ascend") is not None:
        return
    try:
        from eightfold_vllm.choice import choose_by_description
        from eightfold_vllm.config import register_config

        register_config()
        choose_by_description()
    except (ImportError, AttributeError) as error:
        from importlib.metadata import version

        logging.getLogger(f"vllm.{__name__}").warning(
            "Eightfold's plugin does not fit this version of vLLM: got eightfold %s (%s), expected one that it was "
            "tested with (docs/engines.md).",
            version("eightfold"),
            error,
        )
