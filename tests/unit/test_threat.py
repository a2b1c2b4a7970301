"""The valve: an observation holds what its threat model's flags name, and nothing else, where everything is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from gia_bench.conf_path import CONF
from gia_bench.data.source import InMemory
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import ConfigError
from gia_bench.federated.local import FedSGD
from gia_bench.threat import Knowledge, ThreatModel
from gia_bench.values import Observation, Payload, Transcript, Truth

ONE, OTHER, MEAN = ({"w": torch.full((2,), value)} for value in (1.0, 3.0, 2.0))
STATISTICS, ANNOUNCED = {"running_mean": torch.ones(2)}, {"mask": torch.ones(2)}
TRANSCRIPT = Transcript(
    round_index=0,
    params={"w": torch.zeros(2)},
    buffers=STATISTICS,
    shared=ANNOUNCED,
    payloads={c: Payload("dense", (torch.zeros(2),), 4) for c in (5, 6)},
    updates={5: ONE, 6: OTHER},
    sent_buffers={c: {"running_mean": torch.full((2,), float(c))} for c in (5, 6)},
    aggregate=MEAN,
    clients=(5, 6),
    num_examples=8,
    evidence={5: {"rate": torch.ones(())}},
)
PUBLIC = InMemory(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
THREATS = sorted(path.stem for path in (CONF / "threat").glob("*.yaml"))
SINGLE = [flag for flag in Knowledge if flag not in (Knowledge.UPDATE, Knowledge.AGGREGATE)]


class Private:
    """What the clients hold. ``asked``: whether anybody looked."""

    asked = False

    def truth(self, clients: Sequence[int]) -> Truth:
        self.asked = True
        return Truth(torch.rand(4 * len(clients), 1, 2, 2), torch.arange(4 * len(clients)))


def observe(threat: ThreatModel) -> tuple[Observation, bool]:
    private = Private()
    client = 5 if threat.sees_clients else None
    seen = threat.observe(TRANSCRIPT, private, client, local=FedSGD(), defense=NoDefense(), public=PUBLIC)
    return seen, private.asked


def shown(seen: Observation) -> Knowledge:
    """What an observation holds."""
    own = Knowledge.UPDATE if seen.update is ONE else Knowledge.AGGREGATE
    return own | Knowledge(
        sum(
            flag.value
            for flag, value in {
                Knowledge.BUFFERS: seen.buffers, Knowledge.SHARED: seen.shared, Knowledge.LABELS: seen.labels,
                Knowledge.NUM_EXAMPLES: seen.num_examples, Knowledge.LOCAL: seen.local,
                Knowledge.DEFENSE: seen.defense, Knowledge.SENT_BUFFERS: seen.sent_buffers,
                Knowledge.PUBLIC: seen.public,
            }.items()
            if value is not None and not (isinstance(value, dict) and not value)
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", THREATS)
def test_every_threat_shows_what_it_names_and_nothing_else(name: str) -> None:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        threat = instantiate(compose("config", overrides=[f"threat={name}"]).threat, _convert_="all")
    seen, asked = observe(threat)
    assert shown(seen) == threat.knows
    assert asked == (Knowledge.LABELS in threat.knows), "the private side is asked for nothing else"
    # a field that is new must be thought of here
    assert {f.name for f in dataclasses.fields(Observation)} == {
        "params", "update", "buffers", "shared", "labels", "num_examples", "local", "defense", "sent_buffers", "public",
        "num_clients", "earlier", "unseen",
    }  # fmt: skip


@pytest.mark.parametrize("whose", [Knowledge.UPDATE, Knowledge.AGGREGATE])
@pytest.mark.parametrize("flag", SINGLE)
def test_a_single_flag_shows_a_single_thing(flag: Knowledge, whose: Knowledge) -> None:
    seen, _ = observe(ThreatModel("one", whose | flag))
    # what one client sent back is not read off the sum
    hidden = flag if flag == Knowledge.SENT_BUFFERS and whose == Knowledge.AGGREGATE else Knowledge.NONE
    assert shown(seen) == (whose | flag) & ~hidden
    assert seen.num_clients == (1 if whose == Knowledge.UPDATE else 2)


def test_who_sees_the_sum_sees_no_client_and_the_other_way_round() -> None:
    for whose, client in ((Knowledge.UPDATE, None), (Knowledge.AGGREGATE, 5)):
        with pytest.raises(ConfigError, match="sees"):
            ThreatModel("one", whose).observe(TRANSCRIPT, Private(), client)
