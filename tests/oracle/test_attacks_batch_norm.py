"""Priors on BatchNorm statistics against the layers themselves, and against finite differences."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attack_problems import Problem, problem
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from gia_bench.attacks.batch_norm import InferredStatistics, RunningStatistics, inferred, norm_layers
from gia_bench.attacks.distances import Cosine
from gia_bench.attacks.group import Group
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.priors import Prior
from gia_bench.attacks.scene import Candidate, PixelSpace, Scene
from gia_bench.conf_path import CONF
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import IncompatibleError
from gia_bench.federated.execution import Loop, Vmap
from gia_bench.federated.local import FedSGD
from gia_bench.federated.round import play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.models.functional import Victim
from gia_bench.models.resnet import cifar_resnet
from gia_bench.threat import Knowledge, ThreatModel


def network() -> nn.Sequential:
    """BatchNorm of two kinds, with running statistics that are not those of a new layer."""
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(3), nn.BatchNorm1d(5, momentum=0.3)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), first, nn.Sigmoid(), nn.Flatten(), nn.Linear(108, 5), second)
    for layer in (first, second):
        nn.init.uniform_(layer.running_mean, -1, 1)  # type: ignore[arg-type]
        nn.init.uniform_(layer.running_var, 0.5, 2)  # type: ignore[arg-type]
    return net.append(nn.Sigmoid()).append(nn.Linear(5, 4))


def made(victims: int = 2) -> Problem:
    with torch.random.fork_rng(devices=[]):
        return problem(victims, batch=3, module=network(), normalised=True, dtype=torch.float64)


def penalty(prior: Prior, p: Problem, images: Tensor, v: int = 0) -> Tensor:
    return prior(Candidate((images - 0.4) / 0.25, images, p.labels[v]), Scene(p.victim, p.observations[v]))


@torch.no_grad()
def by_hand(p: Problem, images: Tensor, first: float) -> float:
    """Sums over channels in plain Python, from the layers' inputs as a copy of the network computes them."""
    net, total = p.victim.module, 0.0
    x = (images - 0.4) / 0.25
    for i, layer in enumerate(net.children()):
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            mean = torch.stack([x[:, c].mean() for c in range(x.shape[1])])
            variance = torch.stack([((x[:, c] - x[:, c].mean()) ** 2).mean() for c in range(x.shape[1])])
            apart = (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
            total += float(apart) * (first if i == 1 else 1.0)
        dims = [0, *range(2, x.ndim)]
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            shape = (1, -1, *[1] * (x.ndim - 2))
            x = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + layer.eps).sqrt()
            x = x * layer.weight.view(shape) + layer.bias.view(shape)
        else:
            x = layer(x)
    return total


@pytest.mark.parametrize("first", [10.0, 1.0])
def test_the_running_statistics_are_matched_layer_by_layer_the_first_with_its_factor(first: float) -> None:
    p = made()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = penalty(RunningStatistics(weight=0.5, first=first), p, images)
    assert found.item() == pytest.approx(0.5 * by_hand(p, images, first))


