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
from fedlora.wire.sparse import BLOCK, LEVELS, SEGMENTS
from fedlora.wire.steps import GROUP
from fedlora.wire.upload import UploadCodec, codec_named, with_owed

ANY_CHANGE = {name: codec for name, codec in wire.CODECS.items() if not codec.of_steps}
"""All but the one that writes down nothing but forward-only steps (`tests.wire.test_seeds`)."""
every_codec = pytest.mark.parametrize("codec", ANY_CHANGE.values(), ids=list(ANY_CHANGE))
with_feedback = pytest.mark.parametrize("codec", [c for c in wire.CODECS.values() if c.feedback])
SIZES = [(), (0,), (1,), (3, 5), (64,), (65,), (4, 48), (7, 19), (16, 16), (9, 64)]
SHAPES = st.lists(st.sampled_from(SIZES), max_size=3)


def normal(seed: int, name: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch_stream(seed, name))


@st.composite
def trainings(draw: st.DrawFn) -> tuple[Tensors, Tensors]:
    """What training began from, and what it made of that: changes from none to larger than the start."""
    seed, shapes = draw(st.integers(0, 2**20)), draw(SHAPES)
    moved = draw(st.sampled_from([0.0, 1e-12, 1e-4, 1.0, 30.0]))
    kind, stays = draw(st.sampled_from(["weight", "lora_A.weight", "lora_B.weight"])), draw(st.booleans())
    start = {f"layer.{i}.{kind}": normal(seed, f"start {i}", s, 1.0) for i, s in enumerate(shapes)}
    trained = {n: t + normal(seed, f"moved {n}", tuple(t.shape), moved) for n, t in start.items()}
    for name, tensor in trained.items():
        if stays and tensor.ndim == 2:  # every second row, or column
            axis = 1 if kind.startswith("lora_B") else 0
            still = torch.arange(0, tensor.shape[axis], 2)
            tensor.index_copy_(axis, still, start[name].index_select(axis, still))
    return start, trained


def travelled(codec: UploadCodec, start: Tensors, trained: Tensors, seed: int = 0, turn: int = 0) -> Tensors:
    return codec.decode(start, codec.encode(start, trained, torch_stream(seed, "upload"), turn))


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
    elif not codec.feedback:
        assert float(off.max()) > 1e-4


@every_codec
@given(training=trainings())
def test_the_same_seed_writes_the_same_bits_and_inputs_keep_theirs(
    codec: UploadCodec, training: tuple[Tensors, Tensors]
) -> None:
    start, trained = training
    before = {n: t.clone() for n, t in [*start.items()]}, {n: t.clone() for n, t in trained.items()}
    one, two = (codec.encode(start, trained, torch_stream(7, "upload"), 5) for _ in range(2))
    reordered = {name: trained[name] for name in reversed(trained)}
    three = codec.encode(start, reordered, torch_stream(7, "upload"), 5)
    for other in (two, three):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for given_, kept in zip((start, trained), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in given_.items())


@every_codec
@pytest.mark.parametrize("packed", [False, True])
def test_a_large_tensor_takes_the_declared_bits_on_the_wire(codec: UploadCodec, packed: bool) -> None:
    start, trained = ({"w": normal(0, what, (96, 64), 1.0)} for what in ("start", "trained"))
    arrays = codec.encode(start, trained, torch_stream(0, "upload"), 0)
    record = wire.to_record(arrays, None, packed=packed)
    assert wire.nbytes(record) == codec.most_bytes(trained, 0, 1)
    arrived = wire.from_record(record, coded=True)
    assert all(torch.equal(tensor, arrived[name]) for name, tensor in arrays.items())


@every_codec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_never_become_finite_ones(codec: UploadCodec, value: float) -> None:
    start = {"w": torch.ones(3, 70)}
    trained = {"w": torch.ones(3, 70)}
    trained["w"][1, 2] = value
    arrays = codec.encode(start, trained, torch_stream(0, "upload"), 0)
    if codec.of_change:
        with pytest.raises(UpdateRefused, match="a scale is negative, a NaN or an infinity"):
            codec.decode(start, arrays)
    else:
        assert not torch.isfinite(codec.decode(start, arrays)["w"]).all()


