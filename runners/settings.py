"""What the command line says of a configuration, and what it prints of one. Nothing here loads torch."""

import argparse
import json

from common.config import Config
from common.yaml_layers import flatten
from utils.output import say, table


def overrides_of(options: argparse.Namespace) -> list[str]:
    """All `section.key=value` entries; the flags are short names of some, and come last."""
    flags = {
        "save_dir": options.save_dir,
        "device": options.device,
        "distribute": options.distribute or None,
    }
    return options.overrides + [f"run.{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]


def print_config(config: Config) -> None:
    """Prints every value with the file, or the command line, that it came from; paths also as they were found."""
    rows = [["key", "value", "from"]]
    for key, value in flatten(config.tree).items():
        found = config.found.get(key, value)
        rows.append([key, str(value) if found == value else f"{value} ({found})", config.origins.get(key, "")])
    say(table(rows))
