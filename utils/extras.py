"""Packages that only some features need: asked for where they are used, with the command that installs them."""

import importlib
from types import ModuleType

from common.errors import UserError


def extra(module: str, requirements: str, feature: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        module: Its import name.
        requirements: The requirements file that lists the package.
        feature: What needs it, for the message.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{feature} needs the package {error.name}, which is not installed; pip install -r {requirements}"
        ) from None
