"""The tensors of a Hugging Face checkpoint under the names that timm has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
IGNORED = ("mask_token", "position_ids", "inv_freq")  # last parts of names: only for training, or constants
TEXT = ("text_model.", "text_projection.", "logit_scale", "logit_bias")  # the other half of CLIP and SigLIP


class Names(NamedTuple):
    """What an architecture calls the parts of a block."""

    block: str  # with the index of the block for {}
    attention: tuple[str, str, str]  # queries, keys, values
    parts: dict[str, str]  # timm's layer: its name


VIT = Names(
    "encoder.layer.{}.",
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    },
)  # fmt: skip
DINOV2 = Names(
    "encoder.layer.{}.",
    VIT.attention,
    {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense"},
)
CLIP = Names(
    "encoder.layers.{}.",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    {
        "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    },
)  # fmt: skip
DINOV3 = Names(
    "layer.{}.",
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj"},
)


class Tensors:
    """The tensors of a checkpoint, without a prefix that some versions put before them; each is taken once."""

    def __init__(self, found: State, *prefixes: str) -> None:
        self.left = {}
        for name, tensor in found.items():
            for prefix in prefixes:
                name = name.removeprefix(prefix)
            if tensor.numel() and name.rsplit(".", 1)[-1] not in IGNORED and not name.startswith(TEXT):
                self.left[name] = tensor

    def __call__(self, name: str) -> Tensor:
        try:
            return self.left.pop(name)
        except KeyError:
            raise ValueError(f"tensor {name} is missing from the checkpoint") from None

    def layer(self, to: str, name: str) -> State:
        """Weight and, where there is one, bias."""
        found = {f"{to}.weight": self(f"{name}.weight")}
        if f"{name}.bias" in self.left:
            found[f"{to}.bias"] = self(f"{name}.bias")
        return found

    def block(self, index: int, names: Names, parts: Mapping[str, str], separate: bool = False) -> State:
        """A block with its queries, keys and values as one matrix; biases apart for timm's Eva (`separate`)."""
        here = names.block.format(index)
        state: State = {}
        for to, name in {**names.parts, **parts}.items():
            state |= self.layer(to, here + name)
        three = [self.layer("", here + name) for name in names.attention]
        state["attn.qkv.weight"] = torch.cat([each[".weight"] for each in three])
        if separate and ".bias" in three[0]:
            state |= {"attn.q_bias": three[0][".bias"], "attn.v_bias": three[2][".bias"]}
        elif not separate and all(".bias" in each for each in three):
            state["attn.qkv.bias"] = torch.cat([each[".bias"] for each in three])
        return {f"blocks.{index}.{name}": tensor for name, tensor in state.items()}

    def done(self, state: State) -> State:
        """The state, if nothing of the checkpoint is left."""
        if self.left:
            raise ValueError(f"tensor {min(self.left)} has no counterpart in timm's model")
        return state
