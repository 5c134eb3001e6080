"""Random changes to inputs, made on the device inside the step: ``(key, x) -> x``."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.types import Key


def crop_and_flip(pad: int = 4) -> Callable[[Key, jax.Array], jax.Array]:
    """Reflect-pad by ``pad`` pixels, crop back at a random offset and flip left-right with
    probability 1/2, each drawn per image: x f32[B, H, W, C].
    """

    def augment(key: Key, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
        crop_key, flip_key = jax.random.split(key)
        offsets = jax.random.randint(crop_key, (len(x), 2), 0, 2 * pad + 1)

        def one(image: jax.Array, offset: jax.Array, flip: jax.Array) -> jax.Array:
            start = (offset[0], offset[1], jnp.int32(0))
            out = jax.lax.dynamic_slice(image, start, x.shape[1:])
            return jnp.where(flip, out[:, ::-1], out)

        return jax.vmap(one)(padded, offsets, jax.random.bernoulli(flip_key, shape=(len(x),)))

    return augment
