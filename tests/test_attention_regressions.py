"""Where attention kernels with a tangent are known to go wrong, each failure by its smallest case."""

from functools import partial

import pytest
import torch
from attention_cases import NAMES, cast, gradients, inputs, like, math, primals
from autograd_cases import assert_all_near, assert_near, one_thread  # noqa: F401  (a fixture for every test here)
from device import seeded

import fastkd
from fastkd import testing


def against_math(a, attends, **settings):
    """Values and all gradients, of what PyTorch's math path can do, in float64."""
    names = [n for n in a if a[n].requires_grad]
    a64 = cast(a, torch.float64)
    mine = fastkd.jvp_attention(**a, **settings, backend=attends)
    xs = [a64[n] for n in (*NAMES[:3], "attn_mask") if n in a64]
    ts = [a64[n] for n in NAMES if n.startswith("tangent") and n in a64]
    theirs = torch.func.jvp(lambda *x: math(*x, **settings), tuple(xs), tuple(ts))
    assert_all_near(mine, theirs)
    assert_all_near(gradients(mine, [a[n] for n in names]), gradients(theirs, [a64[n] for n in names]))


def test_an_additive_bias_is_neither_scaled_nor_forgotten_in_the_backward(attends):
    """It stands behind the scale: its gradient is that of the scores, and that of the others knows it."""
    against_math(inputs(widths=(64, 8), bias=True, grad=True), attends, scale=0.01)


def test_a_bias_of_minus_infinity_and_its_gradient(attends):
    a = primals(inputs(bias=True, grad=True))
    with torch.no_grad():
        a["attn_mask"][:, :, :, ::2] = -torch.inf
    out = fastkd.attention(**a, backend=attends)
    grads = torch.autograd.grad(out, list(a.values()), like(out))
    a64 = cast(a, torch.float64)
    want = math(*a64.values())
    assert_all_near((out, *grads), (want, *torch.autograd.grad(want, list(a64.values()), like(want))))
    assert not grads[3][..., ::2].any() and not grads[1][:, :, ::2].any()


@pytest.mark.parametrize("width", [8, 16, 24])
def test_a_head_dimension_of_16(attends, width):
    against_math(inputs((33, 40), widths=(width, width), grad=True), attends)


