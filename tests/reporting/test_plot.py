"""The plot: a PNG of a sensible size with every row's figures inside its edges, or an error that says what to do."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sample_benchmark import row, run

from moeflow.errors import StorageError, UsageError
from moeflow.reporting import plot as module
from moeflow.reporting.plot import plot
from moeflow.schema import Benchmark

CROWDED = (
    row(k=8, tokens_per_second=312.4, hit_rate=1.0, missed_bytes=0, read_bytes=6.4e9),
    row(hit_rate=0.52, missed_bytes=1.8e9, recall=0.7),
    row(routing="markov", tokens_per_second=None, note="no trace"),
    row(model="qwen3-30b-a3b", experts=128, k=64, tokens_per_second=81, routing="markov", attention_scheme="8-bit g64"),
    row(model="a/model-with-a-name-that-is-longer-than-any-line", execution="host", batch=4, tokens_per_second=0.05),
)  # fmt: skip
runs = pytest.mark.parametrize(
    "benchmark",
    [
        run(),
        run(rows=(row(),)),
        run(rows=CROWDED),
        run(rows=(row(model="other", tokens_per_second=0.001),), limits={}),
        run(rows=(row(model="/data/models/" * 9),)),
    ],
    ids=["ablation", "one", "crowded", "slow", "path"],
)


@runs
def test_it_is_a_png_for_a_page(benchmark: Benchmark, tmp_path: Path) -> None:
    plot(benchmark, tmp_path / "images" / "bench.png")
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["bench.png"]
    content = (tmp_path / "images" / "bench.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width == 1600 and 0.15 * width < height < 1.2 * width
    assert len(content) < 250_000


@runs
def test_every_text_is_inside_the_picture_and_none_covers_another(benchmark: Benchmark) -> None:
    figure = module._figure(benchmark)
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()]
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for number, (text, box) in enumerate(boxes):
        letters = box.padded(-1.5)  # a font's box is a little higher than what it draws
        for other, second in boxes[:number]:
            assert not letters.overlaps(second), f"{text!r} over {other!r}"


def test_it_names_rows_figures_machine_and_command() -> None:
    figure = module._figure(run())
    said = "\n".join(t.get_text() for t in [*figure.texts, *figure.axes[0].texts])
    for part in (
        "Decode speed of mixtral-8x7b, tokens per second", "k = 4 of 8", "uniform routing", "full algorithm",
        "naive offloading", "27.9", "3.06  paper", "1.39", "50% hits; link 52.2 GB/s, 95.5% of peak", "NVIDIA H100",
        "transformers 5.17.0", "moeflow 0.1.0 at 3d66d47", "2026-11-24",
        "moeflow bench --synthetic mixtral-8x7b --ablations",
    ):  # fmt: skip
        assert part in said
    assert said.count("paper, A100") == 1


def test_bars_are_as_long_as_their_figures() -> None:
    widths = [bar.get_width() for bar in module._figure(run()).axes[0].patches]  # type: ignore[attr-defined]
    assert widths == [27.9, 3.061, 27.6, 2.918, 14.3, 2.265, 3.7, 1.392]


def test_a_users_settings_do_not_change_it(tmp_path: Path) -> None:
    import matplotlib

    plot(run(), tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "font.family": "monospace"}):
        plot(run(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(UsageError, match=r"not installed: pip install moeflow\[plot\]"):
        plot(run(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_other_formats_and_empty_benchmarks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.pdf: a plot is written as PNG"):
        plot(run(), tmp_path / "a.pdf")
    with pytest.raises(UsageError, match="no row of this benchmark has a speed"):
        plot(run(rows=(row(tokens_per_second=None),)), tmp_path / "a.png")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/a\.png: cannot write"):
        plot(run(), tmp_path / "file" / "a.png")
