"""The house: imports run downward, the control plane knows no torch, importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moeflow

PACKAGE = Path(moeflow.__file__).parent
# Lowest first; modules of one line may not import each other, those of one package may.
LAYERS = [
    {"errors", "progress"},
    {"files"},
    {"schema"},
    {"kernels", "quantization"},
    {"artifact", "probe"},
    {"offload"},
    {"model", "planning"},
    {"assembly", "cpu_calibration", "decoding", "sensitivity"},
    {"generation", "output_errors", "text"},
    {"choice", "engine"},
    {"bench", "pipeline", "recording"},
    {"calibration", "evaluation", "learning"},
    {"reporting"},
    {"console"},
    {"cli_load", "console_allocate", "console_explain", "console_hardware"},
    {
        "cli_allocate",
        "cli_bench",
        "cli_eval",
        "cli_explain",
        "cli_hardware",
        "cli_pack",
        "cli_plan",
        "cli_probe",
        "cli_simulate",
        "cli_trace",
        "cli_train",
    },
    {"cli"},
    {"__main__"},
]
TORCH_FREE = [
    "moeflow", "moeflow.cli", "moeflow.console", "moeflow.pipeline", "moeflow.schema", "moeflow.schema.kinds",
    "moeflow.planning.planner", "moeflow.planning.search", "moeflow.offload.policy", "moeflow.artifact.checkpoint",
    "moeflow.artifact.reader", "moeflow.artifact.layout", "moeflow.artifact.blueprint", "moeflow.artifact.synthetic",
    "moeflow.offload.routing", "moeflow.reporting.text", "moeflow.reporting.plot", "moeflow.probe.environment",
    "moeflow.probe.machine", "moeflow.probe.match", "moeflow.probe.nearest", "moeflow.probe.nvml",
    "moeflow.probe.rates", "moeflow.probe.estimate", "moeflow.cli_probe", "moeflow.console_hardware",
    "moeflow.planning.forecast", "moeflow.artifact.outline", "moeflow.planning.simulator", "moeflow.planning.shape",
    "moeflow.reporting.simulation", "moeflow.reporting.curves", "moeflow.artifact.shapes",
    "moeflow.planning.standin", "moeflow.choice",
    "moeflow.planning.explanation", "moeflow.cli_explain", "moeflow.console_explain",
    "moeflow.planning.least", "moeflow.planning.reasons", "moeflow.cli_plan", "moeflow.cli_trace", "moeflow.cli_train",
    "moeflow.reporting.predictor", "moeflow.planning.ranking", "moeflow.artifact.predictors",
    "moeflow.recording", "moeflow.planning.bits", "moeflow.planning.allocation", "moeflow.planning.blobs",
    "moeflow.cli_allocate", "moeflow.console_allocate", "moeflow.evaluation.windows", "moeflow.evaluation.texts",
    "moeflow.reporting.quality", "moeflow.reporting.tradeoff", "moeflow.cli_eval", "moeflow.evaluation.scores",
    "moeflow.reporting.tasks", "moeflow.planning.quotas", "moeflow.planning.fitting",
    "moeflow.kernels.library", "moeflow.kernels.cpp_build",
]  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def home(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts != ("__init__",) else "moeflow"


def rank(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def imports(path: Path) -> set[str]:
    """First-level moeflow modules that a file imports when it runs; those for type checking alone are left out."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moeflow"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("moeflow.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    own = home(path)
    if own == "moeflow":
        return
    for other in imports(path) - {own}:
        assert rank(other) < rank(own), f"{own} imports {other}"


def test_every_module_has_its_place() -> None:
    known = set().union(*LAYERS)
    assert {home(path) for path in MODULES} - {"moeflow"} == known


def test_the_control_plane_imports_no_torch() -> None:
    """In one process: the first module that does is named."""
    code = """if True:
        import importlib, sys
        for name in sys.argv[1:]:
            importlib.import_module(name)
            if heavy := {"torch", "transformers", "hqq"} & set(sys.modules):
                sys.exit(f"{name} imports {heavy}")
    """
    result = subprocess.run([sys.executable, "-c", code, *TORCH_FREE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_say_what_they_are_and_what_they_export(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no docstring"
    if path.name in ("__init__.py", "__main__.py"):
        return
    assignments = (n for n in tree.body if isinstance(n, ast.Assign))
    exported = next((ast.literal_eval(n.value) for n in assignments if ast.unparse(n.targets[0]) == "__all__"), None)
    assert exported is not None, "no __all__"
    defined = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    public = {name for name in defined if not name.startswith("_")}
    commands = public if path.name == "cli.py" else set()
    assert public - commands <= set(exported), "public names missing from __all__"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_the_lazy_names_are_all_there() -> None:
    for name in moeflow.__all__:
        assert getattr(moeflow, name) is not None
    with pytest.raises(AttributeError):
        moeflow.nothing  # noqa: B018
