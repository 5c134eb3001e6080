"""Nets as flax linen modules, each described by a config.

A module is called as ``module.apply(variables, x, train=bool)`` and returns float32 logits [B, C]
(a Transformer [B, T, C], a Unet [B, H, W, C]). Its variables are ``params`` and, with batch norm,
``batch_stats``, which training mode updates; dropout draws from the random stream ``dropout``. The
names of the parameters are documented at each module; sharding rules, permutation specs and masks
match them.
"""

from flax import linen as nn

from dynamics.models.convnet import Convnet, ConvnetModule
from dynamics.models.mlp import MLP, Linear, LinearModule, MLPModule
from dynamics.models.resnet import ResNet, ResNetModule
from dynamics.models.rnn import RNN, RNNModule
from dynamics.models.transformer import Transformer, TransformerModule
from dynamics.models.unet import Unet, UnetModule

Model = Linear | MLP | Convnet | ResNet | RNN | Transformer  # a Unet's labels are images

__all__ = ["MLP", "RNN", "Convnet", "Linear", "Model", "ResNet", "Transformer", "Unet", "make"]


def make(config: Model | Unet, num_outputs: int) -> nn.Module:
    """The module that ``config`` describes, with logits for ``num_outputs`` classes or tokens."""
    if num_outputs < 1:
        raise ValueError(f"num_outputs must be >= 1, got {num_outputs}")
    match config:
        case Linear():
            return LinearModule(config, num_outputs)
        case MLP():
            return MLPModule(config, num_outputs)
        case Convnet():
            return ConvnetModule(config, num_outputs)
        case ResNet():
            return ResNetModule(config, num_outputs)
        case RNN():
            return RNNModule(config, num_outputs)
        case Transformer():
            return TransformerModule(config, num_outputs)
        case Unet():
            return UnetModule(config, num_outputs)