@pytest.mark.parametrize("size", [(31, 33), (63, 65), (127, 129), (1, 191), (100, 7)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_lengths_that_are_no_multiple_of_a_tile(attends, size):
    """No mass behind the last key: with the same value everywhere the output is that value, and its tangent 0."""
    a = inputs(size, (1, 1), batch=1, grad=True)
    against_math(a, attends)
    a["value"] = torch.full_like(a["value"], 3.0)
    b = {n: a[n].detach() for n in NAMES[:5]}
    out, tangent = fastkd.jvp_attention(**b, backend=attends)
    assert_near(out, torch.full_like(out, 3.0).double())
    assert tangent.abs().max() < 1e-4


def test_the_gradient_through_the_tangent_is_not_dropped(attends):
    """A loss of the tangent alone reaches query, key and value, whose gradients are second derivatives."""
    a = inputs(grad=True)
    a64 = cast(a, torch.float64)
    results = []
    for b, f in (
        (a, lambda q, k, v: fastkd.attention(q, k, v, backend=attends)),
        (a64, math),
    ):
        tangent = torch.func.jvp(f, tuple(b[n] for n in NAMES[:3]), tuple(b[n] for n in NAMES[3:6]))[1]
        results.append(torch.autograd.grad(tangent.square().sum(), [b[n] for n in NAMES[:6]]))
    assert_all_near(*results)
    assert all(g.abs().max() > 0.1 for g in results[0])


def test_a_tangent_that_does_not_require_grad(attends):
    """As in torch.func.jvp over a network: gradients go through the tangent to the primals all the same."""
    a = inputs(grad=True)
    frozen = {n: x.detach() if n.startswith("tangent") else x for n, x in a.items()}
    against_math(frozen, attends)
    mixed = {n: x.detach() if n in ("query", "tangent_key") else x for n, x in a.items()}
    against_math(mixed, attends)


def test_a_primal_that_does_not_require_grad(attends):
    """Its tangent may."""
    a = inputs(grad=True)
    against_math({n: x if n.startswith("tangent") else x.detach() for n, x in a.items()}, attends)


@pytest.mark.parametrize("device", ["meta"])
def test_the_wrong_device_is_refused(attends, device):
    a = inputs()
    for name in ("key", "tangent_query", "tangent_value"):
        with pytest.raises(ValueError, match=f"{name} must be on .*device"):
            fastkd.jvp_attention(**{**a, name: a[name].to(device)}, backend=attends)


@pytest.mark.parametrize("heads", [(6, 2), (6, 3), (5, 1)])
def test_grouped_heads_look_at_their_own_key_head(attends, heads):
    """Head h at h // (H / Hkv), not at h % Hkv; gradients of a group are summed."""
    a = inputs(heads=heads, grad=True)
    against_math(a, attends, enable_gqa=True)
    marked = torch.arange(heads[1]).view(1, -1, 1, 1).expand(2, -1, 11, 8).float().contiguous()
    out = fastkd.attention(a["query"], a["key"], marked, enable_gqa=True, backend=attends)
    want = torch.arange(heads[1]).repeat_interleave(heads[0] // heads[1]).view(1, -1, 1, 1)
    assert_near(out, want.expand_as(out).double())


@pytest.mark.parametrize("how", ["mask", "bias", "window"])
def test_first_tiles_without_a_key_do_not_poison_the_maximum(attends, how):
    """The running maximum is -inf until the first key: -inf - -inf is NaN."""
    a = inputs((5, 600), (1, 1), batch=1, grad=True)  # several tiles of each backend
    hidden = torch.zeros(5, 600, dtype=torch.bool)
    hidden[:3, :590] = True  # all tiles but the last one
    hidden[3, 10:] = True  # all but the first
    hidden[4] = True
    settings = {"backend": attends, "return_lse": True}
    if how == "window":
        hidden[:] = True
        for i in range(5):
            hidden[i, 593 + i : 596 + i] = False
        outputs = fastkd.jvp_attention(**a, window=(2, 0), causal_alignment="bottom_right", **settings)
    else:
        mask = ~hidden if how == "mask" else torch.zeros(5, 600).masked_fill(hidden, -torch.inf)
        outputs = fastkd.jvp_attention(**a, attn_mask=mask, **settings)
    a64 = cast(a, torch.float64)
    bias = torch.zeros(5, 600, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    want = fastkd.jvp_attention(**a64, attn_mask=bias, return_lse=True, backend="reference")
    for x, y in zip((*outputs, *gradients(outputs, list(a.values()))), (*want, *gradients(want, list(a64.values())))):
        assert_near(x.masked_fill(x == -torch.inf, 0), y.masked_fill(y == -torch.inf, 0))


def test_a_causal_mask_of_a_rectangle_is_torchs(attends):
    """Top left: query i sees keys 0 to i, whatever the lengths; a kernel that aligns the ends disagrees."""
    for size in ((5, 9), (9, 5)):
        against_math(inputs(size, grad=True), attends, is_causal=True)


def test_large_equal_scores_do_not_overflow(attends):
    a = {n: torch.full_like(x, 60.0) if n in ("query", "key") else x for n, x in inputs(grad=False).items()}
    out, lse, tangent, mu = fastkd.jvp_attention(**a, scale=1.0, return_lse=True, backend=attends)
    mean = a["value"].mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, torch.full_like(lse, 60.0 * 60.0 * 16) + torch.tensor(11.0).log())
    assert tangent.isfinite().all() and mu.isfinite().all()


def test_the_sum_of_the_gradients_of_the_scores_is_zero(attends):
    """A shift of all keys of a query changes nothing: sum_j dbias_ij = 0, in the tangent's part, too."""
    a = inputs(bias=True, grad=True)
    outputs = fastkd.jvp_attention(**a, backend=attends)
    for g in gradients(outputs, [a["attn_mask"], a["tangent_mask"]]):
        assert g.abs().max() > 1e-2 and g.sum(-1).abs().max() < 1e-4


def test_a_sequence_packed_twice_is_two_copies(tiled):
    """What lies behind a sequence is another one's: neither sees the other."""
    one = inputs((21, 21), batch=1)
    twice = {n: torch.cat((x, x), 2) for n, x in one.items()}
    outputs = fastkd.jvp_attention(**twice, cu_seqlens_q=torch.tensor([0, 21, 42]), is_causal=True, backend=tiled)
    for x, y in zip(outputs, fastkd.jvp_attention(**one, is_causal=True, backend=tiled)):
        torch.testing.assert_close(x, torch.cat((y, y), 2), rtol=1e-5, atol=1e-5)


def test_an_expanded_key_under_the_definition():
    """A dual number is laid out like its primal, and an expanded one cannot be written."""
    a = inputs()
    shared = a["key"][:1].expand(2, -1, -1, -1)
    got = fastkd.jvp_attention(**{**a, "key": shared}, backend="reference")
    want = fastkd.jvp_attention(**{**a, "key": shared.contiguous()}, backend="reference")
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tangents_that_have_much_in_common_at_first_on_keys_of_no_weight(attends, dtype):
    """What later keys have in common is another number; measured from that of the first a tangent is rounding."""
    draw = seeded()
    x = [torch.randn(1, 2, 400, 16, generator=draw) for _ in range(6)]
    x[0] = 0.3 * x[0] + 1
    x[1][:, :, :192] -= 4
    x[4][:, :, :192] += 8
    case = dict(zip(NAMES[:6], (y.to(dtype) for y in x)))
    testing.compare(partial(fastkd.jvp_attention, backend=attends), fastkd.reference.jvp_attention, case).check()


def test_a_window_of_any_size(attends):
    """Positions and widths are 32 bits wide in the kernels."""
    a = primals(inputs())
    for window, same in (((0, 2**31 - 1), (0, None)), ((None, 2**40), None), ((2**63 - 1, 2**63 - 1), None)):
        assert_near(*(fastkd.attention(**a, window=w, backend=attends) for w in (window, same)))


def test_memory_that_holds_the_negative(attends):
    a = primals(inputs(bias=True))
    views = {n: torch._neg_view(x) for n, x in a.items()}
    want = fastkd.attention(**{n: -x for n, x in a.items()}, backend=attends)
    assert_near(fastkd.attention(**views, backend=attends), want)


def test_an_upstream_of_zeros_without_memory(attends):
    q = primals(inputs())["query"].detach().requires_grad_()
    out = fastkd.attention(q, q, q, backend=attends)
    (grad,) = torch.autograd.grad(out, q, torch._efficientzerotensor(out.shape, dtype=out.dtype, device=out.device))
    assert not grad.any()


@pytest.mark.parametrize("seed", range(4))
def test_scores_of_a_large_deviation(attends, seed):
    """Of 39: a difference of scores that was rounded twice before it is an exponent is outside the rule."""
    case = inputs((40, 70), (2, 2), (24, 16), seed=seed, grad=True)
    op, reference = (partial(f, scale=8.0) for f in (fastkd.jvp_attention, fastkd.reference.jvp_attention))
    testing.compare(partial(op, backend=attends), reference, case).check()
