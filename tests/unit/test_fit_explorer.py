"""The fit explorer against the tables of two studies, against sums written out here, and as it is driven."""

import pytest
import traitlets

from minillama4.course.widgets import fit_explorer
from minillama4.course.widgets.fit_explorer import BATCHES, ENDS, MODELS, FitExplorer, fit, shown
from minillama4.course.widgets.frame import png
from minillama4.roofline import budget

K, GIB = 2**10, 2**30
MEMORY = {"h100": 81_559 * 2**20, "h200": 143_771 * 2**20}
RESERVE, VISION = 3e9, 2 * 871_932_416  # bytes
INT4 = ("int4-meta", "int4-int8", "int4-head16", "int4")
TEXT = {  # GB of Scout's text weights, as the study prints them
    "bf16": 215.5, "fp8-mixed": 118.9, "int4-meta": 64.7, "int4-int8": 60.7, "int4-head16": 60.3, "int4": 58.8,
}  # fmt: skip


def scout_int4() -> float:
    """Bytes of Scout's text weights: attention, experts and head in 4.25 bits; embedding, norms, routers in 16."""
    packed = 3_019_898_880 + 96_636_764_160 + 6_039_797_760 + 1_034_485_760
    return packed * 4.25 / 8 + 2 * (1_034_485_760 + 496_640 + 3_932_160)


# ----------------------------------------------------------------------------------------------------------------------
# Bytes and the longest context


@pytest.mark.parametrize("dtype, gigabytes", TEXT.items())
def test_weights_apart_into_text_and_vision(dtype, gigabytes):
    seen = fit("scout", dtype, 1024)
    assert seen.text / 1e9 == pytest.approx(gigabytes, abs=0.05) and seen.vision == VISION
    assert seen.weights == seen.text + VISION


