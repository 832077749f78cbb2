"""A graph network over two sets of items: nodes are items, edges all ordered pairs of them."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from models.blocks.heads import BatchNorm


class _Block(nn.Module):
    """What node and edge blocks share: three projections for attention, and a step of normalised residual updates.

    Args:
        width: K of nodes and edges.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (init_attention(nn.Linear(width, width)) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.LayerNorm(4 * width), nn.Linear(4 * width, width)
        )

    def settle(self, x: Tensor) -> Tensor:
        """Activation, then the block's one normalisation, which all its updates share: [..., K] -> [..., K]."""
        settled: Tensor = self.norm(nn.functional.gelu(x))
        return settled

    def transform(self, x: Tensor) -> Tensor:
        """The feed-forward update, [..., K] -> [..., K]."""
        return self.settle(self.feed_forward(x) + x)


class NodeBlock(_Block):
    """Nodes take up messages of other nodes, by attention, and of their edges, as a sum.

    Args:
        width: K; a multiple of `heads`.
        heads: Of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width)
        self.heads = heads
        self.out = init_attention(nn.Linear(width, width))
        self.from_edges = nn.Linear(width, width)

    def forward(self, sources: Tensor, targets: Tensor, edges: Tensor, unheard: Tensor) -> Tensor:
        """The new nodes.

        A target attends to the sources that it may hear, to all alike if it may hear none. Its message is added to the
        source of the same number, as in the authors' code.

        Args:
            sources: [B, K].
            targets: [B, K].
            edges: From source i to target j, [B, B, K].
            unheard: True where target j must not hear source i, [B, B] bool.

        Returns:
            [B, K].
        """
        q = rearrange(self.query(targets), "j (h k) -> h j k", h=self.heads)
        k, v = (rearrange(project(sources), "i (h k) -> h i k", h=self.heads) for project in (self.key, self.value))
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(unheard.T, -1e9)  # [h, j, i]
        message = rearrange(scores.softmax(-1) @ v, "h j k -> j (h k)")
        nodes = self.settle(sources + self.out(message))
        nodes = self.settle(nodes + nn.functional.gelu(self.from_edges(edges)).sum(1))
        return self.transform(nodes)


class EdgeBlock(_Block):
    """Edges attend to the two nodes that they join.

    Args:
        width: K.
        dropout: Of the attention's two weights, in [0, 1).
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(width)
        self.from_nodes = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """Nodes [B, K] and edges [B, B, K] -> the new edges, [B, B, K]."""
        nodes = nn.functional.gelu(self.from_nodes(nodes))
        q, k, v = self.query(edges), self.key(nodes), self.value(nodes)
        scores = torch.stack([(q * k[:, None]).sum(-1), (q * k).sum(-1)], dim=-1) / math.sqrt(q.shape[-1])
        to_source, to_target = self.dropout(scores.softmax(-1)).unsqueeze(-1).unbind(-2)
        return self.transform(self.settle(to_source * v[:, None] + to_target * v + edges))


class PairGraph(nn.Module):
    """Classes of the first set's items, and a value in (0, 1) for every pair of items and every bit.

    Args:
        bits: K, width of items, nodes and edges; a multiple of `heads`.
        classes: C.
        layers: Number of node blocks, each followed by an edge block.
        heads: Of the attention between nodes.
        dropout: Of the attention of edges.

    Source:
        DGHDGH, ICLR 2026, the graph generator.
    """

    def __init__(self, bits: int, classes: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.reduce = nn.Linear(bits, bits)
        self.nodes = nn.ModuleList(NodeBlock(bits, heads) for _ in range(layers))
        self.edges = nn.ModuleList(EdgeBlock(bits, dropout) for _ in range(layers))
        self.edge_norm, self.node_norm = BatchNorm(bits), BatchNorm(bits)
        for norm in (self.edge_norm, self.node_norm):
            norm.bias.requires_grad_(False)  # stays at 0
        self.classes = nn.Linear(bits, classes)
        self.pair = nn.Linear(bits, bits)

    def forward(self, a: Tensor, b: Tensor, similar: Tensor) -> tuple[Tensor, Tensor]:
        """Looks at all pairs of the global batch.

        Args:
            a: Sources, [B, K].
            b: Targets, [B, K]; item j belongs to item j of `a`.
            similar: True where items i and j share a label, [B, B] bool: their nodes do not hear each other.

        Returns:
            Class scores, [B, C], and the values of pairs (i, j), [B, B, K].
        """
        centred = [nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=-1) for x in (a, b)]
        edges = centred[0][:, None] * centred[1]  # their sum over K is Pearson's correlation
        sources, targets = self.reduce(a), self.reduce(b)
        for node_block, edge_block in zip(self.nodes, self.edges, strict=True):
            sources = targets = node_block(sources, targets, edges, similar)
            edges = edge_block(sources, edges)
        values = self.pair(self.edge_norm(edges.flatten(0, 1)).view_as(edges)).sigmoid()
        return self.classes(self.node_norm(sources)), values


def init_attention(linear: nn.Linear) -> nn.Linear:
    """Draws weights by Xavier's uniform rule and sets the bias to 0; returns the same module."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
