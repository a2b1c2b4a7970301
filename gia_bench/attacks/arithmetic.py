"""How losses and their gradients are computed: as written or compiled, and in which precision.

Whatever is not the plain way is compared with it on the first guesses of an attack before a step of it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gia_bench.attacks.checks import check
from gia_bench.attacks.optimizers import Variables
from gia_bench.errors import ConfigError, choices

PRECISIONS: Mapping[str, float] = {"fp32": 1e-3, "tf32": 5e-2, "bf16": 3e-1}
"""What can be chosen as ``precision``, with its tolerance where none is given (gia_bench choices).

A gradient of a gradient adds up many products of both signs, so a step of rounding (2^-24, 2^-11, 2^-8 of a number)
grows, for some guesses by a factor of some tens: on LeNets compiled fp32 was off by 5e-6 and bf16 by 0.02 in the median
and 0.17 at most. A step that is wrong (a kernel's second derivative, say) is off by about its own size.
"""

Step: TypeAlias = Callable[..., tuple[Variables, Tensor]]
"""Stacked guesses and what is seen of them -> gradients and losses, without a look at any value."""


@final
@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a step is computed.

    compile: whether ``torch.compile`` makes one program of it (needs a C++ compiler, on a GPU Triton; made once for
    every attack and shape, in half a minute or more); precision: of matrix products and convolutions, a name in
    ``PRECISIONS``: fp32 (IEEE single precision, also where torch would allow a GPU less), tf32 (GPUs only), bf16
    (autocast); normalisations and the distance are float32 in any; tolerance: how far losses and gradients may be from
    those of plain fp32 on the first guesses, relative to their own size, for every candidate; None: the precision's
    own. Raises ``ConfigError`` where they are farther.
    """

    compile: bool = False
    precision: str = "fp32"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(choices("attack.arithmetic.precision", self.precision, PRECISIONS))
        fine = self.tolerance is None or self.tolerance > 0
        check(fine, "attack.arithmetic.tolerance", self.tolerance, "a number above 0, or null for the precision's own")

    @property
    def plain(self) -> bool:
        """Whether there is nothing to prove."""
        return not self.compile and self.precision == "fp32"

    def step(self, function: Step, like: Tensor) -> Step:
        """``function`` computed this way, on the device and in the dtype of ``like``."""
        device = like.device.type
        if self.precision == "tf32" and device != "cuda":
            raise ConfigError(
                f"attack.arithmetic.precision='tf32' is a number format of GPUs, and this attack runs on {device}; "
                "take fp32, or bf16."
            )
        if self.precision != "fp32" and like.dtype != torch.float32:
            raise ConfigError(
                f"attack.arithmetic.precision={self.precision!r} is for float32, and this model is {like.dtype}; "
                "take fp32, which leaves it as it is."
            )

        if self.precision == "fp32" and device != "cuda":
            return Compiled(function) if self.compile else function

        def computed(*args: Any) -> tuple[Variables, Tensor]:
            with _tf32(self.precision == "tf32", device), _bf16(self.precision == "bf16", device):
                return function(*args)

        return Compiled(computed) if self.compile else computed

    def compare(self, exact: tuple[Tensor, Variables], found: tuple[Tensor, Variables]) -> None:
        """Losses [V, T] and gradients [V, T, ...] of plain fp32 and of this arithmetic. Raises ``ConfigError``.

        Candidates whose plain loss or gradient is not finite say nothing and are left out.
        """
        allowed = PRECISIONS[self.precision] if self.tolerance is None else self.tolerance
        off = farthest(exact, found)
        if off.error > allowed:
            raise ConfigError(
                f"attack.arithmetic (compile={self.compile}, precision={self.precision}): on the first guesses the "
                f"{off.name} of victim {off.victim}, restart {off.restart} is {off.error:.2g} of its size away from "
                f"plain fp32, more than the tolerance of {allowed:g}; take precision=fp32 and compile=false, or a "
                "tolerance that you can answer for."
            )


PLAIN = Arithmetic()


@final
class Compiled:
    """A step as one compiled program for each shape of its arguments.

    It is traced below the transforms of ``torch.func`` (vmap, grad), where only tensor operations are left: whatever
    runs under vmap can be compiled, and there is nothing at which the program could break into pieces.
    """

    def __init__(self, function: Step) -> None:
        self._function = function
        self._made: dict[Any, tuple[Callable[..., Any], pytree.TreeSpec]] = {}

    def __call__(self, *args: Any) -> tuple[Variables, Tensor]:
        # only when something is compiled: these take more than a second to import
        from torch._dynamo.exc import TorchDynamoException

        parts, layout = pytree.tree_flatten(args)
        flat = [t.contiguous() for t in parts]  # a program is for one layout in memory, and optimisers hand on views
        key = (str(layout), *((t.shape, t.dtype, t.device) for t in flat))
        if key not in self._made:
            self._made[key] = self._make(flat, layout)
        program, out = self._made[key]
        try:
            result: tuple[Variables, Tensor] = pytree.tree_unflatten(program(*flat), out)
        except TorchDynamoException as error:
            cause = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"attack.arithmetic.compile=true: torch.compile failed ({cause}). It needs a C++ compiler (g++, or "
                "what CXX names) and on a GPU Triton, and no broken files in its cache, as a killed run may leave them "
                "(TORCHINDUCTOR_CACHE_DIR): mend that, or take compile=false."
            ) from error
        return result

    def _make(self, flat: list[Tensor], layout: pytree.TreeSpec) -> tuple[Callable[..., Any], pytree.TreeSpec]:
        from torch.fx.experimental.proxy_tensor import make_fx

        outs: list[pytree.TreeSpec] = []

        def function(*tensors: Tensor) -> list[Any]:
            result, out = pytree.tree_flatten(self._function(*pytree.tree_unflatten(list(tensors), layout)))
            outs.append(out)
            return result

        graph = make_fx(function)(*flat)
        return torch.compile(graph, fullgraph=True, dynamic=False), outs[-1]


