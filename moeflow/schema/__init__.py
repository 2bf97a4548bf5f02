"""The documents that stages take and return, as frozen pydantic models. Imports no torch."""

from moeflow.schema.auto import AutoBits
from moeflow.schema.base import Document, Part
from moeflow.schema.benchmark import Benchmark, BenchmarkRow, Environment, Limits
from moeflow.schema.choice import BitChoice
from moeflow.schema.evaluation import Divergence, Evaluated, Evaluation, TextProtocol
from moeflow.schema.hardware import Cpu, Disk, Gpu, HardwareProfile, Probed
from moeflow.schema.kernels import Kernels, Product
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
from moeflow.schema.plan import DecodeTime, MemoryBudget, Plan, PlannedPrefetch, Prediction, PrefillTime
from moeflow.schema.profile import Cache, Memory, Prefetch, Profile
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
    "DenseScheme",
    "DecodeTime",
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
    "Kernels",
    "LayerErrors",
    "Limits",
    "Link",
    "LinkPoint",
    "Manifest",
    "MeasuredText",
    "Memory",
    "MemoryBudget",
    "ModelFacts",
    "Override",
    "PackedMatrix",
    "Part",
    "Pcie",
    "Plan",
    "PlannedPrefetch",
    "Prediction",
    "PrefillTime",
    "Product",
    "Prefetch",
    "Probed",
    "Profile",
    "Quantization",
    "ResidentMatrix",
    "ResidentRole",
    "Scheme",
    "Segment",
    "Sensitivity",
    "Shard",
    "SimulatedRow",
    "Simulation",
    "TextProtocol",
    "Timing",
]
