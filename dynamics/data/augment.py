"""Random changes to inputs, made on the device inside the step: ``(key, x) -> x``."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.calls import Call
from dynamics.types import Key


def crop_and_flip(pad: int = 4) -> Callable[[Key, jax.Array], jax.Array]:
    """Reflect-pad by ``pad`` pixels, crop back at a random offset and flip left-right with
    probability 1/2, each drawn per image: x f32[B, H, W] or f32[B, H, W, C].
    """
    return Call(_cropped_and_flipped, (pad,))


def _cropped_and_flipped(pad: int, key: Key, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    if x.ndim == 3:
        return _cropped_and_flipped(pad, key, x[..., None])[..., 0]
    if x.ndim != 4 or min(x.shape[1:3]) <= pad:
        raise ValueError(
            f"crop_and_flip needs images [B, H, W] or [B, H, W, C] larger than its pad of "
            f"{pad} pixels, got {x.shape}"
        )
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    crop_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(crop_key, (len(x), 2), 0, 2 * pad + 1)

    def one(image: jax.Array, offset: jax.Array, flip: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], jnp.int32(0))
        out = jax.lax.dynamic_slice(image, start, x.shape[1:])
        return jnp.where(flip, out[:, ::-1], out)

    return jax.vmap(one)(padded, offsets, jax.random.bernoulli(flip_key, shape=(len(x),)))