class Difference(NamedTuple):
    """Where two ways to compute differ most. name: of the value; error: the Euclidean length of the difference,
    relative to the exact value's; infinite where only one of both is a number."""

    name: str
    victim: int
    restart: int
    error: float


def farthest(exact: tuple[Tensor, Variables], found: tuple[Tensor, Variables]) -> Difference:
    """The largest difference among losses [V, T] and gradients [V, T, ...]; candidates whose exact loss or gradient is
    not finite say nothing and are left out."""
    pairs = {"loss": (exact[0], found[0])} | {f"gradient of {k}": (g, found[1][k]) for k, g in exact[1].items()}
    finite = [e.isfinite().flatten(2).all(2) if e.ndim > 2 else e.isfinite() for e, _ in pairs.values()]
    sound = torch.stack(finite).all(0)
    largest = Difference("loss", 0, 0, 0.0)
    for name, (want, got) in pairs.items():
        errors = torch.where(sound, _relative(want, got), 0.0).nan_to_num(torch.inf, torch.inf)
        v, t = divmod(int(errors.argmax()), errors.shape[1])
        largest = max(largest, Difference(name, v, t, float(errors[v, t])), key=lambda d: d.error)
    return largest


def _relative(want: Tensor, got: Tensor) -> Tensor:
    """The Euclidean length of the difference of every candidate [V, T], relative to that of ``want``."""
    a, b = (t.double().flatten(2) if t.ndim > 2 else t.double()[..., None] for t in (want, got))
    error: Tensor = (a - b).norm(dim=2) / a.norm(dim=2).clamp(min=torch.finfo(want.dtype).tiny)
    return error


@contextmanager
def _tf32(allowed: bool, device: str) -> Iterator[None]:
    """TF32 in products and convolutions or not, whatever is set; by default torch allows it in convolutions."""
    if device != "cuda":
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = kept


NORMS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm}
# what else keeps numbers from its forward pass that the derivative of a mapped backward pass may take for constants
KEEPING = NORMS | {F.rms_norm, F.scaled_dot_product_attention, F.multi_head_attention_forward}


@final
class _Noticed(TorchFunctionMode):
    """While it is entered: ``found``, whether any of ``KEEPING`` was called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: bool = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.found = self.found or func in KEEPING
        return func(*args, **(kwargs or {}))


def normalises(forward: Callable[[], object]) -> bool:
    """Whether ``forward`` passes through a normalisation, or through torch's own attention."""
    noticed = _Noticed()
    with torch.no_grad(), noticed:
        forward()
    return noticed.found


@final
class _NormsInFloat32(TorchFunctionMode):
    """Autocast hands bf16 to normalisations, for which vmap has no kernel (torch 2.15) and sums of which are short."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in NORMS:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _bf16(wanted: bool, device: str) -> Iterator[None]:
    if not wanted:
        yield
        return
    # no cache: it would keep casts of the parameters that belong to a transform which has ended
    with torch.autocast(device, torch.bfloat16, cache_enabled=False), _NormsInFloat32():
        yield
