"""Weights of a small CLIP, in the forms of its weight files, and what reading them must give."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.types import ClipShape
from models.clip.towers import CLIP
from models.clip.weights import read_clip

SHAPE = ClipShape(
    embed_dim=32,
    image_size=24,
    patch_size=8,
    vision_width=128,
    vision_layers=2,
    text_width=64,
    text_layers=3,
    context_length=20,
    vocabulary=100,
)
State = dict[str, Tensor]


def openai_state() -> State:
    """Random weights by OpenAI's names, exact in half precision."""
    torch.manual_seed(0)
    return {name: value.half().float() for name, value in CLIP(SHAPE).state_dict().items()}


def read_equal(path: Path, state: State, form: str) -> None:
    """Checks that a file holds these weights, and is said to have this form."""
    backbone = read_clip(path)
    assert backbone.weights is not None
    assert backbone.shape == SHAPE
    assert form in backbone.source
    assert backbone.weights.keys() == state.keys()
    for name, value in backbone.weights.items():
        assert value.dtype == torch.float32, name
        assert value.is_contiguous(), name
        assert torch.equal(value, state[name]), name


def module_of(state: State) -> nn.Module:
    """Modules nested as the names say, holding the tensors as parameters; scalars as OpenAI's archives have them."""
    root = nn.Module()
    for name, value in state.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            child = node._modules[part]
            assert child is not None
            node = child
        node.register_parameter(last, nn.Parameter(value.clone()))
    return root


class Archive(nn.Module):
    """What OpenAI's archives hold."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, child in module_of(state).named_children():
            self.add_module(name, child)
        for name, value in state.items():
            if "." not in name:
                self.register_parameter(name, nn.Parameter(value.clone()))
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(7))
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sizes[0]


def write_archive(path: Path, module: nn.Module, traced: bool) -> None:
    """Writes a module as a TorchScript archive."""
    program = torch.jit.trace(module, torch.ones(2)) if traced else torch.jit.script(module)
    program.save(str(path))


def refuse(path: Path, *parts: str) -> None:
    """Checks that a file is refused in one line that begins with its name and has these parts."""
    with pytest.raises(UserError) as caught:
        read_clip(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message, message
