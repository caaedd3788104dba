"""Fused neighborhood, halo and window attention against the references: on a GPU, else in Triton's interpreter."""

import pytest
import torch
import visattn_kernels as vk
from hypothesis import HealthCheck, given, settings
from neighborhood_cases import FULL, call, gradients, make, problems
from poison import poisoned_memory

pytest.importorskip("triton")

from visattn_kernels.neighborhood import triton_bias, triton_bias_gradient, triton_bwd, triton_position
from visattn_kernels.neighborhood.triton_tiling import Windows, key_tiling, query_tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def results(f, tensors, backend, dtype):
    """Outputs and gradients of all tensors for a fixed cotangent."""
    leaves = {name: x.to(DEVICE, dtype).detach().requires_grad_() for name, x in tensors.items()}
    outputs = f(leaves, backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [x.detach() for x in outputs], gradients([x.double() for x in outputs], list(leaves.values()))


def check(f, tensors, bound=5e-5):
    with poisoned_memory():
        actual = results(f, tensors, "triton", torch.float32)
    expected = results(f, tensors, "reference", torch.float64)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]]):
        torch.testing.assert_close(a.double(), e, rtol=bound, atol=bound)


# --- neighborhood attention ------------------------------------------------------------------------------------------

PLAIN = {
    **FULL, "grid": (6, 7), "dims": (8, 8), "heads": (2, 2), "bias": False, "extra": None, "padded": False
}  # fmt: skip
ONE_HEAD = {"bias": True, "B": 1, "heads": (1, 1)}
CASES = {
    "several boxes": {"grid": (9, 19), "B": 1, "geometry": ([3, 5], [1, 1], [1, 1], [False, False])},
    "a long row": {"grid": (150,), "B": 1, "heads": (1, 1), "geometry": ([70], [1], [1], [False])},
    "blocks that move by blocks": {"grid": (11, 13), "B": 1, "geometry": ([4, 5], [2, 3], [1, 1], [False, False])},
    "blocks": {"grid": (8, 9), "B": 1, "geometry": ([4, 3], [4, 3], [1, 1], [False, False])},
    "the whole map": {"grid": (5, 6), "geometry": ([5, 6], [1, 1], [1, 1], [False, False])},
    "groups of unequal size": {"grid": (11, 8), "B": 1, "geometry": ([3, 2], [1, 1], [3, 2], [False, False])},
    "causal": {"grid": (7, 8), "B": 1, "geometry": ([4, 3], [2, 1], [1, 2], [True, True])},
    "three axes": {"grid": (3, 4, 5), "B": 1, "geometry": ([3, 2, 3], [1, 1, 2], [1, 2, 1], [True, False, False])},
    "shared keys, wide heads": {"B": 1, "heads": (4, 2), "dims": (96, 72)},
    "biases": {"bias": True, "grid": (6, 9), "geometry": ([3, 4], [1, 2], [2, 1], [False, False])},
    "biases of several boxes": {**ONE_HEAD, "grid": (5, 37), "geometry": ([3, 5], [1, 1], [1, 1], [False, False])},
    "biases of unequal groups": {
        "bias": True,
        "B": 1,
        "grid": (3, 25),
        "geometry": ([2, 5], [1, 1], [1, 2], [False, False]),
    },
    "sums of biases": {**ONE_HEAD, "B": 2, "grid": (7, 19), "geometry": ([3, 5], [1, 1], [1, 2], [False, False])},
    "sums of biases, boxes of no query": {
        **ONE_HEAD,
        "grid": (9, 17),
        "geometry": ([3, 5], [1, 1], [2, 2], [False, False]),
    },
    "sums of biases, wide": {**ONE_HEAD, "grid": (9, 13), "geometry": ([3, 12], [1, 1], [1, 1], [False, False])},
    "sums of biases, causal": {**ONE_HEAD, "grid": (9, 11), "geometry": ([4, 9], [2, 1], [1, 1], [True, True])},
    "biases, causal": {"bias": True, "B": 1, "grid": (4, 13), "geometry": ([4, 6], [2, 3], [1, 1], [False, True])},
    "padding": {"padded": True, "bias": True, "grid": (3, 7), "geometry": ([3, 5], [1, 1], [2, 2], [False, False])},
    "additional keys": {"extra": 20, "B": 1, "grid": (3, 4), "geometry": ([3, 3], [2, 1], [1, 1], [False, False])},
    "no additional key": {"extra": 0, "B": 1},
    "all options": {"heads": (4, 2), "bias": True, "extra": 2, "padded": True},
    "one token": {"grid": (1, 1), "geometry": ([1, 1], [1, 1], [1, 1], [False, False])},
    "empty batch": {"B": 0, "bias": True, "extra": 2, "padded": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_neighborhood_equals_the_reference(case):
    problem = {**PLAIN, **case}
    check(lambda x, backend: call(x, problem["geometry"], backend), make(problem))


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_any_neighborhood_equals_the_reference(problem):
    check(lambda x, backend: call(x, problem["geometry"], backend), make(problem))


def test_gradient_without_that_of_the_log_sum_exp():
    problem = {**PLAIN, "B": 1}
    check(lambda x, backend: call(x, problem["geometry"], backend, return_lse=False), make(problem))


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("length", [7, 40, 61, 130])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "causal"), [(7, 1, 1, False), (6, 3, 1, False), (5, 2, 3, True)]
)
def test_boxes_of_a_kind_meet_the_same_biases(kernel, stride, dilation, causal, length, of_keys):
    windows = Windows(
        (1, 1, kernel), (1, 1, stride), (1,) * 3, (0,) * 3, (1, 1, dilation), (False, False, causal), True, False, 1
    )
    grid = (1, 1, length)
    way = key_tiling(grid, windows, 16, 2, True) if of_keys else query_tiling(grid, grid, windows, 16, 2)
    left, right, whole, kinds, _ = triton_bias.kinds_of_boxes(length, length, windows, way, of_keys)
    tiles, size = way.tiles[2], way.box[2]
    found: dict[int, object] = {}
    for group in range(min(length, dilation)):
        members = -(-(length - group) // dilation)
        for i in range(tiles):
            kind = min(i, left) + max(i - (tiles - 1 - right), 0) + (left + 1 + right if group >= whole else 0)
            assert kind < kinds
            box = triton_bias._box(i * size, size, members, max(members, kernel), windows, of_keys)
            assert found.setdefault(kind, box) == box


@pytest.mark.parametrize(("grid", "image"), [((3, 4), 3 * 4 * 9), ((5, 6), 2 * (5 + 3) * 8 * 16)], ids=["all", "sums"])
def test_gradient_of_biases_some_images_at_a_time(monkeypatch, grid, image):
    """`image`: gradients of its logits per head, or their sums: two boxes of five rows of keys."""
    geometry = ([3, 3], [1, 1], [1, 1], [False, False])
    x = make({**PLAIN, **ONE_HEAD, "B": 3, "grid": grid, "geometry": geometry})
    monkeypatch.setattr(triton_bias_gradient, "MOST_BYTES", 2 * image * 4)
    turns, count = [], triton_bwd._images_at_a_time
    monkeypatch.setattr(triton_bwd, "_images_at_a_time", lambda *args: turns.append(count(*args)) or turns[-1])
    check(lambda y, backend: call(y, geometry, backend), x)
    assert turns == [2, 2, 1]  # the whole, and both turns


def test_gradient_of_biases_with_wide_offsets(monkeypatch):
    geometry = ([3, 2], [1, 1], [1, 1], [False, False])
    monkeypatch.setattr(triton_bias_gradient, "FAR", 1)
    check(
        lambda y, backend: call(y, geometry, backend),
        make({**PLAIN, "B": 1, "grid": (4, 5), "bias": True, "geometry": geometry}),
    )


def test_strided_maps_and_cotangents():
    problem = {**PLAIN, "B": 1}
    wide = {name: torch.stack([x, x], dim=-2).flatten(-3, -2) for name, x in make(problem).items()}

    def run(x, backend):
        halves = {name: t[..., ::2, :] for name, t in x.items()}
        assert not halves["q"].is_contiguous()
        return call(halves, problem["geometry"], backend, return_lse=False).transpose(1, 2).contiguous()

    check(run, wide)


def test_twice_equal():
    geometry = ([3, 3], [1, 1], [1, 2], [False, False])
    x = make({**FULL, "B": 1, "grid": (4, 6), "geometry": geometry})
    first, second = (
        results(lambda y, backend: call(y, geometry, backend), x, "triton", torch.float32) for _ in range(2)
    )
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]]):
        assert torch.equal(a, b)


