"""The documents that stages take and return, as frozen pydantic models. Imports no torch."""

from moeflow.schema.auto import AutoBits
from moeflow.schema.base import Document, Part
from moeflow.schema.benchmark import Benchmark, BenchmarkRow, Environment, Limits
from moeflow.schema.choice import BitChoice
from moeflow.schema.evaluation import (
    Divergence,
    Evaluated,
    Evaluation,
    Measured,
    TaskEvaluation,
    TaskProtocol,
    TaskScore,
    TasksDone,
    TextProtocol,
)
from moeflow.schema.hardware import Cpu, Disk, Gpu, HardwareProfile, Probed
from moeflow.schema.kernels import CpuKernels, JointRates, Kernels, Product
from moeflow.schema.link import BusState, Link, LinkPoint, Pcie
from moeflow.schema.manifest import (
    BlobLayout,
    ExpertLayer,
    Manifest,
    ModelFacts,
    PackedMatrix,
    ResidentMatrix,
    Segment,
    Shard,
)
from moeflow.schema.plan import DecodeTime, MemoryBudget, Plan, PlannedCpu, PlannedPrefetch, Prediction, PrefillTime
from moeflow.schema.predictor import PredictorCard, Recall, ReuseHits
from moeflow.schema.profile import Cache, CpuUse, Memory, Prefetch, Profile
from moeflow.schema.quantization import (
    BitsAndBytesScheme,
    DenseScheme,
    HqqScheme,
    Override,
    Quantization,
    ResidentRole,
    Scheme,
)
from moeflow.schema.sensitivity import LayerErrors, MeasuredText, Sensitivity
from moeflow.schema.simulation import Guessing, SimulatedRow, Simulation, Timing

__all__ = [
    "AutoBits",
    "Benchmark",
    "BenchmarkRow",
    "BitChoice",
    "BitsAndBytesScheme",
    "BlobLayout",
    "BusState",
    "Cache",
    "Cpu",
    "CpuKernels",
    "CpuUse",
    "DecodeTime",
    "DenseScheme",
    "Disk",
    "Divergence",
    "Document",
    "Environment",
    "Evaluated",
    "Evaluation",
    "ExpertLayer",
    "Gpu",
    "Guessing",
    "HardwareProfile",
    "HqqScheme",
    "JointRates",
    "Kernels",
    "LayerErrors",
    "Limits",
    "Link",
    "LinkPoint",
    "Manifest",
    "Measured",
    "MeasuredText",
    "Memory",
    "MemoryBudget",
    "ModelFacts",
    "Override",
    "PackedMatrix",
    "Part",
    "Pcie",
    "Plan",
    "PlannedCpu",
    "PlannedPrefetch",
    "Prediction",
    "PredictorCard",
    "Prefetch",
    "PrefillTime",
    "Probed",
    "Product",
    "Profile",
    "Quantization",
    "Recall",
    "ResidentMatrix",
    "ResidentRole",
    "ReuseHits",
    "Scheme",
    "Segment",
    "Sensitivity",
    "Shard",
    "SimulatedRow",
    "Simulation",
    "TaskEvaluation",
    "TaskProtocol",
    "TaskScore",
    "TasksDone",
    "TextProtocol",
    "Timing",
]
