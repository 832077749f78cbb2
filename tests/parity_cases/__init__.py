"""What the parity check must know of each method: one module a method, named like the method's file in `models/`."""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.errors import UserError
from common.registry import MODELS
from tests.parity_cases.base import MethodCase


def open_case(cfg: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> MethodCase:
    """The case of the method that `cfg` names: class `Case` of `tests/parity_cases/<method>.py`.

    Raises:
        UserError: If there is no such method, or it has no such module.
    """
    name = f"tests.parity_cases.{MODELS.get(cfg['method']).__module__.rpartition('.')[2]}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"{cfg['method']} has no parity case; add {name.replace('.', '/')}.py") from None
    case: MethodCase = module.Case(cfg, arrays)
    return case
