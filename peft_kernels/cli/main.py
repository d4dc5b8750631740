"""Entry point of `peft-kernels`: picks the command and turns its errors into exit codes.

0: done; 1: the command ran and failed; 2: it cannot run as asked; 130: interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import peft_kernels
from peft_kernels.cli import bench, doctor, finetune, tune
from peft_kernels.cli.errors import CommandError, UsageError

COMMANDS = {"doctor": doctor, "finetune": finetune, "bench": bench, "tune": tune}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-kernels", description=peft_kernels.__doc__)
    parser.add_argument("--version", action="version", version=f"peft-kernels {peft_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, module in COMMANDS.items():
        summary = module.SUMMARY
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name; `sys.argv[1:]` when None.

    Returns:
        The exit code.

    Raises:
        SystemExit: the arguments do not parse (code 2), or only help or the version was asked for (code 0).
    """
    options = build_parser().parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except (UsageError, CommandError) as error:
        print(f"peft-kernels {options.command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"peft-kernels {options.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