def test_error_in_half_precision():
    """Against float64 at most twice (gradients: three times) that of plain torch in the same precision."""
    problem = {**PLAIN, "bias": True, "B": 1, "dims": (16, 16)}
    x = {name: t.half().double() for name, t in make(problem).items()}

    def run(tensors, backend):
        return call(tensors, problem["geometry"], backend, return_lse=False)

    def flat(backend, dtype):
        outputs, grads = results(run, x, backend, dtype)
        return [t.double() for t in (*outputs, *grads)]

    exact, plain, fused = (flat(*way) for way in (
        ("reference", torch.float64), ("reference", torch.float16), ("triton", torch.float16)
    ))  # fmt: skip
    for i, (e, p, f) in enumerate(zip(exact, plain, fused)):
        assert (f - e).norm() <= (3 if i else 2) * (p - e).norm() + 1e-6


# --- window and halo attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "window", "heads", "dims", "pads"),
    [
        ((8, 8), 4, 2, (8, 8), ()),
        ((7, 9), (3, 4), 1, (12, 20), ("pad_k", "pad_v")),
        ((3, 5), 4, 2, (8, 8), ("pad_v",)),
        ((3, 5), 4, 1, (8, 8), ()),
        ((5, 4), 1, 1, (8, 8), ("pad_k", "pad_v")),
    ],
)
def test_windows_equal_the_reference(grid, window, heads, dims, pads):
    torch.manual_seed(0)
    x = {name: torch.randn(2, *grid, heads, dims[name == "v"], dtype=torch.float64) for name in "qkv"}
    x |= {name: torch.randn(heads, dims[name == "pad_v"], dtype=torch.float64) for name in pads}
    check(lambda t, backend: vk.window_attention(**t, window_size=window, backend=backend), x)


