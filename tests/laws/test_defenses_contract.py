"""What holds for every defense that conf/defense offers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import get_class, instantiate
from torch import Tensor, nn

from gia_bench.defenses.base import Client, Defense
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Observation, Shared, State, Update

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "defense").glob("*.yaml"))
CLIENTS, STEPS, EXAMPLES = 3, 1, 2


def composed(name: str, *overrides: str) -> Defense:
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        defense: Defense = instantiate(
            hydra.compose(overrides=[f"+defense={name}", *overrides]).defense, _convert_="all"
        )
    return defense


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


class Public:
    """Examples that no client holds."""

    labels = torch.arange(120) % 3

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        return torch.rand(120, 3, 5, 5, generator=stream(0, "public"))[indices]


class Scene:
    """Three clients of a small model, with random images and updates."""

    def __init__(self, defense: Defense) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(75, 16), nn.Sigmoid(), nn.Linear(16, 3))
        self.victim = Victim(module=defense.prepare_model(network), input_shape=(3, 5, 5), num_classes=3)
        self.defense = defense.calibrate(self.victim, Public())
        self.params, self.buffers = self.victim.initial()
        g = stream(0, "images")
        shape = (CLIENTS, STEPS, EXAMPLES)
        self.batches = Batch(
            torch.rand(*shape, 3, 5, 5, generator=g), torch.randint(3, shape, generator=g), torch.ones(shape)
        )
        self.updates = [self.update(c, 0) for c in range(CLIENTS)]

    def update(self, client: int, round_index: int) -> Update:
        g = stream(0, "update", client, round_index)
        return {name: torch.randn(p.shape, generator=g) for name, p in self.params.items()}

    def batch(self, client: int) -> Batch:
        return Batch(*(t[client] for t in self.batches))

    def client(self, batch: Batch) -> Client:
        return Client(self.victim, self.params, self.buffers, batch)

    def announce(self, updates: list[Update], states: list[State], round_index: int) -> Shared:
        server = self.defense.init_server(self.params)
        return self.defense.announce(
            self.params, server, round_index, CLIENTS, stream(0, "announce"), lambda c: (updates[c], states[c])
        )


@pytest.fixture(params=NAMES)
def scene(request: pytest.FixtureRequest) -> Scene:
    return Scene(composed(request.param))


def test_the_core_defenses_are_offered() -> None:
    assert {"none", "gaussian_noise", "laplace_noise", "top_k", "dgp", "adgp"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_spells_every_field_of_its_defense_and_nothing_else(name: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        config = hydra.compose(overrides=[f"+defense={name}"]).defense
    fields = dataclasses.fields(get_class(config._target_))
    assert set(config) == {"_target_", *(f.name for f in fields)}


def test_the_papers_shares_can_be_set_on_the_command_line() -> None:
    defense = composed("dgp", "defense.k1=0.01", "defense.k2=0.6", "defense.error_feedback.decay=0.9")
    assert (defense.k1, defense.k2, defense.error_feedback.decay) == (0.01, 0.6, 0.9)  # type: ignore[attr-defined]
    noise = composed("laplace_noise", "defense.variance=null", "defense.scale=0.1")
    assert noise.b == 0.1  # type: ignore[attr-defined]


def test_a_loop_and_vmap_give_the_same_bits_over_two_rounds_and_the_wire_keeps_them(scene: Scene) -> None:
    defense = scene.defense
    states = [defense.init_client(scene.params) for _ in range(CLIENTS)]
    for round_index in range(2):
        updates = [scene.update(c, round_index) for c in range(CLIENTS)]
        shared = scene.announce(updates, states, round_index)
        noises = [defense.draw(scene.params, scene.batch(c), stream(0, round_index, c)) for c in range(CLIENTS)]

        def protect(
            update: Update, batch: Batch, state: State, noise: dict[str, Tensor], shared: Shared = shared
        ) -> tuple[Update, State]:
            return defense.protect(update, scene.client(batch), state, shared, noise)

        alone = [protect(updates[c], scene.batch(c), states[c], noises[c]) for c in range(CLIENTS)]
        mapped = torch.vmap(protect)(stacked(updates), scene.batches, stacked(states), stacked(noises))
        for c, (sent, state) in enumerate(alone):
            for one, many in ((sent, mapped[0]), (state, mapped[1])):
                assert all(torch.equal(one[k].view(torch.uint8), many[k][c].view(torch.uint8)) for k in one)
            assert {k: (s.shape, s.dtype) for k, s in sent.items()} == {
                k: (p.shape, p.dtype) for k, p in scene.params.items()
            }
            decoded = defense.codec.decode(defense.codec.encode(sent, shared, EXAMPLES), scene.params, shared)
            assert all(torch.equal(decoded[k].view(torch.uint8), sent[k].view(torch.uint8)) for k in sent)
        states = [state for _, state in alone]


def test_a_state_keeps_its_names_shapes_and_dtypes_and_is_measured_by_finite_scalars(scene: Scene) -> None:
    defense = scene.defense
    state = defense.init_client(scene.params)
    shared = scene.announce(scene.updates, [state] * CLIENTS, 0)
    noise = defense.draw(scene.params, scene.batch(0), stream(0))
    _, after = defense.protect(scene.updates[0], scene.client(scene.batch(0)), state, shared, noise)
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    for value in defense.measure(after).values():
        assert value.shape == ()
        assert value.isfinite()


def test_the_surrogate_keeps_names_and_shapes_and_lets_gradients_through(scene: Scene) -> None:
    defense = scene.defense
    state = defense.init_client(scene.params)
    shared = scene.announce(scene.updates, [state] * CLIENTS, 0)
    noise = defense.draw(scene.params, scene.batch(0), stream(0))
    sent, _ = defense.protect(scene.updates[0], scene.client(scene.batch(0)), state, shared, noise)
    observation = Observation(params=scene.params, update=sent, shared=shared, defense=defense)

    def energy(dummy: Update) -> Tensor:
        stand_in = defense.surrogate(dummy, observation)
        assert {k: v.shape for k, v in stand_in.items()} == {k: v.shape for k, v in scene.params.items()}
        return torch.stack([s.square().sum() for s in stand_in.values()]).sum()

    gradients = torch.vmap(torch.func.grad(energy))(stacked(scene.updates))
    assert sum(float(g.abs().sum()) for g in gradients.values()) > 0
