"""What privacy repeated noisy steps give, by the accountants of Opacus."""

from __future__ import annotations

import warnings
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from gia_bench.defenses.checks import check
from gia_bench.errors import ConfigError, choices

ACCOUNTANTS = ("rdp", "prv")


class Mechanism(NamedTuple):
    """A Gaussian mechanism that a budget can be computed for.

    unit: "example" | "client": whose presence is hidden; noise_multiplier: the noise's standard deviation over what one
    unit can change; delta, accountant: as in ``epsilon``.
    """

    unit: str
    noise_multiplier: float
    delta: float
    accountant: str


@runtime_checkable
class Accounted(Protocol):
    """A defense whose budget is recorded while it runs."""

    @property
    def mechanism(self) -> Mechanism: ...


class Budget(NamedTuple):
    """(epsilon, delta)-differential privacy of one unit. nominal: the number is computed as if units were sampled as
    the accountant assumes, and they were not; it is a label, not a guarantee."""

    epsilon: float
    delta: float
    nominal: bool


def check_budget(name: str, delta: float, accountant: str) -> None:
    """Raises ``ConfigError`` for a delta outside of (0, 1) and for an accountant that does not exist."""
    check(f"{name} delta", delta, lambda d: 0 < d < 1, "lie in (0, 1); below 1 / examples is usual")
    if accountant not in ACCOUNTANTS:
        raise ConfigError(choices(f"{name} accountant", accountant, ACCOUNTANTS))


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    num_steps: int,
    delta: float,
    accountant: str = "rdp",
    poisson: bool = False,
) -> Budget:
    """The epsilon of ``num_steps`` steps of DP-SGD with Poisson sampling.

    noise_multiplier: > 0; sample_rate: the chance of an example to be in a step, in (0, 1]; delta: in (0, 1);
    accountant: "rdp" (Mironov 2017) or "prv" (Gopi et al. 2021); poisson: whether that is how examples were sampled
    (fl.local.sampling=poisson). The budget of shuffled batches is nominal, unless every step uses all examples.
    Raises ``ConfigError`` out of these ranges, and where Opacus is not installed.
    """
    where = "dp_accounting.epsilon:"
    check(
        f"{where} noise_multiplier", noise_multiplier, lambda s: s > 0, "be above 0; without noise there is no budget"
    )
    check(f"{where} sample_rate", sample_rate, lambda q: 0 < q <= 1, "lie in (0, 1]")
    check(f"{where} num_steps", num_steps, lambda n: n >= 1 and n == int(n), "be a whole number of at least 1")
    check_budget(where, delta, accountant)
    try:
        # here, because it is heavy and only this function needs it
        from opacus.accountants import create_accountant
    except ImportError as error:
        raise ConfigError(
            "The privacy budget is computed by Opacus, which is not installed: pip install opacus."
        ) from error
    ledger = create_accountant(accountant)
    ledger.history = [(noise_multiplier, sample_rate, num_steps)]
    # at a sample rate of 1 Opacus' PRV takes the logarithm of 0, and minus infinity is what it means there
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        # far from the usual budgets RDP's best order lies outside of those tried; what it gives is a bound all the same
        warnings.filterwarnings("ignore", message="Optimal order is the")
        spent = float(ledger.get_epsilon(delta=delta))
    return Budget(spent, delta, nominal=not poisson and sample_rate < 1)