@every_codec
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.int8, torch.float64])
def test_arrays_of_a_foreign_type_are_refused_in_one_line(codec: UploadCodec, kind: torch.dtype) -> None:
    arrays = codec.encode({"w": torch.ones(70)}, {"w": torch.ones(70)}, torch_stream(0, "upload"), 0)
    for name in arrays:
        spoiled = {**arrays, name: torch.ones(arrays[name].shape).to(kind)}
        if spoiled[name].dtype == arrays[name].dtype or (kind.is_floating_point and not codec.of_change):
            continue
        with pytest.raises(UpdateRefused) as error:
            codec.decode({"w": torch.ones(70)}, spoiled)
        assert "\n" not in str(error.value)


def as_scales(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda arrays: arrays.update({"w/scale": make(arrays["w/scale"])})


def replaced(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda arrays: arrays.update({key: make(arrays[key])})


SPOILED: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no scales": ("int8", lambda a: a.pop("w/scale"), "scales are missing"),
    "fewer scales": ("int8", as_scales(lambda s: s[:1]), r"float32 \(1,\), expected float32 \(5,\)"),
    "many scales": ("int8", as_scales(lambda s: s.repeat(10**6)), r"expected float32 \(5,\)"),
    "scales of another type": ("int8", as_scales(lambda s: s.double()), "scales are float64"),
    "a NaN": ("int8", as_scales(lambda s: s * torch.nan), "negative, a NaN or an infinity"),
    "an infinity": ("int8", as_scales(lambda s: s + torch.inf), "negative, a NaN or an infinity"),
    "a negative scale": ("int8", as_scales(lambda s: -s), "negative, a NaN or an infinity"),
    "out of range": ("int8", lambda a: a["w"].fill_(-128), f"a step is below -{LEVELS}"),
    "another shape": ("int8", replaced("w", lambda w: w.reshape(10, 30)), r"w is int8 \(10, 30\)"),
    "wider steps": ("int8", replaced("w", lambda w: w.long()), "w is int64"),
    "an unknown tensor": (
        "int8",
        lambda a: a.update({"x": a["w"], "x/scale": a["w/scale"]}),
        "unknown tensor x",
    ),
    "scales alone": ("int8", lambda a: a.pop("w"), "unknown tensor w/scale"),
    "half a byte too many": ("int4", lambda a: a["w"].fill_(255), "a step is above 7"),
    "fewer pairs": ("int4", replaced("w", lambda w: w[:-1]), r"w is uint8 \(149,\), expected uint8 \(150,\)"),
    "steps of 8 bits": ("int4", replaced("w", lambda w: w.to(torch.int8)), "w is int8"),
    "no places": ("topk", lambda a: a.pop("w/place"), "w/place is missing"),
    "places twice": ("topk", lambda a: a["w/place"].fill_(3), "w: its places do not rise"),
    "fewer places": ("topk", replaced("w/place", lambda p: p[:1]), r"w/place is uint8 \(1, 16\)"),
    "a whole tensor": ("topk", replaced("w", lambda w: torch.ones(300).to(w.dtype)), r"w is int8 \(300,\)"),
    "no segment": ("segments", lambda a: a.pop("w/segment"), "w/segment is missing"),
    "a fifth segment": ("segments", lambda a: a["w/segment"].fill_(4), "its segment is 4, there are 0 to 3"),
    "a longer segment": ("segments", replaced("w", lambda w: w.repeat(2)), r"w is int8 \(150,\)"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_a_codec_would_not_write_is_refused_in_one_line(how: str) -> None:
    name, spoil, words = SPOILED[how]
    start, trained = {"w": torch.zeros(300)}, {"w": torch.linspace(-1, 1, 300)}
    arrays = wire.CODECS[name].encode(start, trained, torch_stream(0, "upload"), 0)
    spoil(arrays)
    with pytest.raises(UpdateRefused, match=words) as error:
        wire.CODECS[name].decode(start, arrays)
    assert "\n" not in str(error.value)


@every_codec
@given(training=trainings(), turn=st.integers(0, 9))
def test_no_tensor_takes_more_bytes_than_declared(
    codec: UploadCodec, training: tuple[Tensors, Tensors], turn: int
) -> None:
    start, trained = training
    arrays = codec.encode(start, trained, torch_stream(0, "upload"), turn)
    assert wire.nbytes(wire.to_record(arrays, None)) <= codec.most_bytes(trained, 0, 1)


@every_codec
def test_a_codec_is_unbiased_or_has_feedback_or_rounds_each_number(codec: UploadCodec) -> None:
    assert codec.unbiased or codec.feedback or not codec.of_change


@with_feedback
def test_feedback_loses_nothing_and_owes_no_more_than_some_rounds(codec: UploadCodec) -> None:
    """Over rounds what arrived is what was trained less what is owed, which stays bounded."""
    start = {"w": torch.zeros(12, 64), "small": torch.zeros(5)}
    owed: Tensors = {}
    arrived, whole = ({n: torch.zeros_like(t) for n, t in start.items()} for _ in range(2))
    norms = []
    for turn in range(60):
        change = {n: normal(turn, n, tuple(t.shape), 1.0) for n, t in start.items()}
        trained = with_owed(change, owed)
        told = travelled(codec, start, trained, seed=turn, turn=turn)
        owed = {n: t - told[n] for n, t in trained.items()}
        arrived = {n: arrived[n] + told[n] for n in start}
        whole = {n: whole[n] + change[n] for n in start}
        norms.append(float(owed["w"].norm()))
    for name in start:
        assert torch.allclose(arrived[name], whole[name] - owed[name], atol=1e-4)
    assert max(norms[30:]) < 1.5 * max(norms[:30])
    assert float(whole["w"].norm()) > 3 * norms[0]


@given(seed=st.integers(0, 2**20), spread=st.sampled_from([0.0, 1.0, 4.0]), blocks=st.integers(1, 9))
def test_the_largest_entries_take_their_part_of_the_square(seed: int, spread: float, blocks: int) -> None:
    change = (
        normal(seed, "change", (blocks, BLOCK), 1.0)
        * (spread * normal(seed, "spread", (1, BLOCK), 1.0)).exp()
    )
    start = {"w": torch.zeros(blocks, BLOCK)}
    told = travelled(wire.CODECS["topk"], start, {"w": change}, seed)["w"]
    assert float((change - told).square().sum()) < 0.942 * float(change.square().sum())
    assert int((told != 0).sum()) <= blocks * 16
    kept = told != 0
    for row, chosen in zip(change.abs(), kept, strict=True):
        assert not chosen.any() or float(row[chosen].min()) >= float(row.sort(descending=True).values[15])


def test_in_as_many_turns_as_segments_everything_has_travelled_once() -> None:
    codec, start = wire.CODECS["segments"], {"w": torch.zeros(7, 33)}
    change = {"w": normal(0, "change", (7, 33), 1.0)}
    told = [travelled(codec, start, change, turn=turn)["w"] for turn in range(SEGMENTS)]
    assert max(float(t) for t in sum((t != 0).int() for t in told).flatten()) == 1  # type: ignore[union-attr]
    assert torch.allclose(
        sum(told, torch.zeros(7, 33)), change["w"], atol=float(change["w"].abs().max()) / LEVELS
    )
    assert torch.equal(travelled(codec, start, change, turn=SEGMENTS)["w"], told[0])


def test_a_huge_but_finite_change_stays_what_it_was() -> None:
    start, trained = {"w": torch.zeros(GROUP)}, {"w": torch.full((GROUP,), 3e38)}
    assert torch.isfinite(travelled(wire.CODECS["int8"], start, trained)["w"]).all()


def test_a_name_of_no_codec_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^upload = .int2. .*: accepted are float32, .*, topk, segments, changed, seeds$",
    ):
        codec_named("int2")
