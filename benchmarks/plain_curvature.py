"""The same curvature by PyTorch's libraries, as their documentation uses them."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.plain import Lap, Side

THREADS = 2
NAMES = {"curvlinops": "curvlinops-for-pytorch", "pyhessian": "PyHessian"}


class Found(NamedTuple):
    """The largest eigenvalue a side found, and the products it took (0: not known)."""

    largest: float
    products: int = 0


class Net(NamedTuple):
    """Weights as jax has them, [in, out] or [h, w, in, out], tanh between; and what they learn."""

    params: list[tuple[np.ndarray, np.ndarray]]
    stride: int  # of convolutions without padding
    x: np.ndarray  # [n, d] or [n, h, w, c]
    y: np.ndarray


class Peer(NamedTuple):
    """``find(net, loss, x, y)``: the largest eigenvalue as one library finds it."""

    package: str
    about: str
    find: Callable[..., Found]

    @property
    def missing(self) -> str:
        """What is not installed, or nothing."""
        needed = {"torch": "torch", self.package: NAMES[self.package]}
        gone = [name for package, name in needed.items() if not importlib.util.find_spec(package)]
        return f"{' and '.join(gone)} not installed" if gone else ""


def side(peer: Peer, net: Net | None, found: dict[str, Found]) -> Side:
    """One answer a lap, kept under ``peer.about``; the operator is made in each, as users do."""
    assert net is not None

    def run(lap: Lap) -> None:
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(THREADS)
        module, x, y = _torch(torch, net)
        loss = torch.nn.CrossEntropyLoss()
        while True:
            found[peer.about] = peer.find(module, loss, x, y)
            lap()

    return run


def tops() -> list[Peer]:
    """The largest eigenvalue."""
    power = functools.partial(_power, tol=1e-6)
    return [
        Peer("curvlinops", "curvlinops and eigsh, tol 1e-3", _eigsh),
        Peer("pyhessian", "PyHessian, tol 1e-6", power),
        Peer("pyhessian", "PyHessian, its tol 1e-3", functools.partial(_power, tol=1e-3)),
    ]


def densities(k: int) -> list[Peer]:
    """Nodes and weights of one start: without, and with reorthogonalising."""
    return [
        Peer("curvlinops", "curvlinops' fast_lanczos", functools.partial(_papyan, k=k)),
        Peer("pyhessian", "PyHessian's density", functools.partial(_density, k=k)),
    ]


def _torch(torch: Any, net: Net) -> tuple[Any, Any, Any]:
    layers: list[Any] = []
    for w, b in net.params:
        if w.ndim == 4:
            layer = torch.nn.Conv2d(w.shape[2], w.shape[3], w.shape[0], stride=net.stride)
            weight = w.transpose(3, 2, 0, 1)
        else:
            layer, weight = torch.nn.Linear(*w.shape), w.T
            if layers and isinstance(layers[-2], torch.nn.Conv2d):
                layers.append(_Channels(torch))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            layer.bias.copy_(torch.from_numpy(b))
        layers += [layer, torch.nn.Tanh()]
    x = net.x.transpose(0, 3, 1, 2) if net.x.ndim == 4 else net.x
    images = torch.from_numpy(np.ascontiguousarray(x))
    return torch.nn.Sequential(*layers[:-1]), images, torch.from_numpy(net.y.astype(np.int64))


def _Channels(torch: Any) -> Any:  # noqa: N802
    """Flattens [n, c, h, w] in jax's order."""

    class Channels(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).flatten(1)

    return Channels()


def _curvlinops(module: Any, loss: Any, x: Any, y: Any) -> Any:
    from curvlinops import HessianLinearOperator  # pyright: ignore[reportMissingImports]

    params = [p for p in module.parameters() if p.requires_grad]
    return HessianLinearOperator(module, loss, params, [(x, y)], check_deterministic=False)


def _eigsh(module: Any, loss: Any, x: Any, y: Any) -> Found:
    from scipy.sparse.linalg import LinearOperator, eigsh

    inner, count = _curvlinops(module, loss, x, y).to_scipy(), []

    def product(v: np.ndarray) -> np.ndarray:
        count.append(1)
        return inner @ v

    counted = LinearOperator(inner.shape, matvec=product, dtype=np.float32)  # pyright: ignore
    tolerance: Any = 1e-3
    values = eigsh(counted, k=1, which="LA", tol=tolerance, return_eigenvectors=False)
    return Found(float(values[0]), len(count))


def _papyan(module: Any, loss: Any, x: Any, y: Any, *, k: int) -> Found:
    from curvlinops.papyan2020traces.spectrum import (  # pyright: ignore[reportMissingImports]
        fast_lanczos,
    )

    values, _ = fast_lanczos(_curvlinops(module, loss, x, y), k)
    return Found(float(values.max()), k)


def _power(module: Any, loss: Any, x: Any, y: Any, *, tol: float) -> Found:
    from pyhessian import hessian  # pyright: ignore[reportMissingImports]

    values, _ = hessian(module, loss, data=(x, y), cuda=False).eigenvalues(maxIter=1000, tol=tol)
    return Found(float(values[0]))


def _density(module: Any, loss: Any, x: Any, y: Any, *, k: int) -> Found:
    import torch  # pyright: ignore[reportMissingImports]
    from pyhessian import hessian  # pyright: ignore[reportMissingImports]

    def eig(t: Any, eigenvectors: bool) -> tuple[Any, Any]:
        """What torch once had and PyHessian 0.1 calls, of a matrix with real eigenvalues."""
        values, vectors = torch.linalg.eig(t)
        return torch.stack([values.real, values.imag], dim=1), vectors.real

    torch.eig = eig
    values, _ = hessian(module, loss, data=(x, y), cuda=False).density(iter=k, n_v=1)
    return Found(float(np.max(values)), k)
