"""`moeflow hardware` as a person and as a script use it: tables, JSON, exit codes, one line per fault."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from moeflow import cli
from moeflow.files import data_dir
from moeflow.probe import devices, nvml
from moeflow.probe.match import find_hardware, known_hardware
from moeflow.schema import Cpu, Gpu, HardwareProfile

Run = Callable[..., tuple[int, str, str]]
FILES = sorted(data_dir("hardware").glob("*.yaml"))


@pytest.fixture
def hardware(moe: Run) -> Run:
    """`hardware(*arguments)` in this process: exit code, stdout, stderr."""

    return partial(moe, "hardware")


def test_list_has_every_file_and_no_path(hardware: Run) -> None:
    code, out, _ = hardware("list")
    assert code == 0
    assert {path.stem for path in FILES} <= set(out.split())
    assert str(data_dir("hardware")) not in out
    documents = json.loads(hardware("list", "--json")[1])
    assert [HardwareProfile.parse(d, "list") for d in documents] == list(known_hardware().values())


def test_show_has_every_value_and_its_source(hardware: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeflow import console

    monkeypatch.setattr(console.out, "_width", 200)
    profile = find_hardware("rtx-4060-ti-16gb")
    code, out, _ = hardware("show", "rtx-4060-ti-16gb")
    assert code == 0
    for name, source in profile.sources.items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert line.rstrip().endswith(source)
    assert "4.0 x8" in out
    assert HardwareProfile.parse(json.loads(hardware("show", profile.name, "--json")[1]), "show") == profile


def test_show_takes_a_path_and_a_file_without_sources(hardware: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    find_hardware("t4").model_copy(update={"name": "mine", "origin": "measured", "sources": {}}).save(file)
    code, out, _ = hardware("show", file)
    assert code == 0
    assert out.count("measured") == len(find_hardware("t4").values())
    assert str(tmp_path) not in out


def test_show_of_an_unknown_name_lists_the_known_ones(hardware: Run) -> None:
    code, _, err = hardware("show", "rtx-9999")
    assert code == 3
    assert err.startswith("error: unknown hardware 'rtx-9999'; known: a100-80gb, ")


def test_match_of_a_name_says_what_differs(hardware: Run) -> None:
    gpu = ("--name", "NVIDIA GeForce RTX 4060 Ti", "--memory", "8GiB", "--compute-capability", "8.9")
    code, out, _ = hardware("match", *gpu)
    assert code == 0
    assert "another version of this GPU  rtx-4060-ti-16gb" in out
    assert "memory is 8 GiB, in the file 16 GiB" in out
    document = json.loads(hardware("match", *gpu, "--json")[1])
    assert document["sought"]["memory"] == 8 << 30
    assert document["found"][0] == {
        "profile": "rtx-4060-ti-16gb", "kind": "variant", "same": ["name", "compute capability"],
        "differs": ["memory is 8 GiB, in the file 16 GiB"],
        "unknown": ["memory rate", "link", "CPU cores", "RAM"],
    }  # fmt: skip


def test_words_in_brackets_are_text(hardware: Run) -> None:
    code, out, _ = hardware("match", "--name", "RTX 4090 [/red]")
    assert (code, out.splitlines()[0].strip()) == (0, "RTX 4090 [/red]")


def test_match_of_this_machine(hardware: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="NVIDIA GeForce RTX 4090", memory=24564 << 20, compute_capability="8.9")
    monkeypatch.setattr(nvml, "find_gpu", lambda: gpu)
    monkeypatch.setattr(devices, "find_cpu", lambda: Cpu(cores=8))
    monkeypatch.setattr(devices, "find_memory", lambda: 32 << 30)
    code, out, _ = hardware("match")
    assert code == 0
    assert "this machine, NVIDIA GeForce RTX 4090" in out
    assert "the same GPU  rtx-4090" in out
    assert "RAM is 32 GiB, in the file 64 GiB" in out
    monkeypatch.setattr(nvml, "find_gpu", lambda: None)
    assert "another one, the nearest  cpu-2-cores" in hardware("match")[1]


def test_probe_says_which_machine_it_is_like_and_what_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeflow import calibration
    from moeflow.probe import machine

    known = find_hardware("rtx-4060-ti-16gb")
    assert known.gpu is not None
    half = known.model_copy(update={"gpu": known.gpu.model_copy(update={"memory": 8188 << 20})})
    monkeypatch.setattr(machine, "probe", lambda **_: half)
    monkeypatch.setattr(calibration, "calibrated", lambda found, _: found)  # there is no such GPU here
    monkeypatch.setattr(sys, "argv", ["moeflow", "probe"])
    with pytest.raises(SystemExit):
        cli.main()
    out = capsys.readouterr().out
    assert "another version of this GPU  rtx-4060-ti-16gb" in out
    assert "memory is 8 GiB, in the file 16 GiB" in out


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_match_of_a_file_is_itself(hardware: Run, path: Path) -> None:
    code, out, _ = hardware("match", "--file", path, "--json")
    best = json.loads(out)["found"][0]
    assert (code, best["profile"], best["differs"], best["unknown"]) == (0, path.stem, [], [])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--name", "Radeon RX 7900"), 3, "unknown GPU 'Radeon RX 7900'; known: a100-80gb, "),
        (("--memory", "8GiB"), 2, "--memory and --compute-capability describe the GPU of --name; give that too"),
        (("--name", "L4", "--file", "x.yaml"), 2, "--name and --file are two machines; give one of them"),
        (("--name", "L4", "--memory", "much"), 2, "--memory is much; expected a size such as 11GiB or 512 MiB"),
        (("--name", "L4", "--compute-capability", "89"), 2, "--compute-capability is 89; expected one such as 8.9"),
        (("--file", "absent.yaml"), 7, "absent.yaml: cannot read: no such file or directory"),
    ],
)
def test_refused_matches(hardware: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    found, _, err = hardware("match", *arguments)
    assert (found, err.startswith(f"error: {message}"), err.count("\n")) == (code, True, 1)


def test_validate_takes_many_files(hardware: Run) -> None:
    code, out, _ = hardware("validate", *FILES)
    assert code == 0
    assert out.splitlines() == [f"{path}: valid hardware profile" for path in FILES]


def test_validate_tells_every_fault_in_one_line(hardware: Run, tmp_path: Path) -> None:
    good, bad, broken, absent = (tmp_path / f"{name}.yaml" for name in ("good", "bad", "broken", "absent"))
    good.write_text((data_dir("hardware") / "t4.yaml").read_text())
    bad.write_text("name: bad\norigin: guess\ncpu: {cores: 0}\nram: 1GiB\nlink: {host_to_device: 1GB/s}\n")
    broken.write_text("name: [\n")
    code, out, err = hardware("validate", good, bad, broken, absent)
    assert code == 3
    assert out == f"{good}: valid hardware profile\n"
    lines = err.removeprefix("error: ").splitlines()
    assert lines[0] == f"{bad}: origin is guess; it supports measured, datasheet, derived"
    assert lines[1].startswith(f"{bad}: cpu.cores is 0; ")
    assert lines[2].startswith(f"{broken}:2:1: not valid YAML")
    assert lines[3] == f"{absent}: cannot read: no such file or directory"
    code, out, _ = hardware("validate", good, absent, "--json")
    assert code == 7
    assert [(entry["valid"], len(entry["faults"])) for entry in json.loads(out)] == [(True, 0), (False, 1)]


def test_no_command_of_hardware_imports_torch() -> None:
    code = (
        "import sys; sys.argv=['moeflow','hardware','match']\nfrom moeflow import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("False")