@pytest.mark.parametrize(
    ("grid", "block", "halo", "share", "options"),
    [
        ((8, 8), 4, 1, 1, {}),
        ((7, 5), 4, 1, 2, {"mask_outside": True}),
        ((7, 6), 4, 2, 2, {"stride": 2}),
        ((5, 4), 2, 1, 1, {"stride": 2, "pixel_offsets": False}),
        ((5, 4), 3, 0, 1, {}),
        ((4, 4), 8, 3, 1, {"mask_outside": True}),
        ((3, 4), 3, 7, 1, {}),  # more than 16 places
    ],
)
def test_halo_equals_the_reference(grid, block, halo, options, share):
    torch.manual_seed(0)
    stride, entries = options.get("stride", 1), 2 * (block + 2 * halo) - 1
    shapes = {
        "q": (1, -(-grid[0] // stride), -(-grid[1] // stride), 2, 8),
        "k": (1, *grid, 2, 8),
        "v": (1, *grid, 2, 12),
    }
    shapes |= {"height_rel": (entries, 8 // share), "width_rel": (entries, 8 // share)}
    x = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    check(
        lambda t, backend: vk.halo_attention(**t, block_size=block, halo_size=halo, backend=backend, **options), x
    )  # fmt: skip


def test_halo_some_images_at_a_time(monkeypatch):
    torch.manual_seed(0)
    x = {name: torch.randn(3, 2, 2, 1, 8, dtype=torch.float64) for name in "qkv"}
    x |= {name: torch.randn(7, 8, dtype=torch.float64) for name in ("height_rel", "width_rel")}
    image = 2 * 2 * (16 + 16) * 4  # bytes of its position terms
    monkeypatch.setattr(triton_position, "MOST_BYTES", 2 * image)
    check(lambda t, backend: vk.halo_attention(**t, block_size=2, halo_size=1, backend=backend), x)


# --- the registered operator, bad input ------------------------------------------------------------------------------


def test_opcheck():
    problem = {**FULL, "B": 1, "grid": (2, 3), "heads": (2, 1), "geometry": ([2, 2], [1, 1], [1, 2], [False, True])}
    x = {name: t.float().to(DEVICE) for name, t in make(problem).items()}
    names = ("q", "k", "v", "rel_pos_bias", "additional_keys", "additional_values", "pad_k", "pad_v")
    tensors = [x[name] for name in names]
    kernel_size, stride, dilation, causal = problem["geometry"]
    geometry = (kernel_size, stride, [1, 1], [0, 0], dilation, causal, True, False, 1, 0.7)
    torch.library.opcheck(torch.ops.visattn.windowed_fwd.default, (*tensors, None, *geometry))
    out, lse = torch.ops.visattn.windowed_fwd(*tensors, None, *geometry)
    args = (torch.randn_like(out), torch.randn_like(lse), *tensors[:3], out, lse, *tensors[3:], None, *geometry)
    torch.library.opcheck(torch.ops.visattn.windowed_bwd.default, args)


def test_flops_are_those_of_visible_pairs():
    from torch.utils.flop_counter import FlopCounterMode

    x = {name: torch.randn(1, 7, 9, 2, 8, device=DEVICE) for name in "qkv"}
    counts = []
    for backend in ("recompute", "triton"):
        with FlopCounterMode(display=False) as counter:
            vk.neighborhood_attention(**x, kernel_size=3, backend=backend)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 4 * 7 * 9 * 2 * 8 * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -0.1}, "scale is -0.1, it takes a positive one"),
        ({"dtype": torch.float64}, "tensors are torch.float64, it computes in float16, bfloat16 and float32"),
        ({"dim": 130}, "a head dim is 130, it takes 1 to 128"),
    ],
)
def test_what_the_kernels_do_not_take(change, message):
    x = torch.zeros(1, 4, 4, 1, change.get("dim", 8), dtype=change.get("dtype", torch.float32), device=DEVICE)
    scale = change.get("scale", 1.0)
    table = torch.zeros(7, x.shape[-1], dtype=x.dtype, device=DEVICE)
    calls = {
        "neighborhood_attention": lambda: vk.neighborhood_attention(x, x, x, 3, scale=scale, backend="triton"),
        "window_attention": lambda: vk.window_attention(x, x, x, 2, scale=scale, backend="triton"),
        "halo_attention": lambda: vk.halo_attention(x, x, x, table, table, 2, 1, scale=scale, backend="triton"),
    }
    for name, run in calls.items():
        with pytest.raises(ValueError, match=f"backend='triton' cannot run {name}: {message}"):
            run()
