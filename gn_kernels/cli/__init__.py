"""``gn-kernels train | evaluate | analyse | reproduce | info``: one module for each command."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from gn_kernels.backend import info
from gn_kernels.cli import analyse, evaluate, reproduce, train
from gn_kernels.training.recipe import InputError

Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"
# What may be missing, and the extra that brings it.
_OPTIONAL = {
    **dict.fromkeys(("matplotlib", "rich", "sklearn", "timm", "torchvision", "yaml"), "train"),
    "pyautoattack": "eval",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 2 for what the user can mend, after one sentence on stderr; 130 or 143
        after SIGINT or SIGTERM.
    """
    logging.basicConfig(format="gn-kernels: %(message)s", level=logging.WARNING)
    parser = _parser()
    try:
        options = vars(parser.parse_args(arguments))
        return int(options.pop("command")(options))
    except InputError as error:
        print(f"gn-kernels: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        extra = _OPTIONAL.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        print(
            f"gn-kernels: this needs {error.name}, which is not installed: "
            f"pip install 'gn_kernels[{extra}]'",
            file=sys.stderr,
        )
    except OSError as error:
        print(f"gn-kernels: {error}", file=sys.stderr)
    except KeyboardInterrupt as error:
        print(f"gn-kernels: interrupted{f' by {error}' if str(error) else ''}", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gn-kernels",
        description="Train Vision Transformers with a penalty on the input gradient, on fused "
        "kernels for differentiating twice.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    train.add_to(commands)
    evaluate.add_to(commands)
    analyse.add_to(commands)
    reproduce.add_to(commands)
    show = commands.add_parser("info", help="show which kernels run here, and why others do not")
    show.set_defaults(command=_info)
    return parser


def _info(options: dict[str, Any]) -> int:
    lines = info()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    return 0
