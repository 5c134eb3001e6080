"""How fast a kernel turns."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def velocity(before: Float[Array, "*n"], after: Float[Array, "*n"]) -> Float[Array, ""]:
    """``1 - <K, K'>_F / (||K||_F ||K'||_F)``, in [0, 1] for kernels; blind to their scale.

    Computed as half the squared distance of the normalised kernels, so small velocities keep their
    digits and none is negative. A kernel of zeros has velocity nan.

    Reference: Fort et al. 2020, arXiv 2010.15110, section 3; for submatrices in the order of a
    score Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, section 4.
    """

    def unit(kernel: jax.Array) -> jax.Array:
        scaled = kernel.astype(jnp.float32) / jnp.abs(kernel).max()
        return scaled / jnp.sqrt(jnp.sum(scaled**2))

    return jnp.sum((unit(before) - unit(after)) ** 2) / 2