def test_the_statistics_a_client_sends_are_met_by_its_own_images_alone() -> None:
    p, exact = made(), InferredStatistics(weight=1.0)
    assert penalty(exact, p, p.images[0]).item() < 1e-9
    assert penalty(exact, p, p.images[1]).item() > 0.1
    assert penalty(RunningStatistics(weight=1.0), p, p.images[0]).item() > 0.1
    gradient = torch.func.grad(lambda x: penalty(exact, p, x))(p.images[0])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("prior", [RunningStatistics(weight=0.1), InferredStatistics(weight=0.1)])
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_all_candidates_equals_finite_differences(prior: Prior, training: bool) -> None:
    p = made()
    victim = dataclasses.replace(p.victim, training=training)
    space = PixelSpace.of(victim, p.images)
    group = Group.of(p.observations, victim, list(p.labels), space, Cosine(), {"batch_norm": prior}, None)
    pixels = torch.randn(2, 2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    loss, gradient = group.evaluate({"pixels": pixels})
    without, _ = dataclasses.replace(group, priors={}).evaluate({"pixels": pixels})
    for v in range(2):
        for t in range(2):
            extra = prior(
                Candidate(pixels[v, t], space.decode(pixels[v, t]), p.labels[v]), Scene(victim, p.observations[v])
            )
            torch.testing.assert_close(loss[v, t], without[v, t] + extra)
    way = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    ahead, behind = (group.evaluate({"pixels": pixels + s * 1e-6 * way})[0] for s in (1, -1))
    slope = (gradient["pixels"] * way).flatten(2).sum(2)
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


def test_the_network_is_left_without_hooks_and_with_its_own_statistics() -> None:
    p = made()
    before = {k: v.clone() for k, v in p.victim.module.state_dict().items()}
    penalty(RunningStatistics(weight=1.0), p, p.images[0])
    assert all(torch.equal(v, before[k]) for k, v in p.victim.module.state_dict().items())
    assert not any(m._forward_pre_hooks for m in p.victim.module.modules())


def test_a_model_without_batch_norm_gives_nothing() -> None:
    p = problem(1)
    for prior in (RunningStatistics(weight=1.0), InferredStatistics(weight=1.0)):
        assert penalty(prior, p, p.images[0]) == 0
        assert prior.refusal(p.observations[0], p.victim) is None


def test_inferred_statistics_are_asked_for_and_refused_where_they_are_not_exact() -> None:
    attack = inverting_gradients(steps=1, priors={"batch_norm": InferredStatistics(weight=1.0)})
    assert attack.requires == Knowledge.NUM_EXAMPLES | Knowledge.BUFFERS | Knowledge.SENT_BUFFERS
    assert inverting_gradients(priors={"x": RunningStatistics(weight=1.0)}).requires & Knowledge.BUFFERS
    p = made(1)
    o = p.observations[0]
    assert attack.reconstruct(o, p.victim).failure is None
    sent = {k: v + 2 if k.endswith("num_batches_tracked") else v for k, v in (o.sent_buffers or {}).items()}
    averaged = network()
    averaged[1].momentum = None  # type: ignore[assignment]
    cases = [
        (dataclasses.replace(o, sent_buffers=None), p.victim, "priors.batch_norm: this update came without"),
        (dataclasses.replace(o, sent_buffers=sent), p.victim, "mix 3 batches"),
        (o, dataclasses.replace(p.victim, module=averaged), "layer '1' averages over all rounds"),
    ]
    for observation, victim, sentence in cases:
        with pytest.raises(IncompatibleError, match=sentence):
            attack.reconstruct(observation, victim)


@pytest.mark.parametrize("executor", [Loop(), Vmap(chunk_size=2)])
def test_what_a_client_of_a_resnet_sends_back_gives_its_batch_statistics_to_five_digits(executor: Loop | Vmap) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = cifar_resnet((3, 16, 16), 10, depth=8, width=8)
        source = InMemory(torch.rand(12, 3, 16, 16), torch.arange(12) % 10)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.running_mean, -1, 1)  # type: ignore[arg-type]
                nn.init.uniform_(layer.running_var, 0.5, 2)  # type: ignore[arg-type]
    victim, local = Victim(module=module, input_shape=(3, 16, 16), num_classes=10), FedSGD(batch_size=6)
    params, buffers = victim.initial()
    rules = Rules(victim=victim, defense=NoDefense(), local=local, executor=executor, seed=0)
    cohort = Cohort(
        round_index=0, clients=(0, 1), steps=((torch.arange(6),), (torch.arange(6, 12),)), weights=(6, 6), source=source
    )
    transcript = play_round(rules, Server(params, buffers, {}), {}, cohort, observed=(0, 1)).transcript
    assert transcript is not None
    threat = instantiate(OmegaConf.load(CONF / "threat" / "curious_server_buffers.yaml"))
    blind = instantiate(OmegaConf.load(CONF / "threat" / "curious_server.yaml"))
    assert isinstance(threat, ThreatModel)
    heard: dict[str, Tensor] = {}
    for name, layer in norm_layers(victim).items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: heard.update({name: inputs[0]}))
    module.train()
    for client in (0, 1):
        seen = threat.observe(transcript, cohort, client, local=local)
        prior = InferredStatistics(weight=1.0)
        assert prior.refusal(seen, victim) is None
        refusal = prior.refusal(blind.observe(transcript, cohort, client, local=local), victim)
        assert refusal is not None and "threat=curious_server_buffers" in refusal
        module(cohort.truth((client,)).inputs)
        assert len(heard) == 7
        for name, layer in norm_layers(victim).items():
            x = heard[name].double().transpose(0, 1).flatten(1)
            found = inferred(seen, name, layer, x.shape[1])
            wanted = x.mean(1).float(), x.var(1, correction=0).float()
            torch.testing.assert_close(tuple(found), wanted, rtol=1e-5, atol=1e-5)
