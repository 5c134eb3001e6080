"""The scores of every example, as studies read them: of all draws, or of one."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from dynamics import scores, statistics
from dynamics.record import Array


@dataclass(frozen=True, eq=False)
class Bank:
    """Every score of every example of one point, of all draws or of one."""

    arrays: dict[str, Array]  # f32[epoch, replica, example], [replica, example] or [example]
    runs: pl.DataFrame  # draw, replica, and the step at which it diverged, null if it did not

    def __len__(self) -> int:
        """The number of examples."""
        return len(self["index"])

    def __getitem__(self, name: str) -> np.ndarray:
        """An array that has no epochs: labels, say."""
        return self.arrays[name].values

    def draw(self, d: int) -> "Bank":
        """The runs of one draw, and the labels that they are trained on."""
        mine = (self.runs["draw"] == d).to_numpy()

        def part(array: Array) -> Array:
            if "draw" in array.dims:
                return Array(array.values[d], array.dims[1:], array.coords)
            if "replica" not in array.dims:
                return array
            values = np.compress(mine, array.values, axis=array.dims.index("replica"))
            coords = {name: at for name, at in array.coords.items() if name != "replica"}
            return Array(values, array.dims, coords)

        arrays = {name: part(array) for name, array in self.arrays.items()}
        return Bank(arrays, self.runs.filter(pl.Series(mine)))

    def alike(self) -> "list[Bank]":
        """The runs that trained on the same labels, together: all, or those of each draw."""
        labels = self["labels"]
        if (labels == labels[0]).all():
            whole = self.draw(0).arrays
            same = {name: whole[name] for name, a in self.arrays.items() if "draw" in a.dims}
            return [Bank(self.arrays | same, self.runs)]
        return [self.draw(d) for d in range(len(labels))]

    def at(self, score: str, epoch: float) -> np.ndarray:
        """f32[R, N]: a score at an epoch."""
        return self.arrays[score].at(epoch=epoch).values

    def has(self, score: str, epoch: float) -> bool:
        """Whether a score was taken at an epoch."""
        return score in self.arrays and epoch in self.arrays[score].coords["epoch"]

    def mean(self, score: str, epoch: float | None = None) -> np.ndarray:
        """f64[N]: a score averaged over the runs that did not diverge; zeros if all did.

        An example that no run was shown in time counts as the hardest: infinite at the hard end.
        """
        found = self[score] if epoch is None else self.at(score, epoch)
        if found.ndim == 1:
            return found.astype(np.float64)
        whole = found[self.runs["diverged"].is_null().to_numpy()]
        if not len(whole):
            return np.zeros(found.shape[1])
        average, _ = statistics.over_replicas(whole)
        hardest = np.inf if scores.HARD[score] == "high" else -np.inf
        return np.where(np.isnan(average), hardest, average)
