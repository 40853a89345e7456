"""Phases: their turns over any loader, and what learns in each."""

import pytest
import torch
from torch import nn

from gfnet_dynn.train.phases import (
    TURNS,
    Alternation,
    Phase,
    forget_momentum,
    named_parts,
    optimizer_groups,
    phases_of,
    phases_with_parameters,
    set_phase,
)


class Tiny(nn.Module):
    """The parts of a GFNetDynn, without its size."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.exit_heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(12))
        self.gates = nn.ModuleList(nn.Linear(4, 1) for _ in range(12))


@pytest.mark.parametrize("length", [1, 26, 59, 60, 61, 121, 393])
def test_both_phases_take_turns_for_any_loader(length):
    alternation = Alternation(60)
    phases = []
    while len(phases) < 1300:  # as many epochs of this loader as it takes
        for _ in range(length):
            phases.append(alternation.phase)
            alternation.advance()
    for step, phase in enumerate(phases):
        assert phase is (Phase.GATE if (step // 60) % 2 == 0 else Phase.CLASSIFIER), step
    gates = phases[:1200].count(Phase.GATE)
    assert gates == 600


def test_it_goes_on_where_it_was_saved():
    whole, first = Alternation(7), Alternation(7)
    for _ in range(17):
        first.advance()
    second = Alternation(7)
    second.load_state_dict(first.state_dict())
    for _ in range(17):
        whole.advance()
    for _ in range(40):
        assert second.phase is whole.phase
        whole.advance()
        second.advance()


def test_a_state_of_another_schedule_is_refused():
    state = Alternation(7).state_dict()
    with pytest.raises(ValueError, match="bilevel_batch_count 7; expected 8"):
        Alternation(8).load_state_dict(state)
    with pytest.raises(ValueError, match="has phases"):
        Alternation(7, phases=TURNS["backbone"]).load_state_dict(state)


@pytest.mark.parametrize("options", [{"bilevel_batch_count": 0}, {"phases": ()}])
def test_bad_schedules_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        Alternation(**{"bilevel_batch_count": 3, **options})


def test_phases_of_phase2():
    assert phases_of("exits") == (Phase.GATE, Phase.CLASSIFIER)
    assert phases_of("backbone") == (Phase.GATE, Phase.BACKBONE)
    assert phases_of("joint") == (Phase.JOINT,)
    with pytest.raises(ValueError, match="unknown phase2 'all'"):
        phases_of("all")


def test_phases_without_parameters_are_left_out():
    model = Tiny()
    assert phases_with_parameters(model, phases_of("exits")) == (Phase.GATE, Phase.CLASSIFIER)
    frozen = phases_with_parameters(model, phases_of("exits"), frozen_exits=range(12))
    assert frozen == (Phase.GATE,)
    model.gates = nn.ModuleList(nn.Identity() for _ in range(12))
    assert phases_with_parameters(model, phases_of("exits")) == (Phase.CLASSIFIER,)


LEARNS = {
    Phase.WARMUP: {"heads"},
    Phase.GATE: {"gates"},
    Phase.CLASSIFIER: {"heads"},
    Phase.BACKBONE: {"backbone"},
    Phase.JOINT: {"backbone", "heads", "gates"},
}


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("optimizer_kind", ["sgd", "adamw"])
def test_what_does_not_learn_keeps_its_bits(phase, optimizer_kind):
    torch.manual_seed(0)
    model = Tiny()
    if optimizer_kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def step():
        loss = sum((p**2).sum() for p in model.parameters())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    for parameter in model.parameters():  # everything has momentum from before
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    trained = set_phase(model, phase, frozen_exits=[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        step()
    changed = {
        part for part, name, p in named_parts(model) if not torch.equal(p.detach(), before[name])
    }
    assert changed == LEARNS[phase]
    for name, p in model.named_parameters():
        frozen = name.startswith("exit_heads.1.")  # not exit_heads.10 or exit_heads.11
        learns = p.requires_grad
        assert learns == (not torch.equal(p.detach(), before[name]))
        assert not (frozen and learns)
    assert [id(p) for p in trained] == [id(p) for p in model.parameters() if p.requires_grad]


def test_only_a_learning_backbone_is_in_training_mode():
    model = Tiny()
    for phase in Phase:
        set_phase(model, phase)
        assert model.backbone[1].training == (phase in (Phase.BACKBONE, Phase.JOINT))


def test_gradients_of_an_earlier_phase_are_dropped():
    model = Tiny()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    set_phase(model, Phase.GATE)
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_outside_of_the_parts_is_an_error():
    model = Tiny()
    model.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="'extra.weight' is in no part"):
        set_phase(model, Phase.GATE)


def test_gates_can_have_their_own_learning_rate():
    model = Tiny()
    groups = {g["name"]: g for g in optimizer_groups(model, lr=0.1, gate_lr=1.0)}
    assert {name: g["lr"] for name, g in groups.items()} == {
        "backbone": 0.1, "heads": 0.1, "gates": 1.0
    }  # fmt: skip
    assert [id(p) for p in groups["gates"]["params"]] == [id(p) for p in model.gates.parameters()]
    optimizer = torch.optim.SGD(optimizer_groups(model, lr=0.1))
    listed = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(listed) == len(list(model.parameters()))
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}


def test_momentum_can_be_forgotten():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    forget_momentum(optimizer, model.exit_heads[0].parameters())
    assert model.exit_heads[0].weight not in optimizer.state
    assert model.exit_heads[1].weight in optimizer.state
