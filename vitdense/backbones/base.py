"""What every backbone promises."""

from __future__ import annotations

from torch import Tensor, nn

from vitdense.structures import Level


class Backbone(nn.Module):
    """Images in, feature maps out.

    Attributes:
        levels: channels and stride of each map, finest first, known before anything runs.
        in_chans: channels of the images it takes.
        token_channels: of the class token that `forward_with_token` gives; 0 = there is none.
        mean, std: per-channel normalisation of images in 0..1, applied by the model.
    """

    levels: list[Level]
    in_chans: int = 3
    token_channels: int = 0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps.

        Args:
            images: float [B, in_chans, H, W], normalised; any H and W.

        Returns:
            float [B, channels, ceil(H / stride), ceil(W / stride)] for each level, finest first.
        """
        raise NotImplementedError

    def forward_with_token(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """As `forward`, with the last class token, float [B, token_channels], if there is one."""
        raise NotImplementedError

    def layer_depths(self) -> dict[str, int]:
        """Depth of each parameter by name, 0 = stem, growing towards the head.

        The optimizer scales learning rates by `layer_decay ** (max_depth + 1 - depth)`.
        An empty mapping means that the backbone has no such order.
        """
        return {}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay beside norms and biases."""
        return set()
