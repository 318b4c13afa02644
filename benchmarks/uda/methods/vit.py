"""A small vision transformer, whose token sequences can be reached between its blocks.

After Dosovitskiy et al. (2021), with normalization before each part of a block, and
without dropout: what chance does to the tokens is the method's business.
"""

import torch
from torch import Tensor, nn

PATCH, WIDTH, DEPTH, HEADS = 4, 64, 4, 4
HIDDEN = 2 * WIDTH


class VisionTransformer(nn.Module):
    """Grey images to features ``[B, 64]``: 140 000 parameters.

    Attributes:
        depth: the number of blocks.

    Args:
        size: height and width of the images, in whole patches of 4.

    Raises:
        ValueError: if patches do not tile such an image.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < PATCH or size % PATCH:
            raise ValueError(f"Invalid size value: {size}")
        self.depth = DEPTH
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        # As small as ViT's: what a patch shows should not drown in where it lies.
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(
            0.02 * torch.randn(1, 1 + (size // PATCH) ** 2, WIDTH)
        )
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH,
                HEADS,
                HIDDEN,
                dropout=0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def embed(self, images: Tensor) -> Tensor:
        """Cut images ``[B, 1, s, s]`` into tokens ``[B, T, 64]``, the class's first."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        first = self.first.expand(len(images), -1, -1)
        return torch.cat([first, patches], dim=1) + self.positions

    def advance(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """Send tokens ``[B, T, 64]`` through the blocks from ``start`` to ``end``."""
        for block in self.blocks[start:end]:
            tokens = block(tokens)
        return tokens

    def finish(self, tokens: Tensor, start: int) -> Tensor:
        """Make features ``[B, 64]`` of the tokens that the block ``start`` would get."""
        features: Tensor = self.norm(self.advance(tokens, start, self.depth)[:, 0])
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Make features ``[B, 64]`` of images ``[B, 1, s, s]``."""
        return self.finish(self.embed(images), 0)
