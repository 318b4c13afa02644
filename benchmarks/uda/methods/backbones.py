"""ResNets and ViTs with trained weights, as generators of features.

The weights are read from a folder or from the hub's cache; nothing is fetched. What goes
in is normalized as the published trainings do it, with ImageNet's mean and deviation,
for ViT, too, whose weights were trained on images in [-1, 1].
"""

import hashlib
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.uda.methods.networks import Networks, assemble
from ghopt.extras import from_extra

BOTTLENECK = 256
"""How many features the heads and the discriminator see."""


class Backbone(NamedTuple):
    """A kind of network, and whose weights it is meant to have.

    Attributes:
        hub: their name on the hub of Hugging Face.
        layers: those of each stage, or of all.
    """

    hub: str
    layers: tuple[int, ...]


BACKBONES = {
    "resnet-50": Backbone("microsoft/resnet-50", (3, 4, 6, 3)),
    "resnet-101": Backbone("microsoft/resnet-101", (3, 4, 23, 3)),
    "vit-b16-in21k": Backbone("google/vit-base-patch16-224-in21k", (12,)),
    "vit-b16-in1k": Backbone("google/vit-base-patch16-224", (12,)),
}


class Pooled(nn.Module):
    """A ResNet, images ``[B, 3, h, w]`` to the means of its last maps, ``[B, f]``."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.resnet(images).pooler_output
        return features.flatten(1)


class FirstToken(nn.Module):
    """A ViT, images ``[B, 3, h, w]`` to its class token, normalized, ``[B, f]``."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        tokens: Tensor = self.vit(images).last_hidden_state
        return tokens[:, 0]


def build_networks(
    method: str, classes: int, seed: int, name: str, weights: str | None = None
) -> tuple[Networks, nn.Module]:
    """Build a method's networks upon a trained backbone and a bottleneck.

    ``seed`` alone decides the weights of all else. Sets the global random state, from
    which dropout draws later. All is in training mode, BatchNorm, too: as the methods
    pass source and target apart, each is normalized by its own batch, and the running
    means are of both.

    Args:
        method: one of ``steps.METHODS``.
        classes: how many.
        seed: of the bottleneck, heads and discriminator.
        name: a key of ``BACKBONES``.
        weights: a folder, or another name on the hub than the backbone's.

    Returns:
        The networks, and their backbone, the first part of the generator.

    Raises:
        FileNotFoundError: if there are no weights; says which to fetch, and how.
        ValueError: if the weights are of another kind of network.
        ImportError: if ``transformers`` is missing.

    Warns:
        UserWarning: if the weights are not of so many layers as this backbone has.
    """
    backbone, features = load_backbone(name, weights)
    torch.manual_seed(seed)
    generator = nn.Sequential(backbone, nn.Linear(features, BOTTLENECK))
    return assemble(method, generator, BOTTLENECK, classes), backbone


def load_backbone(name: str, weights: str | None = None) -> tuple[nn.Module, int]:
    """Load a backbone, in training mode, and the number of its features.

    For arguments and errors see :func:`build_networks`.
    """
    with from_extra("images"):
        from transformers import ResNetModel, ViTModel
    known = BACKBONES[name]
    where = weights or known.hub
    vit = name.startswith("vit")
    # The pooler of a ViT is a layer that its classifiers do not use.
    extra = {"add_pooling_layer": False} if vit else {}
    # Its types do not know of output_loading_info.
    kind: Any = ViTModel if vit else ResNetModel
    try:
        model, report = kind.from_pretrained(
            where,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,  # or weights in half precision would stay so
            **extra,
        )
    except OSError as error:
        raise FileNotFoundError(f"no weights in {where}: {_fetch(name)}") from error
    if report["missing_keys"]:
        raise ValueError(
            f"the weights in {where} are not of a {kind.__name__}, of which they lack "
            f"{len(report['missing_keys'])} tensors: {_fetch(name)}"
        )
    config = model.config
    layers = (config.num_hidden_layers,) if vit else tuple(config.depths)
    if layers != known.layers:
        warnings.warn(
            f"{where} has {layers} layers, but {name} has {known.layers}", stacklevel=2
        )
    backbone: nn.Module = FirstToken(model) if vit else Pooled(model)
    features: int = config.hidden_size if vit else config.hidden_sizes[-1]
    # from_pretrained leaves its model in evaluation mode.
    return backbone.train(), features


def digest_of(module: nn.Module) -> str:
    """Hash the parameters and buffers of a network on the CPU."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().numpy())
    return found.hexdigest()[:16]


def _fetch(name: str) -> str:
    return (
        f"fetch those of {name} with `hf download {BACKBONES[name].hub} --local-dir "
        "DIR` (before huggingface_hub 1: `huggingface-cli download ...`), and pass "
        "--weights DIR"
    )
