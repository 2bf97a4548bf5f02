"""Plans taken apart: parts are the plan's own, and what would help is what the cost model says of exactly that."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import GB, MACHINE, MB, SIZES, machine

from moeflow.planning.cost import Running, predict
from moeflow.planning.explanation import Explanation, explain, running_of
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import Cache, CpuUse, Disk, Gpu, HardwareProfile, Link, LinkPoint, Memory, Plan, Prefetch, Profile

WIDE = replace(SIZES, layers=(replace(SIZES.layers[0], experts=16),) * 2)


def planned(hardware: HardwareProfile = MACHINE, sizes: ModelSizes = WIDE, **settings: object) -> Plan:
    return make_plan(Profile(model="x", cache=Cache(experts_per_layer=4), **settings), sizes, hardware)


def gains(found: Explanation) -> dict[str, float]:
    return {change.what: change.gain for change in found.changes}


def test_parts_are_the_plans_and_fill_their_whole() -> None:
    plan = planned()
    found = explain(plan, WIDE, MACHINE)
    bytes_of = {part.name: part.value for part in found.device}
    assert sum(bytes_of.values()) == plan.memory.limit
    assert bytes_of["cached experts"] == plan.memory.slots == 2 * 4 * 3 * MB
    assert bytes_of["free"] == plan.memory.limit - plan.memory.total
    assert sum(part.share for part in found.device) == pytest.approx(1)
    assert [part.value for part in found.experts] == [2 * 16 * 3 * MB, 0]
    assert plan.prediction
    assert sum(part.value for part in found.token) == plan.prediction.decode.total
    assert sum(part.share for part in found.token) == pytest.approx(1)
    assert max(part.share for part in found.prompt) == 1
    assert found.bound == found.largest.name == "misses"


def test_each_change_is_predicted_with_nothing_else_changed() -> None:
    plan = planned()
    found = explain(plan, WIDE, MACHINE)
    running = Running((4, 4), (16, 16), "full", "device", 2)
    assert running_of(plan) == running
    now = predict(WIDE, MACHINE, running)
    more = predict(WIDE, MACHINE, replace(running, slots=(5, 5)))
    points = (LinkPoint(nbytes=MB, engine=20 * GB, kernel=16 * GB),)
    faster = predict(WIDE, machine(link=Link(host_to_device=20 * GB, by_size=points)), running)
    assert now
    assert more
    assert faster
    known = {change.what: change for change in found.changes}
    added = known["one more expert cached in each layer"]
    assert added.tokens_per_second == more.tokens_per_second
    assert added.gain == pytest.approx(more.tokens_per_second / now.tokens_per_second - 1)
    assert (added.device_nbytes, added.ram_nbytes) == (2 * 3 * MB, 0)
    assert known["twice the link's rate"].tokens_per_second == faster.tokens_per_second
    assert [c.gain for c in found.changes] == sorted((c.gain for c in found.changes), reverse=True)
    assert "twice the disk's rate" not in known


def test_products_that_were_measured_get_faster_with_their_memory() -> None:
    """Of hits alone only dense and experts' bytes depend on it: 100 of 173.3 us, and 24 of the 32 of products."""
    full = replace(SIZES, layers=(replace(SIZES.layers[0], experts=4),) * 2)
    found = explain(planned(sizes=full), full, MACHINE)
    assert list(gains(found)) == ["twice the device memory's rate"]
    assert gains(found)["twice the device memory's rate"] == pytest.approx(172.336 / (172.336 - 50 - 12) - 1, rel=2e-3)


def test_experts_on_the_disk_may_come_home_and_the_device_drive() -> None:
    plan = planned(memory=Memory(ram=48 * MB))
    assert (plan.execution, plan.ram_experts) == ("host", (8, 8))
    found = explain(plan, WIDE, MACHINE)
    assert found.bound == "disk"
    both = next(c for c in found.changes if c.what == "every expert in host memory, and the device driving")
    assert found.changes[0] is both
    assert both.ram_nbytes == plan.disk_nbytes == 2 * 8 * 3 * MB
    device = predict(WIDE, MACHINE, Running((4, 4), (16, 16), "full", "device", 2))
    assert device
    assert both.tokens_per_second == device.tokens_per_second
    fast = machine(disk=Disk(read=2 * GB))
    twice = predict(WIDE, fast, running_of(plan))
    assert twice
    assert {c.what: c.tokens_per_second for c in found.changes}["twice the disk's rate"] == twice.tokens_per_second


@pytest.mark.parametrize("strategy", ["no-cache", "naive"])
def test_without_a_cache_no_slot_is_offered(strategy: str) -> None:
    plan = make_plan(Profile(model="x", strategy=strategy), WIDE, MACHINE)
    found = explain(plan, WIDE, MACHINE)
    assert not any("cached" in what or "driving" in what for what in gains(found))


def test_on_a_cpu_nobody_else_can_drive() -> None:
    box = machine(gpu=None)
    found = explain(planned(box, cpu=CpuUse(experts="off")), WIDE, box)
    assert found.bound == "experts"
    assert not any("driving" in what for what in gains(found))


def test_what_would_help_is_left_open_where_it_is_not_known() -> None:
    plan = planned()
    assert explain(plan).unknown == "the model's sizes or the machine are not at hand"
    assert explain(plan, WIDE).unknown == explain(plan, None, MACHINE).unknown == explain(plan).unknown
    assert explain(plan).token == explain(plan, WIDE, MACHINE).token
    other = machine(link=Link(host_to_device=9 * GB))
    assert "plan it anew" in explain(plan, WIDE, other).unknown
    assert explain(plan, WIDE, other).changes == ()
    blind = machine(gpu=Gpu(name="g", memory=80 * GB, compute_capability="9.0"))
    found = explain(planned(blind, prefetch=Prefetch(predictor="none")), WIDE, blind)
    assert found.unknown == "the plan predicts nothing: its hardware profile lacks a rate"
    assert (found.token, found.prompt, found.bound) == ((), (), "")
