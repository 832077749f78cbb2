"""Fixtures that several test files share."""

import signal
from pathlib import Path

import pytest
import torch

from tests import tiny_data

torch.set_num_threads(1)  # sums have one order in this process and in those that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under `nohup` or in the background of a script: inherited by
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start, which would not hear Ctrl-C either


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`key=value` entries that put any method's COCO config on a tiny data set with a tiny CLIP."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    root = tiny_data.make_dataset(folder / "data")
    backbone = tiny_data.make_backbone(folder / "clip.safetensors")
    return tiny_data.overrides(root, backbone, folder / "cache")
