"""The gradients of many clients in one pass, layer by layer: nothing is mapped, and no weight is copied.

What a parameter's gradient is for each of them follows from what went into its layer and from the slope of the losses
at what came out (Goodfellow 2015 for linear layers, Rochette et al. 2019 for convolutions, as grouped ones). All of it
can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Params, Update


class Use(NamedTuple):
    """A call that took parameters. edge: its output's place in the graph, which stays where the output is written into
    later."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    names: dict[str, str]
    edge: GradientEdge


Rule: TypeAlias = Callable[[Use, Tensor, int], dict[str, Tensor]]
"""(use, slope at its output [N * B, ...], N) -> each client's gradients of its ``weight`` and ``bias`` [N, ...]."""


def apart(t: Tensor, clients: int) -> Tensor:
    """[N * n, ...] -> [N, n, ...]."""
    return t.view(clients, -1, *t.shape[1:])


def _convolution(use: Use, slope: Tensor, clients: int) -> dict[str, Tensor]:
    given = use.arguments

    def side_by_side(t: Tensor) -> Tensor:
        """[N * B, C, H, W] -> [B, N * C, H, W]: every client's channels are a group of their own."""
        return apart(t, clients).transpose(0, 1).flatten(1, 2)

    channels, *rest = given["weight"].shape
    weight = conv2d_weight(  # type: ignore[no-untyped-call]
        side_by_side(given["input"].to(slope.dtype)), [clients * channels, *rest], side_by_side(slope),
        given["stride"], given["padding"], given["dilation"], clients * given["groups"],
    )  # fmt: skip
    return {"weight": apart(weight, clients), "bias": apart(slope, clients).sum((1, 3, 4))}


def _linear(use: Use, slope: Tensor, clients: int) -> dict[str, Tensor]:
    into, out = (apart(t, clients).flatten(1, -2) for t in (use.arguments["input"].to(slope.dtype), slope))
    return {"weight": out.mT @ into, "bias": out.sum(1)}


def _normalisation(use: Use, slope: Tensor, clients: int) -> dict[str, Tensor]:
    plain = use.function(**(use.arguments | {"weight": None, "bias": None}))
    last = len(use.arguments.get("normalized_shape", ()))  # of a layer's norm; others have a factor per channel

    def summed(t: Tensor) -> Tensor:
        t = apart(t, clients)
        kept = set(range(t.ndim - last, t.ndim)) if last else {2}
        return t.sum([i for i in range(1, t.ndim) if i not in kept])

    return {"weight": summed(slope * plain), "bias": summed(slope)}


class Known(NamedTuple):
    """A function that takes parameters: the rule, and its arguments in order with what they are if not given."""

    rule: Rule
    arguments: Mapping[str, Any]


PAIR = {"weight": None, "bias": None}
KNOWN: Mapping[Callable[..., Any], Known] = {
    torch.conv2d: Known(_convolution, {"input": None} | PAIR | {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}),
    F.linear: Known(_linear, {"input": None} | PAIR),
    F.batch_norm: Known(
        _normalisation,
        {"input": None, "running_mean": None, "running_var": None} | PAIR
        | {"training": False, "momentum": 0.1, "eps": 1e-5},
    ),
    F.group_norm: Known(_normalisation, {"input": None, "num_groups": 1} | PAIR | {"eps": 1e-5}),
    F.layer_norm: Known(_normalisation, {"input": None, "normalized_shape": ()} | PAIR | {"eps": 1e-5}),
}  # fmt: skip


ASKED = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout)
"""What may be asked of a parameter without using it: its shape, its dtype."""


@final
class ParameterUses(TorchFunctionMode):
    """While it is entered: ``uses``, the calls of known functions that took one of ``params``; ``strange``, whether
    there was any other use of one, or one without an axis of ``rows`` examples in front, or on a way that no input
    takes: then nothing can be said of each client."""

    def __init__(self, params: Params, rows: int) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.strange: bool = False
        self._names = {id(tensor): name for name, tensor in params.items()}
        self._rows = rows

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        taken = {id(leaf) for leaf in tree_leaves((args, kwargs))} & self._names.keys()
        if taken and func in KNOWN:
            self._note(func, args, kwargs or {}, output, taken)
        elif taken:
            self.strange = self.strange or not all(isinstance(leaf, ASKED) for leaf in tree_leaves(output))
        return output

    def _note(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor, taken: set[int]
    ) -> None:
        given = {**KNOWN[func].arguments, **dict(zip(KNOWN[func].arguments, args, strict=False)), **kwargs}
        names = {k: self._names[id(given[k])] for k in ("weight", "bias") if id(given[k]) in self._names}
        as_weights = {id(given[k]) for k in names} == taken
        in_front = len(given["input"]) == self._rows and given["input"].ndim >= 2 and output.ndim >= 2
        coupled = given.get("training", False) or isinstance(given.get("padding"), str)
        if coupled or not (as_weights and in_front and output.requires_grad):
            self.strange = True
        else:
            self.uses.append(Use(func, given, names, get_gradient_edge(output)))


def explained(victim: Victim, params: Params, buffers: Buffers) -> bool:
    """Whether ``gradients`` may be asked about this network: every use of every parameter is a known one, and no
    example has a say in another one's scores. Tried with two and with three random images: what happens to have as
    many rows as there are images cannot have both.
    """
    like = next(iter(params.values()))
    images = torch.rand(3, *victim.input_shape, generator=stream(0, "layers")).to(like)
    scores = []
    for some in (images[:2], images):
        noticed = ParameterUses(params, len(some))
        with torch.enable_grad(), noticed:
            output = victim.logits(params, buffers, some.requires_grad_())[0]
        if noticed.strange:
            return False
        scores.append(output.detach()[:2])
    moved = (scores[0] - scores[1]).abs().amax()
    return bool(moved <= 1e-4 * scores[0].abs().amax())


def gradients(victim: Victim, params: Params, buffers: Buffers, batch: Batch) -> Update:
    """The gradient of each client's mean loss over its own examples. batch: [N, B, ...], and so the gradients [N, ...].

    Differentiable in inputs and labels; inputs must ask for a gradient. For networks that are ``explained``, where
    N > 1; ``IncompatibleError`` for another one.
    """
    N = len(batch.mask)
    if N == 1:
        leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        loss = victim.objective(leaves, buffers, Batch(*(t[0] for t in batch)))[0]
        found = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        return {k: g[None] for k, g in zip(leaves, found, strict=True)}
    noticed = ParameterUses(params, batch.mask.numel())
    with noticed:
        losses = victim.losses(params, buffers, batch.inputs.flatten(0, 1), batch.labels.flatten(0, 1))[0]
    if noticed.strange:
        raise IncompatibleError(
            f"{type(victim.module).__name__} uses its parameters in a way of which the gradient of one client among "
            "many is not known; map the clients instead."
        )
    means = (apart(losses, N) * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)
    edges = [use.edge for use in noticed.uses]
    slopes = torch.autograd.grad(means.sum(), edges, create_graph=True, allow_unused=True)
    total: Update = {}
    for use, slope in zip(noticed.uses, slopes, strict=True):
        own = {} if slope is None else KNOWN[use.function].rule(use, slope, N)
        for role, name in use.names.items():
            if role in own:
                total[name] = total[name] + own[role] if name in total else own[role]
    return {k: total[k].to(p.dtype) if k in total else p.new_zeros(N, *p.shape) for k, p in params.items()}
