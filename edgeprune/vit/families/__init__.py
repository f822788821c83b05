"""The socket for model families: what edgeprune needs to know of a timm model's insides."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.errors import ModelError
from edgeprune.records import Vit
from edgeprune.vit.tokens import Attended

if TYPE_CHECKING:
    from torch import Tensor, nn

FAMILIES = {"vit": "edgeprune.vit.families.vit"}


class Family(Protocol):
    """Module-level functions over an untouched timm model. B images, N tokens, C channels."""

    def describe(self, model: Any, name: str, weights_sha256: str) -> Vit:
        """The model's record. Raises ModelError naming the feature that is not supported."""
        ...

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """(B, 3, P, P) images to the (B, N, C) tokens that enter block 0."""
        ...

    def block(self, block: Any, x: Tensor, sizes: Tensor | None) -> Tensor:
        """timm's own block, with proportional attention where sizes (B, N) are given."""
        ...

    def attend(self, block: Any, x: Tensor, sizes: Tensor | None) -> Attended:
        """Attention and residual of a block, with the softmax weights, keys and values kept."""
        ...

    def prefix_only(self, block: Any, x: Tensor, sizes: Tensor | None, prefix: int) -> Tensor:
        """The last block for the first `prefix` tokens alone: all that a prefix-pooled head reads."""
        ...

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        """MLP and residual of a block."""
        ...

    def classify(self, model: Any, x: Tensor) -> Tensor:
        """(B, N, C) tokens after the last block to (B, classes) logits."""
        ...


def family_of(model: nn.Module) -> tuple[str, Family]:
    """The family that supports a model, by asking each. Raises ModelError."""
    reasons = []
    for key, module in FAMILIES.items():
        family: Any = importlib.import_module(module)
        reason = family.unsupported(model)
        if reason is None:
            return key, family
        reasons.append(reason)
    raise ModelError("; ".join(reasons))


def family_named(key: str) -> Family:
    """A family by its key in a Vit record."""
    family: Any = importlib.import_module(FAMILIES[key])
    return family  # type: ignore[no-any-return]