def test_scout_in_int4_on_one_h100_by_hand():
    seen = fit("scout", "int4", 131_072)
    free = MEMORY["h100"] - RESERVE - scout_int4() - VISION
    assert seen.text == pytest.approx(scout_int4(), abs=1) and seen.cache == 7.125 * GIB and seen.fits
    assert seen.needed == pytest.approx(scout_int4() + VISION + 7.125 * GIB + RESERVE, abs=1)
    assert seen.longest == (free // 4096 - 36 * 8192) // 12  # local layers are full long before
    assert fit("scout", "int4", 131_072, policy="full").longest == free // (48 * 4096)
    assert 300_000 < fit("scout", "int4-meta", 1024).longest < seen.longest < 425_000
    assert 81_000 < fit("scout", "int4-meta", 1024, policy="full").longest < 112_000


@pytest.mark.parametrize(
    "gpu, dtype, thousands",  # of tokens: bf16 KV, fp8 KV, bf16 KV with all layers full
    [
        ("h100", "int4-meta", (301, 626, 81)),
        ("h100", "int4-int8", (383, 791, 102)),
        ("h100", "int4", (422, 868, 112)),
        ("h200", "fp8-mixed", (526, 1076, 138)),
        ("h200", "int4", (1749, 3523, 443)),
    ],
)
def test_the_longest_context_of_the_table(gpu, dtype, thousands):
    ways = (("bf16", "chunk"), ("fp8", "chunk"), ("bf16", "full"))
    got = [fit("scout", dtype, 1024, 1, kv, way, gpu).longest / 1000 for kv, way in ways]
    # The table rounds the vision path up to 1.8 GB: about 2,300 tokens of fp8 cache that we have free.
    assert all(-0.5 <= tokens - table < 3.5 for tokens, table in zip(got, thousands, strict=True)), got


@pytest.mark.parametrize("policy", ENDS)
@pytest.mark.parametrize("model, dtype", [("scout", "int4"), ("llama-3.1-70b", "fp8"), ("llama-2-7b", "bf16")])
def test_the_longest_context_fits_and_one_token_more_does_not(model, dtype, policy):
    for batch in (1, 7):
        longest = fit(model, dtype, 1, batch, policy=policy).longest
        assert fit(model, dtype, longest, batch, policy=policy).fits
        assert not fit(model, dtype, longest + 1, batch, policy=policy).fits


def test_nothing_fits_where_the_weights_alone_are_too_large():
    for dtype in ("bf16", "fp8", "fp8-mixed"):
        assert fit("scout", dtype, 0).longest == 0 and not fit("scout", dtype, 0).fits
    for dtype in INT4:
        assert fit("scout", dtype, 0).fits and not fit("maverick", dtype, 0).fits
    assert fit("scout", "fp8", 0, gpu="h200").fits and not fit("scout", "bf16", 0, gpu="h200").fits


@pytest.mark.parametrize("model", MODELS.values())
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_as_the_budget_command_says(model, dtype):
    for gpu in MEMORY:
        told, seen = budget(model, dtype, 8192, gpu, 4, "fp8"), fit(model, dtype, 8192, 4, "fp8", gpu=gpu)
        assert (told["weights_bytes"], told["kv_bytes"]) == (seen.weights, seen.cache)
        assert (told["fits"], told["longest_context"]) == (seen.fits, seen.longest)


def test_a_batch_shares_the_memory_and_full_layers_cost_four_times():
    one, eight = fit("scout", "int4", 65_536), fit("scout", "int4", 65_536, 8)
    assert eight.cache == 8 * one.cache and eight.longest < one.longest / 8
    assert fit("scout", "int4", 65_536, policy="full").cache == 12 * GIB == 65_536 * 192 * K
    assert fit("llama-2-7b", "bf16", 4096).cache == fit("llama-2-7b", "bf16", 4096, policy="full").cache == 2 * GIB


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(model="scuot"), "unknown model 'scuot'; did you mean scout"),
        (dict(dtype="int3"), "unknown dtype 'int3'"),
        (dict(kv_dtype="int3"), "unknown KV dtype 'int3'"),
        (dict(policy="half"), "unknown policy 'half'"),
        (dict(gpu="a100"), "unknown GPU 'a100'; .*h100, h200"),
        (dict(context=-1), "context is -1"),
        (dict(batch=0), "batch is 0; it must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        shown(**arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Words and picture


def test_the_claim_is_taken_apart():
    text = shown().text
    for part in (
        "Llama 4 Scout on one H100 80 GB, weights in int4",
        "1 sequence of 131,072 tokens, local layers keep one chunk: fits.",
        "weights 60.52 GB (text 58.78 GB, vision 1.74 GB) + KV cache 7.65 GB (7.125 GiB, bf16) + 3 GB",
        "of 85.52 GB (79.6 GiB)",
        "tokens with one chunk in local layers; 111,889 if all layers keep everything.",
        "int4-meta 66.5 GB, int4-int8 62.4 GB, int4-head16 62.0 GB, int4 60.5 GB; not in bf16 217.3 GB",
        "Only int4 formats do.",
        "up to 10,485,760 tokens: for one such sequence 481.125 GiB (516.6 GB) of KV cache, and 7 H100",
    ):
        assert part in text
    assert "Only int4" not in shown(gpu="h200").text and "not in bf16 217.3 GB." in shown(gpu="h200").text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(context=2**20), "does not fit, a shorter context would fit; weights and cache take 2 H100"),
        (dict(dtype="bf16"), "does not fit, no context would fit; weights and cache take 3 H100"),
        (dict(dtype="bf16"), "none, since weights and reserve leave no room for a token"),
        (dict(model="behemoth-estimate"), '"Fits on a single card" holds in no format here'),
        (dict(model="behemoth-estimate"), "Meta published no shape"),
        (dict(model="llama-2-7b"), "in every format."),
        (dict(model="llama-2-7b"), "No layer is local, so all keep everything."),
        (dict(model="llama-2-7b"), "up to 4,096 tokens: for one such sequence 2 GiB (2.1 GB)"),
        (dict(batch=4), "4 sequences of 131,072"),
        (dict(batch=4), "Longest context that fits for each of 4 sequences"),
        (dict(model="maverick", gpu="h200"), "up to 1,048,576 tokens: for one such sequence 49.125 GiB"),
    ],
)
def test_what_it_says(arguments, said):
    text = shown(**arguments).text
    assert said in text
    assert ("released for" in text) == (arguments.get("model") != "behemoth-estimate")  # of which nothing is published


