"""The interface of model families: the parts of a timm model that edgeprune uses."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.errors import ModelError
from edgeprune.records import Vit
from edgeprune.vit.tokens import Attended

if TYPE_CHECKING:
    from torch import Tensor, nn

FAMILIES = {"vit": "edgeprune.vit.families.vit", "eva": "edgeprune.vit.families.eva"}


class Family(Protocol):
    """Functions of a module, applied to a timm model that is never changed. B images, N tokens, C channels.

    `rows` are the rotary rows of the body tokens that enter a block, from rows_of in vit/rotary.py.
    """

    def owns(self, model: Any) -> bool:
        """Is a model of this family?"""
        ...

    def unsupported(self, model: Any) -> str | None:
        """Why a model of this family cannot be pruned, or None."""
        ...

    def describe(self, model: Any, name: str, weights_sha256: str) -> Vit:
        """The model's record. Raises ModelError naming the feature that is not supported."""
        ...

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """(B, 3, H, W) images to the (B, N, C) tokens that enter block 0."""
        ...

    def rotary(self, model: Any) -> Tensor | None:
        """The model's table of rotary positions (vit/rotary.py), or None."""
        ...

    def block(self, block: Any, x: Tensor, sizes: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """timm's own block, (B, N, C) to (B, N, C), with proportional attention if sizes (B, N) are given."""
        ...

    def attend(self, block: Any, x: Tensor, sizes: Tensor | None, rows: Tensor | None = None) -> Attended:
        """Attention and residual of a block, with its softmax weights, keys and values."""
        ...

    def prefix_only(
        self, block: Any, x: Tensor, sizes: Tensor | None, prefix: int, rows: Tensor | None = None
    ) -> Tensor:
        """The last block for only the first `prefix` tokens: (B, N, C) to (B, prefix, C)."""
        ...

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        """MLP and residual of a block: (B, N, C) to (B, N, C)."""
        ...

    def norm(self, model: Any, x: Tensor) -> Tensor:
        """The final norm of tokens, (B, N, C) to (B, N, C)."""
        ...

    def classify(self, model: Any, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """(B, N, C) tokens after the last block to (B, classes) logits; pooling weighs them by sizes (B, N)."""
        ...


def family_of(model: nn.Module) -> tuple[str, Family]:
    """The key and module of the family that supports a model. Raises ModelError with the reason if none does."""
    for key in FAMILIES:
        family = family_named(key)
        if family.owns(model):
            reason = family.unsupported(model)
            if reason is not None:
                raise ModelError(reason)
            return key, family
    kind = type(model).__name__
    raise ModelError(f"{kind} is not a timm VisionTransformer or Eva: choose one of `timm.list_models('vit_*')`")


def family_named(key: str) -> Family:
    """A family by its key in a Vit record."""
    family: Any = importlib.import_module(FAMILIES[key])
    return family  # type: ignore[no-any-return]
