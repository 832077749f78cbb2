"""CLIP with vision-transformer towers: pooled features and features of every token.

Modules carry the names of OpenAI's release, so that its state dict loads as it stands; everything is batch first.
Read from the bottom of the tree to its root: attention, residual block, transformer, image tower, CLIP.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
https://arxiv.org/abs/2103.00020. Authors' code: https://github.com/openai/CLIP (MIT); none of it is used here.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.losses import full_precision
from common.types import ClipShape

HEAD_WIDTH = 64  # of every CLIP that OpenAI released


class LayerNorm(nn.LayerNorm):
    """Layer normalisation at the precision of its weights, whatever the activations' is (eps 1e-5)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of `x` [..., W]; returns [..., W] in the dtype of `x`."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class QuickGELU(nn.Module):
    """The activation of CLIP, `u * sigmoid(1.702 u)`; not torch's GELU."""

    def forward(self, u: Tensor) -> Tensor:
        """Elementwise on `u` [...]; returns [...]."""
        return F.silu(1.702 * u) / 1.702  # the same function, in one kernel that keeps one tensor for backward


class Attention(nn.Module):
    """Multi-head self-attention with a joint in-projection: rows of queries, of keys, of values.

    Initialised as torch's `nn.MultiheadAttention`: Xavier-uniform in-projection, biases 0.

    Args:
        width: W, a multiple of `heads`.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attends over the tokens of each row.

        Args:
            x: Tokens, [B, L, W].
            mask: True where a token (row) may look at a token (column); bool, broadcastable to [B, heads, L, L]. Every
                row needs a True.
            causal: Tokens look at themselves and at earlier ones only; without `mask`, since fused kernels know it.

        Returns:
            [B, L, W].
        """
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        # In bf16, torch's attention for a CPU takes three times as long as in float32.
        slow = projected.dtype == torch.bfloat16 and projected.device.type == "cpu"
        with full_precision(projected.device) if slow else nullcontext():
            query, key, value = rearrange(
                projected.float() if slow else projected,
                "B L (three heads w) -> three B heads L w",
                three=3,
                heads=self.heads,
            )
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        out: Tensor = self.out_proj(rearrange(mixed, "B heads L w -> B L (heads w)"))
        return out


