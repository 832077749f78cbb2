"""Formats of CLIP's weights: whose names a file uses, which sizes it has, and whether it is one whole CLIP."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.errors import UserError
from common.registry import near_names
from common.tensor_files import Tensors, unwrapped
from common.types import ClipShape
from models.clip.towers import CLIP, HEAD_WIDTH

WIDEST = 1024  # of ViT-L; the wider towers of OpenCLIP (H, g, G) have heads of another width
DEEPEST = 64  # blocks of a tower, ViT-L has 24; a file that only names more would be minutes of building them


def shape_of(state: Mapping[str, Tensor]) -> ClipShape:
    """Sizes of a CLIP, read off its tensors; the activation, which they do not show, is OpenAI's.

    Args:
        state: State dict under OpenAI's names: `visual.conv1.weight` [W, 3, p, p], `positional_embedding` [L, W], ...

    Raises:
        UserError: If it lacks a tensor that a size is read from, or holds towers of another kind.
    """
    dimensions = {
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "positional_embedding": 2,
        "token_embedding.weight": 2,
        "text_projection": 2,
    }
    _require_names(state, list(dimensions))
    for name, number in dimensions.items():
        if state[name].ndim != number or 0 in state[name].shape:
            raise UserError(
                f"{name} has the shape {list(state[name].shape)}, a CLIP's has {number} dimensions, and none is 0"
            )
    conv, positions = state["visual.conv1.weight"], state["visual.positional_embedding"]
    grid = math.isqrt(max(len(positions) - 1, 0))
    shape = ClipShape(
        embed_dim=state["text_projection"].shape[1],
        image_size=grid * conv.shape[-1],
        patch_size=conv.shape[-1],
        vision_width=conv.shape[0],
        vision_layers=_count_blocks(state, "visual.transformer"),
        text_width=state["positional_embedding"].shape[1],
        text_layers=_count_blocks(state, "transformer"),
        context_length=len(state["positional_embedding"]),
        vocabulary=len(state["token_embedding.weight"]),
    )
    for tower, width in (("image", shape.vision_width), ("text", shape.text_width)):
        if width % HEAD_WIDTH or not 0 < width <= WIDEST:
            raise UserError(
                f"the {tower} tower is {width} wide; heads are {HEAD_WIDTH} wide here, as in ViT-B and ViT-L, whose "
                f"widths are multiples of {HEAD_WIDTH} up to {WIDEST}; choose such a model"
            )
    for tower, blocks in (("image", shape.vision_layers), ("text", shape.text_layers)):
        if blocks > DEEPEST:
            raise UserError(f"the {tower} tower has {blocks} blocks, ViT-L has 24; choose a model of at most {DEEPEST}")
    if grid == 0 or grid**2 != len(positions) - 1:
        raise UserError(f"{len(positions)} positions of the image tower are not a square grid and a class token")
    return shape


def _count_blocks(state: Mapping[str, Tensor], tower: str) -> int:
    found = (re.match(rf"{re.escape(tower)}\.resblocks\.(\d+)\.", name) for name in state)
    return len({match[1] for match in found if match})


def require_exact(state: Mapping[str, Tensor], shape: ClipShape) -> None:
    """Refuses a state dict under OpenAI's names that differs from the CLIP of `shape` in a name or a size.

    Raises:
        UserError: With the first names or the size.
    """
    with torch.device("meta"):
        expected = CLIP(shape).state_dict()
    _require_names(state, list(expected))
    unknown = [name for name in state if name not in expected]
    if unknown:
        raise UserError(
            f"{_some(unknown)} {'have' if len(unknown) > 1 else 'has'} no place in a CLIP with vision-transformer "
            "towers; a model with such parts computes something else"
        )
    for name, value in state.items():
        if value.shape != expected[name].shape or not value.is_floating_point():
            raise UserError(
                f"{name} is {value.dtype} of shape {list(value.shape)}; beside the other tensors it must be "
                f"floating-point of shape {list(expected[name].shape)}"
            )


def _require_names(state: Mapping[str, Tensor], names: list[str]) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        extra = [name for name in state if name not in names]
        raise UserError(
            f"not a whole CLIP, save its full state dict: {len(missing)} tensors are missing, {_some(missing)}"
            f"{near_names(missing[0], extra)}"
        )


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


Layout = Literal["OpenAI", "Hugging Face"]
ANCHORS: dict[Layout, str] = {  # a tensor that every file of the layout holds
    "OpenAI": "visual.conv1.weight",
    "Hugging Face": "vision_model.embeddings.patch_embedding.weight",
}
NOT_WEIGHTS = re.compile(r"(^(input_resolution|context_length|vocab_size)|(^|\.)(attn_mask|position_ids))$")

HUGGING_FACE = (  # pattern of Hugging Face's name -> OpenAI's; applied in order
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.([qkv])_proj\.(weight|bias)$", r".attn.in_proj_\2.\1"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.weight$", "visual.conv1.weight"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # their spelling
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
)


def to_openai_names(tensors: Tensors) -> tuple[Tensors, Layout]:
    """The tensors of the one CLIP of a file, under OpenAI's names, and whose names the file uses.

    What stands before its names is stripped, whatever it is. Of several copies the one under wrappers alone is taken,
    as in `{"model": ..., "ema": ...}`.

    Args:
        tensors: By name, those of towers [..., W].

    Raises:
        UserError: If there is none, or several are equally near.
    """
    plain = unwrapped(tensors)
    for layout, anchor in ANCHORS.items():
        found = [name.removesuffix(anchor) for name in plain[""] if re.search(rf"(^|\.){re.escape(anchor)}$", name)]
        if not found:
            continue
        by_wrapper = [prefix for prefix, inside in plain.items() if anchor in inside]
        if len(found) > 1 and len(by_wrapper) != 1:
            raise UserError(f"holds {len(found)} image towers, under {_some(found)}; save one CLIP alone")
        if by_wrapper:
            inside = plain[by_wrapper[0]]
        else:
            inside = {n.removeprefix(found[0]): value for n, value in plain[""].items() if n.startswith(found[0])}
        state = {name: value for name, value in inside.items() if not NOT_WEIGHTS.search(name)}
        if any(name.startswith("visual.layer1.") for name in state):
            raise UserError(
                "this CLIP's image tower is a ResNet; only vision transformers have the tokens that methods here "
                "need: choose ViT-B/32, ViT-B/16 or ViT-L/14"
            )
        return (_from_hugging_face(state) if layout == "Hugging Face" else state), layout
    raise UserError(
        f"not a CLIP with a vision transformer: {len(tensors)} tensors ({_some(list(tensors)) or 'none'}), and none is "
        f"called {' or '.join(ANCHORS.values())}"
    )


def _from_hugging_face(tensors: Tensors) -> Tensors:
    """Renames, transposes the two projections, and joins query, key and value of every block."""
    state: Tensors = {}
    for name, value in tensors.items():
        for pattern, replacement in HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        state[name] = value.T if name in {"visual.proj", "text_projection"} else value
    for joint in [name.removesuffix(".q") for name in state if name.endswith(".q")]:
        parts = [f"{joint}.{part}" for part in "qkv"]
        if all(part in state for part in parts):
            state[joint] = torch.cat([state.pop(part) for part in parts])
    return state


Activation = Literal["quick_gelu", "gelu"]


def activation_of(path: Path, form: str, layout: Layout, metadata: Mapping[str, str]) -> tuple[Activation, str]:
    """The activation of the MLPs, and who says so.

    Args:
        path: The file; beside it may lie a description.
        form: The file's form, see `read_tensors`.
        layout: Whose names it uses.
        metadata: What stands in it beside the tensors.

    Raises:
        UserError: If the description is damaged, or names an activation that is not known here.
    """
    if form == "TorchScript archive":
        return "quick_gelu", "OpenAI's"
    if "activation" in metadata:
        stated, told = {metadata["activation"]}, "stated in the file"
    else:
        beside = path.with_name("config.json" if layout == "Hugging Face" else "open_clip_config.json")
        if not beside.exists():
            return "quick_gelu", f"taken as OpenAI's, since there is no {beside.name} beside the file to say"
        told = f"stated in {beside.name}"
        try:
            described = json.loads(beside.read_text(encoding="utf-8"))
            if layout == "Hugging Face":
                towers = [described.get(tower) or {} for tower in ("text_config", "vision_config")]
                stated = {tower.get("hidden_act", "quick_gelu") for tower in towers}
            else:
                stated = {{True: "quick_gelu", False: "gelu"}[described["model_cfg"].get("quick_gelu", False)]}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{beside.name} beside it does not describe a CLIP; mend or remove it") from None
    for activation in ("quick_gelu", "gelu"):
        if stated == {activation}:
            return activation, told
    raise UserError(f"activation {' and '.join(sorted(map(repr, stated)))} is not known here, only quick_gelu and gelu")
