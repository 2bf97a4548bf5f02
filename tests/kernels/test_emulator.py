"""The emulator computes what CUDA would, and says what is wrong with a kernel that is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulator.checks import CHECKS
from emulator.launcher import HERE, ORDERS, EmulatedLauncher, EmulatorError, available

pytestmark = pytest.mark.skipif(not available(), reason="no g++")

CPU = torch.device("cpu")


def emulated(order: str = "forward", seed: int = 0) -> EmulatedLauncher:
    return EmulatedLauncher(order, seed=seed, directory=HERE)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHECKS)
def test_arithmetic_and_collectives(name: str, order: str) -> None:
    seed = int(torch.randint(1 << 30, ()))
    print(f"order from seed {seed}")
    CHECKS[name](emulated(order, seed), CPU)


def complaint(name: str, block: int, *arguments: object, **defines: int) -> str:
    kernel = emulated().kernel("faulty.cu", name, defines)
    with pytest.raises(EmulatorError) as error:
        kernel(1, block, *arguments)
    return str(error.value)


def line_of(text: str, after: str) -> int:
    """Number of the first line of faulty.cu that holds `text`, from the one that holds `after` on."""
    lines = (HERE / "faulty.cu").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if after in line)
    return start + next(i for i, line in enumerate(lines[start:]) if text in line) + 1


def test_a_block_that_waits_for_ever_is_reported_with_who_and_where() -> None:
    said = complaint("half_a_barrier", 64)
    first = line_of("__syncthreads", "half_a_barrier")
    assert f"threads 0 to 39 at __syncthreads, faulty.cu:{first}" in said
    assert f"threads 40 to 63 at __syncwarp, faulty.cu:{first + 2}, mask 0xffffffff" in said
    said = complaint("half_a_warp", 32, ints(*[0] * 32))
    first = line_of("__syncwarp", "half_a_warp")
    assert "threads 0 to 7 ended" in said
    assert f"threads 8 to 15 at __syncwarp, faulty.cu:{first}, mask 0xffffffff" in said
    assert f"threads 16 to 31 at __shfl_xor_sync, faulty.cu:{first + 2}, mask 0xffffffff" in said


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_have_ended_are_not_waited_for(order: str) -> None:
    out = ints(*[0] * 64)
    emulated(order, 2).kernel("faulty.cu", "early")(1, 64, out)
    expected = [(t ^ 1) + (24 if t < 32 else 8) if 8 <= t < 40 else 0 for t in range(64)]
    assert out.tolist() == expected


def test_barriers_in_two_places_do_not_meet() -> None:
    place = line_of("__syncthreads", "two_barriers")
    said = complaint("two_barriers", 32)
    assert f"line {place}" in said
    assert f"line {place + 2}" in said


def test_a_lane_must_be_in_its_own_mask() -> None:
    assert "leaves the caller out" in complaint("left_out", 1)


def test_a_flag_that_nobody_raises_is_not_waited_for_for_ever() -> None:
    assert "nobody raises" in complaint("waits", 1, ints(0))
    emulated().kernel("faulty.cu", "waits")(1, 64, ints(1))


def test_misused_memory_and_undefined_arithmetic_are_errors() -> None:
    raw = torch.zeros(16, dtype=torch.int32)
    place = f"faulty.cu:{line_of('void null', 'void null')}"
    said = complaint("null", 2, None)
    assert place in said
    assert "null pointer" in said
    assert "no memory at 0x1000" in complaint("wild", 1, 0x1000)
    assert "not aligned to 16 bytes" in complaint("misaligned", 1, raw, torch.zeros_like(raw))
    assert "index 4 is out of the array" in complaint("outside", 1, ints(4), ints(0))
    assert "shift by 32 bits" in complaint("shifted", 1, ints(32), ints(0))
    assert "division by zero" in complaint("divided", 1, ints(0), ints(0))
    emulated().kernel("faulty.cu", "divided")(1, 1, ints(1), raw)  # and the next launch is whole again
    assert raw[0] == 1


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows_in_another_order(order: str) -> None:
    right = list(range(-1, 255))
    found = ints(*[0] * 256)
    emulated(order, 5).kernel("faulty.cu", "neighbour")(1, 256, found)
    assert (found.tolist() == right) == (order == "forward")
    emulated(order, 5).kernel("faulty.cu", "neighbour", {"BARRIER": 1})(1, 256, found)
    assert found.tolist() == right


def test_random_order_comes_between_reading_and_writing() -> None:
    for order in ORDERS:
        total = ints(0)
        emulated(order, 1).kernel("faulty.cu", "lost")(2, 128, total, ints(0))
        assert (total.item() == 256) == (order != "random")


def test_orders_are_what_they_say_and_a_seed_repeats_one() -> None:
    def arrivals(order: str, seed: int = 0) -> list[int]:
        taken = torch.zeros(4 * 64, dtype=torch.int32)
        emulated(order, seed).kernel("faulty.cu", "arrivals")(4, 64, ints(0), taken)
        return taken.tolist()

    assert arrivals("forward") == list(range(256))
    assert arrivals("reverse") == list(range(256))[::-1]
    assert arrivals("random", 3) == arrivals("random", 3)
    assert len({tuple(arrivals("random", seed)) for seed in range(8)}) > 6
    assert len({arrivals("random", seed)[0] // 64 for seed in range(20)}) > 1  # blocks are shuffled too


def test_what_a_kernel_may_not_rely_on_is_filled_with_ones() -> None:
    out = ints(*[0] * 128)
    emulated().kernel("faulty.cu", "leftover")(2, 64, out)
    assert (out == -1).all()
    emulated().kernel("faulty.cu", "absent")(1, 32, out)
    assert out[:16].tolist() == [*range(8, 16), *[-1] * 8]


def test_arguments_are_held_against_the_parameters() -> None:
    kernel = emulated().kernel("faulty.cu", "parameters")
    x = torch.zeros(4, 4)
    kernel(1, 1, x, 1, 1.0)
    kernel(1, 1, None, 1, 1.0)
    kernel(1, 1, x.data_ptr(), 1, 1.0)
    for arguments, said in [
        ((x, 1), "3 parameters, 2 arguments"),
        ((x, 1, 1), "parameter 2 is a float, the argument is a int"),
        ((x, x, 1.0), "parameter 1 is a long long, the argument is a Tensor"),
        ((1.0, 1, 1.0), "parameter 0 is a pointer, the argument is a float"),
        ((x.T, 1, 1.0), "argument 0 is no contiguous tensor"),
    ]:
        with pytest.raises(EmulatorError, match=said):
            kernel(1, 1, *arguments)
    with pytest.raises(EmulatorError, match="2048 threads"):
        kernel(1, 2048, x, 1, 1.0)
    with pytest.raises(EmulatorError, match="grid"):
        kernel((1, 0, 1), 32, x, 1, 1.0)


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    with pytest.raises(EmulatorError, match="pointers, long long or float"):
        emulated().kernel("faulty.cu", "short_parameter", {"WRONG_PARAMETER": 1})
    with pytest.raises(EmulatorError, match="mangled"):  # extern "C" is missing: the driver would not find it
        emulated().kernel("faulty.cu", "mangled")
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void f(int* p) {\n    *p = missing;\n}\n')
    with pytest.raises(EmulatorError, match=r"broken\.cu:2:.*missing"):
        EmulatedLauncher(directory=tmp_path).kernel("broken.cu", "f")


def test_a_kernel_is_compiled_once_for_equal_macros(tmp_path: Path) -> None:
    source = tmp_path / "once.cu"
    source.write_text('extern "C" __global__ void f(int* p) { *p = VALUE; }\n')
    launcher, out = EmulatedLauncher(directory=tmp_path), ints(0)
    launcher.kernel("once.cu", "f", {"VALUE": 3})(1, 1, out)
    source.write_text("not C++\n")
    EmulatedLauncher("reverse", directory=tmp_path).kernel("once.cu", "f", {"VALUE": 3})(1, 1, out)
    assert out.item() == 3
    with pytest.raises(EmulatorError):
        launcher.kernel("once.cu", "f", {"VALUE": 4})