def test_bars_and_points_are_the_numbers():
    bars, ends = shown(context=65_536, batch=2).picture.axes
    every = [fit("scout", dtype, 65_536, 2) for dtype in fit_explorer.FORMATS]
    widths = [[bar.get_width() * 1e9 for bar in part] for part in bars.containers]
    wanted = [[each.weights for each in every], [each.cache for each in every], [RESERVE] * 7]
    assert widths == [pytest.approx(part) for part in wanted]
    said = [label.get_text() for label in bars.texts]
    assert said == [f"{each.needed / 1e9:,.0f}, {'fits' if each.fits else 'no'}" for each in every]
    (line,) = bars.lines
    assert list(line.get_xdata()) == [MEMORY["h100"] / 1e9] * 2
    points = {each.get_label(): each.get_xydata().tolist() for each in ends.lines}
    assert points["local: one chunk"] == [[each.longest, row] for row, each in enumerate(every) if each.longest]
    full = [fit("scout", dtype, 65_536, 2, policy="full").longest for dtype in INT4]
    assert points["all full"] == [[tokens, row] for row, tokens in enumerate(full, start=3)]
    assert [label.get_text() for label in bars.get_yticklabels()][-1] == "▸ int4"
    none = [label for label in ends.texts if label.get_text() == "fits at no context"]
    assert [label.get_position()[1] for label in none] == [0, 1, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(policy="full", gpu="h200", kv_dtype="fp8", context=10_485_760, batch=BATCHES[-1]),
        dict(model="behemoth-estimate", dtype="int4-head16"),
        dict(model="llama-3.1-70b", batch=BATCHES[-1]),
        dict(model="llama-2-7b", kv_dtype="fp8", gpu="h200"),
    ],
)
def test_the_picture_is_described_and_nothing_is_cut(arguments):
    seen = shown(**arguments)
    figure = seen.picture
    assert seen.text.splitlines()[0] in seen.alt and "\n" not in seen.alt and png(figure)[1] <= 900
    for axes in figure.axes:
        box, legend = axes.get_tightbbox(), axes.get_legend().get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert axes.bbox.x0 <= legend.x0 and legend.x1 <= axes.bbox.x1
        words = [label.get_window_extent() for label in axes.texts]
        assert all(axes.bbox.x0 <= each.x0 and each.x1 <= axes.bbox.x1 and each.y1 < legend.y0 for each in words)
        points = [axes.transData.transform(line.get_xydata()) for line in axes.lines if len(line.get_xydata())]
        assert all(y < legend.y0 for line in points for _, y in line)
    bars, ends = figure.axes
    assert bars.get_tightbbox().x1 < ends.get_tightbbox().x0


# ----------------------------------------------------------------------------------------------------------------------
# The widget


def test_every_control_changes_what_it_says_and_draws():
    widget = FitExplorer()
    said, drawn = {widget.says()}, {widget.picture.value}
    moves = dict(context=2**20, policy="full", kv_dtype="fp8", dtype="int4-meta", batch=2, gpu="h200", model="maverick")
    assert set(moves) == set(widget.controls)
    for number, (name, value) in enumerate(moves.items(), start=2):
        said.add(widget.drive(**{name: value}))
        drawn.add(widget.picture.value)
        assert len(said) == len(drawn) == number, name
    with pytest.raises(traitlets.TraitError):
        widget.drive(batch=3)


def test_every_model_is_shown():
    widget = FitExplorer()
    for label, model in MODELS.items():
        assert widget.drive(model=model).startswith(f"{label} on one H100")
