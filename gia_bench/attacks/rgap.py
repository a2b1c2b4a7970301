"""R-GAP, the recursive gradient attack in closed form (Zhu & Blaschko, ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.attacks.beginnings import Beginning, beginnings, hypotheses
from gia_bench.attacks.chain import Link, links
from gia_bench.attacks.checks import check
from gia_bench.attacks.least_squares import least_squares
from gia_bench.attacks.scene import PixelSpace, update_unit
from gia_bench.attacks.unexplained import on_host, unexplained
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Params, Reconstruction, Update


@final
@dataclass(frozen=True, kw_only=True)
class RGAP(Attack):
    """From the last layer to the first: each layer's input solves what the layer makes of it and its weight's gradient.

    The last layer's gradient gives its input and the loss's gradient (``beginnings``, at most ``most_beginnings`` of
    them; the one whose image explains the update best is taken). Activations are undone, and the loss's gradient goes
    back through the transposed layers. Padding is known to be 0 and has no unknowns. Exact where every layer has as
    many independent equations as inputs, elsewhere the shortest solution. The score is the share of the observed
    gradient that the image leaves unexplained; it cannot tell that there are other images with the same gradient:
    ``rank_analysis`` can. Singular values below the update's own precision are 0. All in float64; labels that the
    threat model shows are used.

    balanced: a layer's two kinds of equations are brought to the same size first (gia_bench choice). The paper's code
    leaves them as they are, and as the gradient's are far smaller, what only they know is then lost to rounding.
    """

    balanced: bool = True
    most_beginnings: int = 4

    def __post_init__(self) -> None:
        check(self.most_beginnings >= 1, "attack.most_beginnings", self.most_beginnings, "1 or more")

    @property
    def requires(self) -> Knowledge:
        return Knowledge.NUM_EXAMPLES

    @property
    def max_examples(self) -> int | None:
        return 1

    @property
    def max_local_steps(self) -> int | None:
        return 1

    def check_victim(self, victim: Victim) -> None:
        """Needs a chain of layers that can be undone, with a linear one at the end."""
        links(victim)

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        chain = links(victim)
        return [self._reconstruct(o, victim, chain) for o in observations]

    def _reconstruct(self, observation: Observation, victim: Victim, chain: list[Link]) -> Reconstruction:
        if observation.num_examples != 1:
            raise IncompatibleError(
                f"R-GAP takes updates of one example, and this one holds {observation.num_examples}; "
                "train with one example per client and round."
            )
        needed = [link.weight for link in chain] + ([chain[-1].bias] if chain[-1].bias is not None else [])
        absent = [name for name in needed if name not in observation.update]
        if absent:
            raise IncompatibleError(f"R-GAP needs {', '.join(absent)}, which this update does not show.")
        like, unit, head = observation.update[chain[0].weight], update_unit(observation), chain[-1]
        params, gradient = on_host(observation.params), on_host(observation.update)
        gradient = {k: v / unit for k, v in gradient.items()}
        space = PixelSpace.of(victim, torch.zeros((), dtype=torch.float64))
        failure = None
        if not all(g.isfinite().all() for g in gradient.values()):
            failure = "the observed update holds NaN or infinity"
        elif not gradient[head.bias or head.weight].any():
            failure = f"every entry of {head.bias or head.weight} in the observed update is zero"
        tried: list[tuple[float, Tensor, Tensor]] = []
        for start in [] if failure else self._beginnings(observation, victim, head, params, gradient):
            pixels = image_from(
                start, chain, params, gradient, precision=torch.finfo(like.dtype).eps, balanced=self.balanced
            )
            inputs = space.decode(pixels.view(1, *victim.input_shape))
            tried.append((unexplained(observation, victim, gradient, inputs, start.label[None]), inputs, start.label))
        if not failure and not any(score < float("inf") for score, _, _ in tried):
            failure = "going back through the layers left the finite numbers"
        if failure:
            blank = torch.zeros(1, *victim.input_shape).to(like)
            return Reconstruction(inputs=blank, labels=None, score=float("inf"), failure=failure)
        score, inputs, label = min(tried, key=lambda one: one[0])
        found = label.argmax() if len(label) > 1 else label[0].long()
        return Reconstruction(inputs=inputs.to(like), labels=found.view(1).to(like.device), score=score)

    def _beginnings(
        self, observation: Observation, victim: Victim, head: Link, params: Params, gradient: Update
    ) -> list[Beginning]:
        labels = hypotheses(victim.num_classes)
        if observation.labels is not None and victim.num_classes > 1:
            labels = labels[observation.labels.cpu()]
        return beginnings(
            params[head.weight],
            None if head.bias is None else params[head.bias],
            gradient[head.weight],
            None if head.bias is None else gradient[head.bias],
            victim.loss,
            labels,
            self.most_beginnings,
        )


def image_from(
    start: Beginning, chain: list[Link], params: Params, gradient: Update, *, precision: float, balanced: bool
) -> Tensor:
    """The first layer's input, flat, as the network sees it; NaN where the way back leaves the finite numbers.

    precision: of the update, see ``least_squares``.
    """
    found, slopes = start.inputs, params[chain[-1].weight].T @ start.slopes
    for link in reversed(chain[:-1]):
        out, at_output = link.undo(found, slopes)
        if not (out.isfinite().all() and at_output.isfinite().all()):
            return torch.full((torch.Size(chain[0].in_shape).numel(),), torch.nan, dtype=found.dtype)
        equations, values = link.equations(params, out, at_output, gradient[link.weight], balanced)
        found = least_squares(equations, values, precision)
        slopes = link.matrix(params).T @ at_output
    return found
