"""What the kernels take, from times: the line through products, and what remains of a layer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from moeflow.calibration import SmallModel, calibrated, fitted, layer_seconds
from moeflow.pipeline import resolve_hardware
from moeflow.planning.rates import DENSE, PER_EXPERT, PRODUCTS, WIDE, Rates
from moeflow.planning.sizes import LayerSize, ModelSizes
from moeflow.schema import HardwareProfile, Product

SIZES = ModelSizes(
    layers=(LayerSize(8, 2_000_000, 1, hidden=1024, inner=1024),) * 16,
    top_k=2,
    dtype="bfloat16",
    resident_packed=16_000_000,
    resident_dense=4_000_000,
    kv_values_per_token=1,
    max_context=1,
)


def test_a_line_through_times_is_found_again() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(50):
        latency, rate = draw.uniform(1e-6, 1e-5), draw.uniform(1e11, 4e12)
        sizes = [draw.uniform(1e6, 3e8) for _ in range(4)]
        product = fitted([(nbytes, latency + nbytes / rate) for nbytes in sizes])
        assert product.latency == pytest.approx(latency, abs=6e-9)
        assert product.rate == pytest.approx(rate, abs=6e8)


def test_small_products_weigh_as_much_as_large_ones() -> None:
    """The least squares of seconds would leave the small time to the noise of the large one."""
    exact = [(4e6, 4.4e-6), (14e6, 7.4e-6), (66e6, 24.6e-6), (132e6, 48.9e-6)]  # 4-bit products of an H100
    product = fitted(exact)
    for nbytes, seconds in exact:
        assert product.latency + nbytes / product.rate == pytest.approx(seconds, rel=0.12)


def test_a_latency_that_noise_makes_negative_is_none() -> None:
    assert fitted([(1e6, 1e-6), (100e6, 101e-6)]).latency == 1e-7


def test_a_layer_is_what_remains_of_a_token() -> None:
    memory, product, layer = 2e12, Product(latency=2e-6, rate=1_500_000_000_000), 30e-6
    many = replace(SIZES, layers=SIZES.layers * 3, resident_packed=48_000_000)

    def seconds(sizes: ModelSizes) -> float:
        """With 100 us that belong to no layer."""
        each = layer + PER_EXPERT * 8 + 2 * product.latency + 2 * 2_000_000 / product.rate
        return 1e-4 + len(sizes.layers) * each + sizes.read_resident / (DENSE * memory)

    found = layer_seconds(SmallModel(SIZES, seconds(SIZES)), SmallModel(many, seconds(many)), product, memory)
    assert found == pytest.approx(layer, abs=6e-9)


def test_a_machine_without_gpu_stays_as_it_is() -> None:
    machine = resolve_hardware("cpu-2-cores")
    assert calibrated(machine) is machine


@pytest.mark.gpu
def test_this_gpus_kernels_are_measured_and_take_the_place_of_assumptions() -> None:
    machine = resolve_hardware("auto")
    found = HardwareProfile.parse(calibrated(machine).to_dict(), "calibrated")
    assert found.gpu and found.gpu.kernels and found.gpu.memory_bandwidth
    assert found.source("gpu.kernels").startswith("measured")
    assert found.gpu.kernels.products.keys() == PRODUCTS.keys() - {"none"}
    assert 3e-6 < found.gpu.kernels.layer < 2e-4
    for product in found.gpu.kernels.products.values():
        assert 1e-7 <= product.latency < 3e-5
        assert 0.2 < product.rate / found.gpu.memory_bandwidth < 1.3
    rates = Rates.of(found)
    assert rates and not rates.assumed and rates.layer == WIDE * found.gpu.kernels.layer
