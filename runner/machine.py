"""The machine, before anything is computed: what its environment says, and its devices."""

import math
import os
from collections.abc import Callable

from runner.errors import Refused

WHOLE = {"JAX_NUM_CPU_DEVICES": 1, "JAX_NUM_PROCESSES": 1, "JAX_PROCESS_ID": 0}  # and at least


def check() -> None:
    """Refused: a number in the environment is none. jax must not be imported before."""
    for name, least in WHOLE.items():
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdigit() and int(text) >= least):
            raise Refused(f"{name} must be a whole number, at least {least}, got {text!r}")
    seconds = os.environ.get("DYNAMICS_PATIENCE") or "1"
    if not _is(seconds, lambda value: 0 < value < math.inf):
        raise Refused(f"DYNAMICS_PATIENCE must be seconds, above 0, got {seconds!r}")


def _is(text: str, good: Callable[[float], bool]) -> bool:
    try:
        return good(float(text))
    except ValueError:
        return False


def start(*, cache: bool = True) -> None:
    """``dynamics.mesh.start``, and this machine's devices. Refused: it has none of that kind."""
    import jax

    from dynamics import mesh as meshes

    try:
        meshes.start(cache=cache)
    except ValueError as error:
        raise Refused(
            f"the other processes can't be joined ({error}): JAX_COORDINATOR_ADDRESS=host:port, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID say which they are"
        ) from error
    try:
        jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise Refused(
            f"this machine has no devices that jax can use with JAX_PLATFORMS={asked!r} "
            f"({str(error).splitlines()[0]}): unset it, or name one that is here, as cpu"
        ) from error
