"""Command lines: mistakes and help are told as everything else is. It loads no heavy package."""

import argparse
from typing import Any, NoReturn

from common.errors import UserError
from common.registry import near_names
from utils.output import say


class Parser(argparse.ArgumentParser):
    """Reports mistakes as all others are, with near names for options that do not exist; takes no abbreviations.

    Args:
        **options: As `argparse.ArgumentParser`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises what is wrong as a `UserError`."""
        wrong = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        near = near_names(wrong, [option for action in self._actions for option in action.option_strings])
        raise UserError(f"{message}{near or ';'} --help explains every option")

    def print_help(self, file: object = None) -> None:
        """Writes the help to standard output.

        Raises:
            BrokenPipeError: If nobody reads it any more.
            UserError: If it cannot be written.
        """
        say(self.format_help().rstrip())
