"""Every upload codec does what it declares, for any tensors, and what it would not write is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora import wire
from fedlora.core.factors import Tensors
from fedlora.core.seeding import torch_stream
from fedlora.errors import ConfigError, UpdateRefused
from fedlora.wire.upload import GROUP, LEVELS, UploadCodec, codec_named

every_codec = pytest.mark.parametrize("codec", wire.CODECS.values(), ids=list(wire.CODECS))
SHAPES = st.lists(st.sampled_from([(), (0,), (1,), (3, 5), (64,), (65,), (4, 48), (7, 19)]), max_size=3)


def normal(seed: int, name: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch_stream(seed, name))


@st.composite
def trainings(draw: st.DrawFn) -> tuple[Tensors, Tensors]:
    """What training began from, and what it made of that: changes from none to larger than the start."""
    seed, shapes = draw(st.integers(0, 2**20)), draw(SHAPES)
    moved = draw(st.sampled_from([0.0, 1e-12, 1e-4, 1.0, 30.0]))
    start = {f"layer.{i}.weight": normal(seed, f"start {i}", s, 1.0) for i, s in enumerate(shapes)}
    return start, {n: t + normal(seed, f"moved {n}", tuple(t.shape), moved) for n, t in start.items()}


def travelled(codec: UploadCodec, start: Tensors, trained: Tensors, seed: int = 0) -> Tensors:
    return codec.decode(start, codec.encode(start, trained, torch_stream(seed, "upload")))


@every_codec
@given(training=trainings(), seed=st.integers(0, 2**20))
def test_what_is_decoded_has_names_shapes_and_at_most_the_declared_error(
    codec: UploadCodec, training: tuple[Tensors, Tensors], seed: int
) -> None:
    start, trained = training
    decoded = travelled(codec, start, trained, seed)
    assert {n: t.shape for n, t in decoded.items()} == {n: t.shape for n, t in trained.items()}
    for name, tensor in trained.items():
        assert decoded[name].dtype == torch.float32
        if tensor.numel():
            told = tensor.double() - start[name].double() if codec.of_change else tensor.double()
            off = (decoded[name].double() - tensor.double()).abs().max()
            rounding = 2.0**-23 * float(tensor.abs().max()) if codec.of_change else 0.0
            assert off <= codec.error * float(told.abs().max()) * (1 + 1e-6) + rounding


@every_codec
def test_the_mean_over_seeds_is_what_was_trained_where_that_is_declared(codec: UploadCodec) -> None:
    start = {"w": normal(0, "start", (4, 40), 1.0)}
    trained = {"w": start["w"] + normal(0, "moved", (4, 40), 0.01)}
    draws = 4000
    mean = sum(travelled(codec, start, trained, seed)["w"].double() for seed in range(draws)) / draws
    off, unit = (mean - trained["w"].double()).abs(), 0.01 * 4
    if codec.unbiased:
        assert float(off.max()) < 5 * codec.error * unit / (2 * draws**0.5) + 2.0**-23 * 4
    else:
        assert float(off.max()) > 1e-4


@every_codec
@given(training=trainings())
def test_the_same_seed_writes_the_same_bits_and_inputs_keep_theirs(
    codec: UploadCodec, training: tuple[Tensors, Tensors]
) -> None:
    start, trained = training
    before = {n: t.clone() for n, t in [*start.items()]}, {n: t.clone() for n, t in trained.items()}
    one, two = (codec.encode(start, trained, torch_stream(7, "upload")) for _ in range(2))
    reordered = {name: trained[name] for name in reversed(trained)}
    three = codec.encode(start, reordered, torch_stream(7, "upload"))
    for other in (two, three):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for given_, kept in zip((start, trained), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in given_.items())


@every_codec
@pytest.mark.parametrize("packed", [False, True])
def test_a_large_tensor_takes_the_declared_bits_on_the_wire(codec: UploadCodec, packed: bool) -> None:
    start, trained = ({"w": normal(0, what, (96, 64), 1.0)} for what in ("start", "trained"))
    arrays = codec.encode(start, trained, torch_stream(0, "upload"))
    record = wire.to_record(arrays, None, packed=packed)
    assert wire.nbytes(record) * 8 == codec.bits * 96 * 64
    arrived = wire.from_record(record, coded=True)
    assert all(torch.equal(tensor, arrived[name]) for name, tensor in arrays.items())


@every_codec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_never_become_finite_ones(codec: UploadCodec, value: float) -> None:
    start = {"w": torch.ones(3, 70)}
    trained = {"w": torch.ones(3, 70)}
    trained["w"][1, 2] = value
    arrays = codec.encode(start, trained, torch_stream(0, "upload"))
    if codec.of_change:
        with pytest.raises(UpdateRefused, match="a scale is negative, a NaN or an infinity"):
            codec.decode(start, arrays)
    else:
        assert not torch.isfinite(codec.decode(start, arrays)["w"]).all()


@every_codec
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.int8, torch.float64])
def test_arrays_of_a_foreign_type_are_refused_in_one_line(codec: UploadCodec, kind: torch.dtype) -> None:
    arrays = codec.encode({"w": torch.ones(70)}, {"w": torch.ones(70)}, torch_stream(0, "upload"))
    for name in arrays:
        spoiled = {**arrays, name: torch.ones(arrays[name].shape).to(kind)}
        if spoiled[name].dtype == arrays[name].dtype or (kind.is_floating_point and not codec.of_change):
            continue
        with pytest.raises(UpdateRefused) as error:
            codec.decode({"w": torch.ones(70)}, spoiled)
        assert "\n" not in str(error.value)


def as_scales(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda arrays: arrays.update({"w/scale": make(arrays["w/scale"])})


SPOILED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (lambda a: a.pop("w/scale"), "scales are missing"),
    "fewer scales": (as_scales(lambda s: s[:1]), r"scales are float32 \(1,\), expected float32 \(2,\)"),
    "many scales": (as_scales(lambda s: s.repeat(10**6)), r"expected float32 \(2,\)"),
    "scales of another type": (as_scales(lambda s: s.double()), "scales are float64"),
    "a NaN": (as_scales(lambda s: s * torch.nan), "negative, a NaN or an infinity"),
    "an infinity": (as_scales(lambda s: s + torch.inf), "negative, a NaN or an infinity"),
    "a negative scale": (as_scales(lambda s: -s), "negative, a NaN or an infinity"),
    "out of range": (lambda a: a["w"].fill_(-128), f"a step is below -{LEVELS}"),
    "another shape": (
        lambda a: a.update({"w": a["w"].reshape(10, 7)}),
        r"w is int8 \(10, 7\)",
    ),
    "wider steps": (lambda a: a.update({"w": a["w"].long()}), "w is int64"),
    "an unknown tensor": (lambda a: a.update({"x": a["w"], "x/scale": a["w/scale"]}), "unknown tensor x"),
    "scales alone": (lambda a: a.pop("w"), "unknown tensor w/scale"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_int8_would_not_write_is_refused_in_one_line(how: str) -> None:
    spoil, words = SPOILED[how]
    start, trained = {"w": torch.zeros(70)}, {"w": torch.linspace(-1, 1, 70)}
    arrays = wire.CODECS["int8"].encode(start, trained, torch_stream(0, "upload"))
    spoil(arrays)
    with pytest.raises(UpdateRefused, match=words) as error:
        wire.CODECS["int8"].decode(start, arrays)
    assert "\n" not in str(error.value)


def test_a_huge_but_finite_change_stays_what_it_was() -> None:
    start, trained = {"w": torch.zeros(GROUP)}, {"w": torch.full((GROUP,), 3e38)}
    assert torch.isfinite(travelled(wire.CODECS["int8"], start, trained)["w"]).all()


def test_a_name_of_no_codec_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^upload = 'int4' \(did you mean int8\?\): accepted are float32, .*, int8$"
    ):
        codec_named("int4")
