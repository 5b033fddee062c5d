"""MLP-Mixer as a transformers model (Tolstikhin et al., NeurIPS 2021, arXiv 2105.01601).

Written out here because transformers has none and timm's needs torchvision. It follows the paper: a
linear stem over the patches, layers of two MLPs with skip connections, a last LayerNorm, the mean over
the patches, a linear head. For the input X of a layer, (patches, hidden), its equation 1 is

    U = X + (W_2 gelu(W_1 LayerNorm(X)^T))^T        token mixing, across patches
    Y = U + W_4 gelu(W_3 LayerNorm(U))              channel mixing, across hidden

All four are nn.Linear layers with biases and can take adapters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput


class MlpMixerConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of an MLP-Mixer.

    Attributes:
        image_size: height and width of the input.
        patch_size: height and width of a patch, a divisor of it.
        num_channels: of the input.
        hidden_size: numbers that describe a patch, C in the paper.
        num_hidden_layers: layers of two MLPs.
        tokens_mlp_dim: inner width of the MLP across patches, D_S in the paper.
        channels_mlp_dim: inner width of the MLP across channels, D_C in the paper.
    """

    model_type = "mlp-mixer"

    image_size: int = 28
    patch_size: int = 4
    num_channels: int = 1
    hidden_size: int = 64
    num_hidden_layers: int = 4
    tokens_mlp_dim: int = 32
    channels_mlp_dim: int = 128
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, back to the size of the input."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, inner)
        self.fc2 = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return y


class MixerLayer(nn.Module):
    """Token mixing, then channel mixing."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.norm_tokens = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.token_mixing = Mlp(patches, config.tokens_mlp_dim)
        self.norm_channels = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.channel_mixing = Mlp(config.hidden_size, config.channels_mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, hidden) to the same."""
        x = x + self.token_mixing(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = x + self.channel_mixing(self.norm_channels(x))
        return y


class MlpMixerPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Names that transformers needs, and its default draw of fresh weights."""

    config_class = MlpMixerConfig
    base_model_prefix = "mixer"
    main_input_name = "pixel_values"


class MlpMixerModel(MlpMixerPreTrainedModel):
    """The Mixer without a head."""

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__(config)
        sizes: Any = config
        self.stem = nn.Conv2d(sizes.num_channels, sizes.hidden_size, sizes.patch_size, sizes.patch_size)
        self.layers = nn.ModuleList(MixerLayer(sizes) for _ in range(sizes.num_hidden_layers))
        self.layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """States (batch, patches, hidden) of images (batch, channels, height, width)."""
        x = self.stem(pixel_values.to(self.stem.weight.dtype)).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=self.layernorm(x))


class MlpMixerForImageClassification(MlpMixerPreTrainedModel):
    """The Mixer, the mean over its patches, and a linear layer."""

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__(config)
        sizes: Any = config
        self.mixer = MlpMixerModel(config)
        self.classifier = nn.Linear(sizes.hidden_size, sizes.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """The logits (batch, num_labels), and the mean cross entropy if there are labels."""
        logits = self.classifier(self.mixer(pixel_values).last_hidden_state.mean(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(MlpMixerConfig.model_type, MlpMixerConfig, exist_ok=True)
AutoModel.register(MlpMixerConfig, MlpMixerModel, exist_ok=True)
AutoModelForImageClassification.register(MlpMixerConfig, MlpMixerForImageClassification, exist_ok=True)