class ResidualBlock(nn.Module):
    """Pre-norm residual block of CLIP: `x + attention(LN(x))`, then `x + MLP(LN(x))` with a hidden width of 4 W.

    Args:
        width: W, a multiple of `heads`.
        heads: Number of attention heads.
        activation: `quick_gelu` (OpenAI's) or `gelu`.
    """

    def __init__(self, width: int, heads: int, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU() if activation == "quick_gelu" else nn.GELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Tokens `x` [B, L, W] -> [B, L, W]; `mask` and `causal` as in `Attention`."""
        x = x + self.attn(self.ln_1(x), mask, causal)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """A stack of residual blocks, with torch's default initialisation.

    Args:
        width: W, a multiple of `heads`.
        layers: Number of blocks; 0 is the identity.
        heads: Number of attention heads.
        activation: `quick_gelu` (OpenAI's) or `gelu`.

    Attributes:
        recompute: Whether only the tokens before each block are kept while gradients are recorded; backward computes
            the blocks again, one at a time. The values and gradients are the same.
    """

    def __init__(self, width: int, layers: int, heads: int, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.recompute = False
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, activation) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Tokens `x` [B, L, W] -> [B, L, W]; `mask` and `causal` as in `Attention`."""
        for block in self.resblocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, causal, use_reentrant=False, preserve_rng_state=False)  # no dropout
            else:
                x = block(x, mask, causal)
        return x


class ImageTower(nn.Module):
    """Vision transformer: patches, a class token before them, no mask.

    Args:
        shape: Sizes of the CLIP.
    """

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        width, scale = shape.vision_width, shape.vision_width**-0.5
        self.image_size = shape.image_size
        self.conv1 = nn.Conv2d(3, width, shape.patch_size, stride=shape.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + shape.patches, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, shape.vision_layers, width // HEAD_WIDTH, shape.activation)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, shape.embed_dim))

    def forward(self, image: Tensor) -> Tensor:
        """Pictures [B, 3, R, R] -> tokens before the last normalisation and projection, [B, 1+P, W]; class token first.

        Raises:
            UserError: If the pictures are not of the size that the tower was built for.
        """
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"pictures of {image.shape[-2]} x {image.shape[-1]} pixels for a CLIP of {self.image_size}: "
                f"set the data set's image size to {self.image_size}, or choose a backbone of that size"
            )
        patches = self._embed(image)
        start = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([start, patches], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return x

    def _embed(self, image: Tensor) -> Tensor:
        """Pictures [B, 3, R, R] -> patches [B, P, W]."""
        if not torch.is_autocast_enabled(image.device.type):
            return rearrange(self.conv1(image), "B W rows columns -> B (rows columns) W")
        # As a matrix product: torch has no fast backward pass of a convolution in bf16 for a CPU.
        side = self.conv1.kernel_size[0]
        pixels = rearrange(image, "B c (rows p) (columns q) -> B (rows columns) (c p q)", p=side, q=side)
        return F.linear(pixels, self.conv1.weight.flatten(1))

    def project(self, x: Tensor) -> Tensor:
        """Last normalisation and projection of tokens [..., W] into the joint space, [..., E]."""
        return self.join(self.ln_post(x))

    def join(self, x: Tensor) -> Tensor:
        """Projection of tokens after the last normalisation, [..., W], into the joint space, [..., E]."""
        return (x @ self.proj).to(self.proj.dtype)


class CLIP(nn.Module):
    """Image tower, text tower and their joint space. Features are not normalised; there is no dropout.

    A new CLIP is initialised as OpenAI's, ready to be trained from scratch.

    Args:
        shape: Sizes of the towers; widths are multiples of 64.

    Attributes:
        parts: Parts of a batch that are computed one after the other while gradients are recorded. With more than one,
            only what the towers return is kept, and backward computes each part again: memory is that of one part
            beside it, the gradient that of the whole batch to rounding, the time a third more.
    """

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        self.shape = shape
        self.parts = 1
        width = shape.text_width
        self.visual = ImageTower(shape)
        self.token_embedding = nn.Embedding(shape.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(shape.context_length, width))
        self.transformer = Transformer(width, shape.text_layers, width // HEAD_WIDTH, shape.activation)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, shape.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._initialise_text()

    def _initialise_text(self) -> None:
        """Normal weights that shrink with depth, as in OpenAI's release; the image tower keeps torch's defaults."""
        width = self.shape.text_width
        residual = (width * 2 * self.shape.text_layers) ** -0.5 if self.shape.text_layers else 0.0
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for name, parameter in self.transformer.named_parameters():
            if name.endswith("attn.in_proj_weight"):
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith(("attn.out_proj.weight", "mlp.c_proj.weight")):
                nn.init.normal_(parameter, std=residual)
            elif name.endswith("mlp.c_fc.weight"):
                nn.init.normal_(parameter, std=(2 * width) ** -0.5)

    def image_features(self, image: Tensor) -> Tensor:
        """Pooled features of pictures.

        Args:
            image: Normalised pixels, [B, 3, R, R].

        Returns:
            The class token in the joint space, [B, E].

        Raises:
            UserError: If the pictures are not of the size R of `shape`.
        """
        return self._by_parts(lambda rows, _: self.visual.project(self.visual(rows)[:, 0]), image)

    def image_tokens(self, image: Tensor) -> Tensor:
        """Features of every token of pictures; the last normalisation and projection apply to each.

        Args:
            image: Normalised pixels, [B, 3, R, R].

        Returns:
            [B, 1+P, E]; token 0 is what `image_features` returns, then the patches row by row.

        Raises:
            UserError: If the pictures are not of the size R of `shape`.
        """
        return self._by_parts(lambda rows, _: self.visual.project(self.visual(rows)), image)

    def image_states(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features, and every token of pictures after the last normalisation, before the projection.

        Args:
            image: Normalised pixels, [B, 3, R, R].

        Returns:
            What `image_features` returns, [B, E], and all tokens, [B, 1+P, W], the class token first.

        Raises:
            UserError: If the pictures are not of the size R of `shape`.
        """
        states = self._by_parts(lambda rows, _: self.visual.ln_post(self.visual(rows)), image)
        return self.visual.join(states[:, 0]), states

    def text_features(self, ids: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Pooled features of texts.

        Tokens that are padding in all texts are not computed where that is quicker, see `without_padding`.

        Args:
            ids: Token ids, [B, L] int64, L at most the context length.
            key_padding_mask: True for tokens that no token may look at, [B, L] bool; see `text_tokens`.

        Returns:
            The feature at the first end-of-text, [B, E].

        Raises:
            UserError: If the texts are longer than the context.
        """
        ids = without_padding(ids)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[:, : ids.shape[1]]

        def pooled(rows: Tensor, mask: Tensor | None) -> Tensor:
            return self._project_text(_at_end_of_text(self._text_tower(rows, mask), rows))

        return self._by_parts(pooled, ids, key_padding_mask)

    def text_tokens(self, ids: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pooled features and features of every token of texts; the last normalisation and projection apply to each.

        Args:
            ids: Token ids, [B, L] int64, L at most the context length.
            key_padding_mask: True for tokens that no token may look at, [B, L] bool, beside the causal mask. The first
                token is never hidden, so that every token has something to look at. Behind end-of-text the mask
                changes padding only; `ids == 0` also hides id 0 inside words, as the authors of MITH do.

        Returns:
            The feature at the first end-of-text, [B, E], and all tokens, [B, L, E], padding included.

        Raises:
            UserError: If the texts are longer than the context.
        """

        def projected(rows: Tensor, mask: Tensor | None) -> Tensor:
            return self._project_text(self._text_tower(rows, mask))

        tokens = self._by_parts(projected, ids, key_padding_mask)
        return _at_end_of_text(tokens, ids), tokens

    def text_states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features, and every token of texts after the last normalisation, before the projection.

        Args:
            ids: Token ids, [B, L] int64, L at most the context length.

        Returns:
            What `text_features` returns, [B, E], and all tokens, [B, L, W], padding included.

        Raises:
            UserError: If the texts are longer than the context.
        """
        states = self._by_parts(lambda rows, _: self.ln_final(self._text_tower(rows, None)), ids)
        return self._join_text(_at_end_of_text(states, ids)), states

    def _by_parts(self, tower: Callable[..., Tensor], rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """`tower(rows, mask)` of rows [B, ...] and a mask of the same rows, computed in `parts` parts; [B, ...]."""
        if self.parts == 1 or not torch.is_grad_enabled() or len(rows) < 2:  # an export knows no number of rows
            return tower(rows, mask)
        size = -(-len(rows) // self.parts)
        parts = torch.split(rows, size)
        masks = [None] * len(parts) if mask is None else torch.split(mask, size)
        features = [
            checkpoint(tower, part, hidden, use_reentrant=False, preserve_rng_state=False)  # there is no dropout
            for part, hidden in zip(parts, masks, strict=True)
        ]
        return torch.cat(features)

    def _text_tower(self, ids: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Ids [B, L] -> tokens before the last normalisation and projection, [B, L, W]."""
        length = ids.shape[1]
        if length > self.shape.context_length:
            raise UserError(
                f"texts of {length} tokens for a CLIP whose position table has {self.shape.context_length}: "
                f"lower the data set's text length to {self.shape.context_length}"
            )
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        if key_padding_mask is None:
            return self.transformer(x, causal=True)
        visible = ~key_padding_mask
        visible[:, 0] = True
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        return self.transformer(x, mask=causal & visible[:, None, None, :])  # [B, 1, L, L]

    def _project_text(self, x: Tensor) -> Tensor:
        """Last normalisation and projection of tokens [..., W] into the joint space, [..., E]."""
        return self._join_text(self.ln_final(x))

    def _join_text(self, x: Tensor) -> Tensor:
        """Projection of tokens after the last normalisation, [..., W], into the joint space, [..., E]."""
        return (x @ self.text_projection).to(self.text_projection.dtype)


def without_padding(ids: Tensor) -> Tensor:
    """Texts cut behind the longest of them: what follows is padding of all, which no earlier token looks at.

    They stay as they are on an accelerator, which a step would have to wait for to know the length, and in what is
    compiled, where a length that varies would compile anew.

    Args:
        ids: Token ids, [B, L] int64; 0 is padding.

    Returns:
        [B, L'] with L' at most L.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return ids
    used = ids.any(dim=0).nonzero()
    return ids[:, : int(used[-1]) + 1] if len(used) else ids


def _at_end_of_text(tokens: Tensor, ids: Tensor) -> Tensor:
    """Of tokens [B, L, W], the one at the first end-of-text, which is the largest id: [B, W]."""
    return tokens[torch.arange(ids.shape[0], device=ids.device), ids.argmax(dim=-1)]
