"""The embedded model in plain torch, in the pieces that an engine calls: no Transformers."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from vlcache_triton.apps.formreader.model import WEIGHTS

EMBEDDING = "language_model.model.embed_tokens.weight"


class FormReader:
    """A CLIP tower, a projector and a Llama, from the weights that the package ships.

    embed, then project and finish for each layer, then next_token; attention is the caller's. Rows
    are tokens `[n, ...]`, of one prompt or of a step's sequences.
    """

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.weights: dict[str, Tensor] = {}
        for file in sorted(WEIGHTS.glob("*.safetensors")):
            self.weights |= {name: x.to(device, dtype) for name, x in load_file(file).items()}
        config = json.loads((WEIGHTS / "config.json").read_text())
        self.text, self.vision = config["text_config"], config["vision_config"]
        self.image_token_id, self.eos_token_id = config["image_token_index"], config["eos_token_id"]
        self.num_layers, self.head_size = self.text["num_hidden_layers"], self.text["head_dim"]
        self.num_kv_heads = self.text["num_key_value_heads"]
        exponents = torch.arange(0, self.head_size, 2, device=device) / self.head_size
        self.frequencies = 1.0 / self.text["rope_parameters"]["rope_theta"] ** exponents

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.frequencies.device

    def new_zeros(self, *shape: int) -> Tensor:
        """Zeros of the weights' dtype, on their device."""
        return self.weights[EMBEDDING].new_zeros(shape)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens `[n]` int64 -> `[n, hidden_size]`."""
        return F.embedding(tokens, self.weights[EMBEDDING])

    def read(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """A prompt `[n]` with its images in their places -> `[n, hidden_size]`."""
        x = self.embed(input_ids)
        x[input_ids == self.image_token_id] = self._see(pixel_values.to(x))
        return x

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[n, 1, d]` of positions `[n]`."""
        angles = (positions[:, None, None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    def project(
        self, layer: int, x: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q `[n, num_heads, d]`, k and v `[n, num_kv_heads, d]` of a layer, after RoPE."""
        name = f"language_model.model.layers.{layer}."
        x = self._rms_norm(x, name + "input_layernorm")
        q, k, v = (
            self._linear(x, f"{name}self_attn.{part}_proj").unflatten(1, (-1, self.head_size))
            for part in "qkv"
        )
        return _rotate(q, *rope), _rotate(k, *rope), v

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """A layer's output `[n, hidden_size]`, given its attention `[n, num_heads, d]`."""
        name = f"language_model.model.layers.{layer}."
        x = x + self._linear(attended.flatten(1), name + "self_attn.o_proj")
        y = self._rms_norm(x, name + "post_attention_layernorm")
        gate = F.silu(self._linear(y, name + "mlp.gate_proj"))
        return x + self._linear(
            gate * self._linear(y, name + "mlp.up_proj"), name + "mlp.down_proj"
        )

    def next_token(self, x: Tensor) -> Tensor:
        """The likeliest `[n]` after the last layer's output `[n, hidden_size]`."""
        x = self._rms_norm(x, "language_model.model.norm")
        return self._linear(x, "language_model.lm_head").argmax(-1)

    def _see(self, pixel_values: Tensor) -> Tensor:
        """`[num_images, 3, height, width]` -> visual tokens `[num_images * 576, hidden_size]`."""
        name, patch = "vision_tower.embeddings.", self.vision["patch_size"]
        x = F.conv2d(pixel_values, self.weights[name + "patch_embedding.weight"], stride=patch)
        first = self.weights[name + "class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x.flatten(2).transpose(1, 2)], 1)
        x = x + self.weights[name + "position_embedding.weight"]
        x = self._layer_norm(x, "vision_tower.pre_layrnorm")
        heads = (self.vision["num_attention_heads"], -1)
        for layer in range(self.vision["num_hidden_layers"]):
            name = f"vision_tower.encoder.layers.{layer}."
            y = self._layer_norm(x, name + "layer_norm1")
            qkv = (self._linear(y, f"{name}self_attn.{part}_proj") for part in "qkv")
            qkv = (part.unflatten(2, heads).transpose(1, 2) for part in qkv)
            y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
            x = x + self._linear(y, name + "self_attn.out_proj")
            y = self._linear(self._layer_norm(x, name + "layer_norm2"), name + "mlp.fc1")
            x = x + self._linear(y * torch.sigmoid(1.702 * y), name + "mlp.fc2")
        x = F.gelu(self._linear(x[:, 1:], "multi_modal_projector.linear_1"))
        return self._linear(x, "multi_modal_projector.linear_2").flatten(0, 1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _rms_norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(
            x, x.shape[-1:], self.weights[name + ".weight"], self.text["rms_norm_eps"]
        )

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.vision["layer_norm_eps"])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)
