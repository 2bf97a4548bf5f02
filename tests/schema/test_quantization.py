"""Schemes: what they say of themselves, and what stands in documents."""

from __future__ import annotations

import pytest

from moeflow.schema import BitsAndBytesScheme, DenseScheme, HqqScheme, Profile, Quantization, Scheme

SCHEMES: list[tuple[Scheme, dict[str, object], str]] = [
    (HqqScheme(bits=2, group_size=16), {"backend": "hqq", "bits": 2, "group_size": 16}, "2-bit g16"),
    (
        HqqScheme(bits=2, group_size=16, metadata_bits=8),
        {"backend": "hqq", "bits": 2, "group_size": 16, "metadata_bits": 8},
        "2-bit g16 meta8",
    ),
    (BitsAndBytesScheme(format="nf4"), {"backend": "bitsandbytes", "format": "nf4"}, "nf4"),
    (BitsAndBytesScheme(format="int8"), {"backend": "bitsandbytes", "format": "int8"}, "int8"),
    (DenseScheme(), {"backend": "none"}, "unquantized"),
]


@pytest.mark.parametrize(("scheme", "written", "label"), SCHEMES, ids=[label for *_, label in SCHEMES])
def test_a_scheme_comes_back_from_a_document(scheme: Scheme, written: dict[str, object], label: str) -> None:
    profile = Profile(model="demo", quantization=Quantization(experts=scheme, attention=scheme))
    assert profile.to_dict()["quantization"] == {"experts": written, "attention": written}
    assert Profile.parse(profile.to_dict(), "p") == profile
    assert scheme.label == label


def test_sixteen_bit_metadata_said_or_left_out_is_one_document() -> None:
    """Documents from before there was a choice keep their digests, which key caches and finished shards."""
    said = {"experts": {"backend": "hqq", "metadata_bits": 16}}
    assert Profile.parse({"model": "demo", "quantization": said}, "p").digest() == Profile(model="demo").digest()
    other = {"experts": {"backend": "hqq", "metadata_bits": 8}}
    assert Profile.parse({"model": "demo", "quantization": other}, "p").digest() != Profile(model="demo").digest()


def test_bitsandbytes_says_what_its_formats_fix() -> None:
    nf4, int8 = (BitsAndBytesScheme(format=form) for form in ("nf4", "int8"))
    assert (nf4.bits, nf4.group_size) == (4, 64)
    assert (int8.bits, int8.group_size) == (8, None)
