"""Which parts go together: asked when a run is composed, before anything is trained."""

from __future__ import annotations

from gia_bench.attacks.base import Attack
from gia_bench.data.datamodule import FederatedDataModule
from gia_bench.errors import IncompatibleError
from gia_bench.federated.schedule import Schedule
from gia_bench.threat import Knowledge, Power, ThreatModel


def check_threat(name: str, attack: Attack, threat: ThreatModel) -> None:
    """Raises ``IncompatibleError`` when the attack needs what the threat model does not grant."""
    unseen = attack.requires & ~threat.knows
    if unseen:
        raise IncompatibleError(
            f"attack {name} needs to see {_names(unseen)}, which threat={threat.name} does not show; choose another "
            "threat, or add to threat.knows."
        )
    if attack.needs:
        raise IncompatibleError(
            f"attack {name} needs a server that can {_names(attack.needs)}, and malicious servers are not "
            "played yet; choose an attack on honest rounds."
        )


def check_examples(
    name: str, attack: Attack, threat: ThreatModel, data: FederatedDataModule, schedule: Schedule
) -> None:
    """Raises ``IncompatibleError`` when an update that will be attacked holds more examples than the attack takes."""
    most = attack.max_examples
    if most is None:
        return
    for round_index in schedule.attack_rounds:
        counts = data.cohort(round_index).num_examples
        held = max(counts[: schedule.attack_clients]) if threat.sees_clients else sum(counts)
        if held > most:
            raise IncompatibleError(
                f"attack {name} takes updates of at most {most} example(s); round {round_index} has one of {held}: "
                f"set fl.local.batch_size={most} under FedSGD, or choose another attack."
            )


def _names(flags: Knowledge | Power) -> str:
    return ", ".join(member.name.lower() for member in flags if member.name)
