"""Which parts go together: asked when a run is composed, before anything is trained."""

from __future__ import annotations

from gia_bench.attacks.base import Attack
from gia_bench.data.datamodule import FederatedDataModule
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.aggregation import Aggregation
from gia_bench.federated.sampling import POISSON
from gia_bench.federated.schedule import Schedule
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge, Power, ThreatModel

# a server that can send another model can send other parameters too
_MALICIOUS = dict.fromkeys(Power, "malicious_model") | {Power.CHANGE_PARAMS: "malicious_params"}


def check_threat(name: str, attack: Attack, threat: ThreatModel) -> None:
    """Raises ``IncompatibleError`` when the attack needs what the threat model does not grant."""
    unseen = attack.requires & ~threat.knows
    if unseen:
        raise IncompatibleError(
            f"attack {name} needs to see {_names(unseen)}, which threat={threat.name} does not show; choose another "
            "threat, or add to threat.knows."
        )
    unable = attack.needs & ~threat.power
    if unable:
        raise IncompatibleError(
            f"attack {name} needs a server that can {_names(unable)}, which threat={threat.name} cannot; choose "
            f"threat={_MALICIOUS[unable]}, or add to threat.power."
        )


def check_aggregation(name: str, threat: ThreatModel, aggregation: Aggregation) -> None:
    """Raises ``IncompatibleError`` where the threat model shows what the aggregation hides."""
    if aggregation.hides_clients and threat.sees_clients:
        raise IncompatibleError(
            f"attack {name} under threat={threat.name} looks at one client's update, which is uniform noise behind the "
            "masks of secure aggregation; choose threat=secure_aggregation, or aggregation=plain."
        )


def check_sampling(local: LocalWork, victim: Victim) -> None:
    """Raises ``IncompatibleError`` where a step may be empty, and the model needs what is in it."""
    if local.sampling == POISSON and victim.batch_coupled:
        raise IncompatibleError(
            "fl.local.sampling=poisson may draw no example for a step, and of none BatchNorm in training mode has no "
            "statistics; choose a model with GroupNorm or none, or set model.training=false."
        )


def check_attacked(threat: ThreatModel, data: FederatedDataModule, schedule: Schedule) -> None:
    """Raises ``ConfigError`` when more clients are to be attacked than play a round."""
    if schedule.attack_rounds and threat.sees_clients and schedule.attack_clients > data.clients_per_round:
        raise ConfigError(
            f"fl.attack_clients={schedule.attack_clients}, but only {data.clients_per_round} clients play a round; "
            "give at most that many, or raise partition.num_clients or fl.clients_per_round."
        )


def check_examples(
    name: str, attack: Attack, threat: ThreatModel, data: FederatedDataModule, schedule: Schedule
) -> None:
    """Raises ``IncompatibleError`` when an update that will be attacked holds more examples, or stands for more local
    steps, than the attack takes."""
    most, most_steps = attack.max_examples, attack.max_local_steps
    if most is None and most_steps is None:
        return
    for round_index in schedule.attack_rounds:
        cohort = data.cohort(round_index)
        seen = slice(schedule.attack_clients if threat.sees_clients else None)
        steps = max(len(counts) for counts in cohort.counts[seen])
        if most_steps is not None and steps > most_steps:
            raise IncompatibleError(
                f"attack {name} takes updates of at most {most_steps} local step(s); round {round_index} has one of "
                f"{steps}: take fl=fedsgd, or set fl.local.epochs=null fl.local.steps={most_steps}."
            )
        counts = cohort.said
        held = max(counts[seen]) if threat.sees_clients else sum(counts)
        if most is not None and held > most:
            raise IncompatibleError(
                f"attack {name} takes updates of at most {most} example(s); round {round_index} has one of {held}: "
                f"set fl.local.batch_size={most} under FedSGD, or choose another attack."
            )


def check_rounds(name: str, attack: Attack, threat: ThreatModel, data: FederatedDataModule, schedule: Schedule) -> None:
    """Raises ``IncompatibleError`` where an attack that takes a client's rounds together would take updates of
    different examples for updates of the same."""
    if not attack.remembers:
        return
    before: dict[tuple[int | None, int], set[int]] = {}
    for round_index in schedule.attack_rounds:
        cohort = data.cohort(round_index)
        everyone = range(len(cohort.clients))
        alone = {cohort.clients[m]: [m] for m in everyone[: schedule.attack_clients]}
        for client, members in (alone if threat.sees_clients else {None: [*everyone]}).items():
            used, count = set(cohort.used(members)), sum(cohort.said[m] for m in members)
            if before.setdefault((client, count), used) != used:
                whose = "all clients" if client is None else f"client {client}"
                raise IncompatibleError(
                    f"attack {name} takes the rounds of {whose} together, and round {round_index} has other examples "
                    "than one before it; set fl.local.batch_size=null (all of a client's data), or attack each round "
                    "alone (rounds=one)."
                )


def _names(flags: Knowledge | Power) -> str:
    return ", ".join(member.name.lower() for member in flags if member.name)
