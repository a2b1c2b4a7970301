"""ERK (Evci et al., ICML 2020): how dense every layer is, so that small layers keep more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gia_bench.defenses.selection import exact


def erk_counts(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, int]:
    """How many weights of every layer are kept, round(density_l n_l), by name.

    density_l = epsilon * sum(shape) / prod(shape), with one epsilon for all layers, such that all together keep
    ``density`` of their weights. Layers that would be denser than 1 are whole, and epsilon is found anew for the rest.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted, whole = float(exact(density)) * sum(sizes.values()), set[str]()
    while True:
        rest = [name for name in shapes if name not in whole]
        left = wanted - sum(sizes[name] for name in whole)
        epsilon = left / sum(sum(shapes[name]) for name in rest) if rest else 0.0
        full = {name for name in rest if epsilon * sum(shapes[name]) > sizes[name]}
        if not full:
            break
        # the reference adds the layers of the largest density one by one: those come first here as well
        most = max(sum(shapes[name]) / sizes[name] for name in full)
        whole |= {name for name in full if sum(shapes[name]) / sizes[name] == most}
    return {n: sizes[n] if n in whole else round(epsilon * sum(shapes[n])) for n in shapes}
