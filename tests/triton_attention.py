"""Attention in Triton against its definition in float64: values, tangents and every gradient.

Without a GPU test_triton.py runs this file in Triton's interpreter, like triton_cases.py; with one, `pytest
tests/triton_attention.py` runs it there.
"""

import math
import mmap
import random
from dataclasses import replace

import pytest
import torch
from device import KIND, seeded

from fastkd.attend import definition, tiles_triton
from fastkd.attend.problem import TANGENT_OF, Attention, AttentionTensors, Cotangents, Saved, queries_of
from fastkd.kernels import configs
from fastkd.testing import allowance

NAN, INF = math.nan, math.inf
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TILE = configs.tile(torch.empty(1, 1, 1, 64), "dual forward", 64, False)  # 16 queries x 32 keys in the interpreter
M, N = TILE.queries, TILE.keys
ORDER = AttentionTensors._fields[:8]
DUAL = ("q", "k", "v", "bias")
OUTPUTS = ("out", "lse", "tangent", "mu")


# ---- problems ----


def spans(kind, queries, keys):
    """start and stop of each query, [B or 1, Sq]; None: everything is seen."""
    i = torch.arange(queries, dtype=torch.int32)
    zero = torch.zeros_like(i)
    if kind is None:
        return None, None
    if kind == "causal":
        start, stop = zero[None], (i + 1)[None]
    elif kind == "bottom-right":  # the first queries may see nothing
        start, stop = zero[None], (i + 1 + keys - queries)[None]
    elif kind == "window":  # of another width in each batch entry, with key lengths
        start = torch.stack([i - 7, i - 20])
        stop = torch.stack([(i + 9).clamp(max=keys - 5), i + 2])
    else:  # packed: the second sequence has no keys, between the third and the fourth keys are nobody's
        cuts_q = torch.tensor([0, queries // 4, queries // 3, queries // 2, queries])
        first = torch.tensor([0, keys // 3, keys // 3, 3 * keys // 4])
        last = torch.tensor([keys // 3, keys // 3, keys // 2, keys])
        which = torch.searchsorted(cuts_q, torch.arange(queries), right=True) - 1
        start, stop = first[which][None].int(), last[which][None].int()
    return start.clamp(0, keys).contiguous(), stop.clamp(0, keys).contiguous()


def problem(
    batch=1, heads=(2, 1), sizes=(M - 3, N + 7), dims=(16, 16), dtype=F32, dual=("q", "k", "v"), bias=None,
    bias_dtype=None, mask=None, span=None, softcap=None, seed=0, last=True
):  # fmt: skip
    """An Attention whose every feature matters, and its tensors. `bias` and `mask` say which dimensions are whole."""
    draw = seeded(seed)
    (h, h_kv), (queries, keys), (d, d_v) = heads, sizes, dims

    def randn(*shape):
        return torch.randn(shape, generator=draw)

    def rows(count, length, width):  # [B, H, S, D] views of [B, S, H, D], or contiguous
        x = randn(batch, length, count, width).transpose(1, 2) if last else randn(batch, count, length, width)
        return x.to(dtype)

    whole = (batch, h, queries, keys)
    x = {"q": rows(h, queries, d), "k": rows(h_kv, keys, d), "v": rows(h_kv, keys, d_v)}
    x |= {"tq": rows(h, queries, d), "tk": rows(h_kv, keys, d), "tv": rows(h_kv, keys, d_v)}
    for name in ("bias", "tbias"):
        shape = [n if c == "1" else 1 for c, n in zip(bias or "", whole)]
        x[name] = (2 * randn(*shape)).to(bias_dtype or dtype) if bias else None
    for name in DUAL:
        if name not in dual:
            x[TANGENT_OF[name]] = None
    seen = torch.rand([n if c == "1" else 1 for c, n in zip(mask, whole)], generator=draw) < 0.5 if mask else None
    start, stop = spans(span, queries, keys)
    a = AttentionTensors(*(x[name] for name in ORDER[:6]), x["bias"], x["tbias"], seen, start, stop)
    return Attention("triton", None, None, 1.3 / math.sqrt(d), softcap, False), a


# ---- the definition, and the rule ----


def cast(a, dtype):
    return AttentionTensors(*(x.to(dtype) if x is not None and x.is_floating_point() else x for x in a))


def defined(spec, a, given, dtype):
    """Outputs and gradients by name, by the definition in a dtype."""
    a = cast(a, dtype) if dtype == torch.float64 else a
    leaves = {n: x.detach().requires_grad_() for n, x in zip(ORDER, a) if x is not None}
    outputs = definition.attention(spec, tuple(a._replace(**leaves)))
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, given) if y.requires_grad]
    ys, gs = zip(*pairs)
    found = torch.autograd.grad(ys, list(leaves.values()), gs, allow_unused=True)
    grads = {f"d{n}": torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found)}
    return dict(zip(OUTPUTS, (y.detach() for y in outputs))) | grads


def cotangents(a, outputs, given):
    """As the tiles take them: those of lse and mu are in the sums per row."""
    out, _, tangent, _ = outputs
    d_out, d_lse, *rest = given
    dl = (d_out.float() * out.float()).nan_to_num().sum(-1) - d_lse
    if tangent is None:
        return Cotangents(d_out, None, dl, None)
    d_tangent, d_mu = rest
    dl = dl + (d_tangent.float() * tangent.float()).nan_to_num().sum(-1)
    return Cotangents(d_out, d_tangent, dl, (d_tangent.float() * out.float()).nan_to_num().sum(-1) - d_mu)


def drawn(outputs, seed):
    """Cotangents of the outputs that are there; none of an lse of -inf."""
    draw = seeded(seed + 1)
    given = [(torch.rand(y.shape, generator=draw) * 2 - 0.5).to(y.dtype) for y in outputs if y is not None]
    for g in given[1::2]:
        g.masked_fill_(outputs[1].isinf(), 0)
    return given


def run(spec, a, needs=None, given=None, seed=0):
    """Outputs and gradients by name, from the kernels."""
    outputs = tiles_triton.forward(spec, a)
    given = drawn(outputs, seed) if given is None else given
    needs = tuple(x is not None for x in a[:8]) if needs is None else needs
    g = cotangents(a, outputs, given)
    saved = Saved(outputs[1], outputs[3])
    grads = tiles_triton.backward(spec, a, saved, g, needs)
    names = [f"d{n}" for n, need in zip(ORDER, needs) if need]
    assert len(names) == len(grads)
    return {n: y for n, y in zip(OUTPUTS, outputs) if y is not None} | dict(zip(names, grads)), given


def held(name, got, truth, baseline, eps):
    """The rule: by the largest error and by the norm; infinities where they belong."""
    assert got.shape == truth.shape, f"{name}: {got.shape}, expected {truth.shape}"
    got, finite = got.double(), truth.isfinite()
    assert torch.equal(got[~finite], truth[~finite].double()), f"{name}: infinities"
    error, truth, baseline = (got - truth)[finite], truth[finite], baseline.double()[finite]
    for order in (INF, 2):
        if truth.numel():
            size, allowed = torch.linalg.vector_norm(error, order).item(), allowance(truth, baseline, eps, order)
            assert size <= allowed, f"{name}: error {size:.2e} of {allowed:.2e}"


def hold(spec, a, seed=0):
    """Everything against the definition; inputs stay as they are."""
    before = [None if x is None else x.clone() for x in a]
    got, given = run(spec, a, seed=seed)
    truth, baseline = defined(spec, a, given, torch.float64), defined(spec, a, given, None)
    eps = max(torch.finfo(x.dtype).eps for x in a[:8] if x is not None)
    assert got.keys() == truth.keys()
    for name in got:
        dtype = getattr(a, name[1:]).dtype if name[1:] in ORDER else F32 if name in ("lse", "mu") else a.q.dtype
        assert got[name].dtype == dtype, name
        held(name, got[name], truth[name], baseline[name], eps)
    assert all(x is None or torch.equal(x, y) for x, y in zip(a, before)), "inputs were written over"
    return got


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written to is NaN."""
    empty, new = torch.empty, torch.Tensor.new_empty

    def nan(x):
        return x.fill_(NAN) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **more: nan(empty(*args, **more)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **more: nan(new(*args, **more)))


# ---- the grid ----

SUBSETS = ((), ("q",), ("k",), ("v",), ("q", "k"), ("k", "v"), ("q", "v"), ("q", "k", "v"))


@pytest.mark.parametrize("dual", SUBSETS, ids="".join)
def test_tangents_that_are_there(dual):
    hold(*problem(dual=dual))


@pytest.mark.parametrize("dual", [("bias",), ("k", "bias"), ("q", "k", "v", "bias")], ids="".join)
def test_tangents_with_that_of_the_bias(dual):
    hold(*problem(dual=dual, bias="0111", softcap=3.0))


# 1; one below the tile, the tile, one above; two tiles and a part
SIZES = ((1, 1), (1, N + 1), (M - 1, N - 1), (M, N), (M + 1, N + 1), (2 * M + 3, 7), (3, 2 * N + 3))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes):
    hold(*problem(heads=(1, 1), sizes=sizes))
    hold(*problem(heads=(1, 1), sizes=sizes, dual=(), span="causal"))


@pytest.mark.parametrize("dims", [(8, 8), (8, 24), (72, 80), (80, 16), (16, 72)], ids=str)
def test_head_dimensions(dims):
    hold(*problem(dims=dims, heads=(2, 2), sizes=(M, N), span="causal", last=dims[0] == 8))


def test_the_largest_head_dimension():
    hold(*problem(batch=1, dims=(256, 256), heads=(1, 1), sizes=(M, N), dtype=BF16))


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dual", [(), ("q", "k", "v")], ids="".join)
def test_groups_of_heads(heads, dual):
    hold(*problem(batch=2 if not dual else 1, heads=heads, sizes=(M, N + 1), dual=dual, mask="1111"))


KINDS = ("causal", "bottom-right", "window", "packed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2 * M + 5, 2 * N + 9), (4 * M, N - 1)], ids=str)
def test_intervals(kind, sizes):
    hold(*problem(batch=2 if kind == "window" else 1, sizes=sizes, span=kind, heads=(1, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_without_tangents(kind):
    hold(*problem(batch=2, sizes=(2 * M + 5, 2 * N + 9), span=kind, dual=(), heads=(1, 1)))


# which of B, H, Sq, Skv a bias or mask has
PLANES = ("0000", "0001", "0010", "0011", "0100", "1001", "1010", "0101", "1011", "0111", "1111")


@pytest.mark.parametrize("plane", PLANES)
def test_bias_of_each_shape(plane):
    batch = 2 if plane[0] == "1" else 1
    hold(
        *problem(
            batch,
            (2, 1) if batch == 1 else (1, 1),
            bias=plane,
            dual=(*DUAL,),
            span="bottom-right",
            sizes=(M + 5, N + 7) if plane[2:] != "11" else (M, N),
        )
    )


@pytest.mark.parametrize("plane", ["0011", "1111", "1000"])
def test_bias_of_each_shape_without_tangents(plane):
    hold(*problem(2, bias=plane, dual=(), span="window", softcap=3.0, bias_dtype=F32, sizes=(M, N + 1)))


@pytest.mark.parametrize("plane", ["0001", "0010", "0100", "1000", "0011", "1111"])
def test_mask_of_each_shape(plane):
    dual = ("q", "k", "v") if plane == "1111" else ()
    hold(*problem(2, mask=plane, dual=dual, span="bottom-right", sizes=(M + 5, N), seed=3))


@pytest.mark.parametrize("dual", [(), ("q",), ("k", "v"), ("q", "k", "v")], ids="".join)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_softcap(dual, dtype):
    hold(*problem(softcap=3.0, dual=dual, dtype=dtype))


@pytest.mark.parametrize("span", [None, "bottom-right"], ids=str)
def test_tangents_of_one_large_mean(span):
    """It is in mu, and cancels in the tangent of the output: H V with it in H would be mostly rounding."""
    spec, a = problem(dual=("q", "bias"), bias="0001", bias_dtype=F32, dtype=BF16, span=span, sizes=(M + 3, 2 * N + 5))
    a.tbias.add_(40)
    hold(spec, a)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_first_keys_weigh_nothing_and_move_far(dtype):
    """The mean of the tangents over them is not that over the keys that count."""
    spec, a = problem(dtype=dtype, sizes=(M - 3, 2 * N + 5))
    a.q.mul_(0.3).add_(1)
    a.k[:, :, :N] -= 4
    a.tk[:, :, :N] += 8
    hold(spec, a)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [None, "0001"], ids=str)
def test_scores_of_a_large_deviation(bias, seed):
    """Of 39: brought to base 2 before the maximum is subtracted, they would be rounded twice."""
    spec, a = problem(bias=bias, dims=(24, 16), sizes=(2 * M - 1, 2 * N + 5), seed=seed)
    hold(replace(spec, scale=8.0), a, seed=seed)


def test_whole_tiles_of_a_width_between():
    """What is read past D in a tile that needs no other mask."""
    hold(*problem(sizes=(2 * M, 2 * N), dims=(24, 40)))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scores_that_overflow_hide_their_row(dtype):
    """-inf times a tangent is no number, in a row that is blind."""
    spec, a = problem(batch=2, dtype=dtype, dual=("q", "k"))
    a.q[0, 0, 3, 0] = -3e38
    a.k[0] = a.k[0].abs() + 2
    for i, x in enumerate(tiles_triton.forward(spec, a)):
        assert (x[0, 0, 3] == (-math.inf if i == 1 else 0)).all()
        assert x[1].isfinite().all()


def combined(seed):
    """A random problem with most features."""
    rng = random.Random(seed)
    dtype = rng.choice([F32, BF16, F16])
    # in 16 bits the gradient of a bias for whole rows is mostly the rounding of out in Dl, of which the rows sum to 0
    bias = rng.choice([None, *(p for p in PLANES if dtype == F32 or p.endswith("11"))])
    dual = [n for n in ("q", "k", "v", *(("bias",) if bias else ())) if rng.random() < 0.7]
    return problem(
        batch=rng.choice([1, 2]),
        heads=rng.choice([(2, 1), (2, 2), (1, 1)]),
        sizes=(rng.randint(1, M + 5), rng.randint(1, N + 9)),
        dims=(rng.choice([8, 16, 24, 40, 64]), rng.choice([8, 16, 24, 40, 64])),
        dtype=dtype,
        dual=tuple(dual),
        bias=bias,
        bias_dtype=rng.choice([None, F32]),
        mask=rng.choice([None, *PLANES]),
        span=rng.choice([None, *(k for k in KINDS if k != "window")]),
        softcap=rng.choice([None, 3.0]),
        seed=seed,
        last=rng.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(16))
def test_features_together(seed):
    hold(*combined(seed), seed=seed)


# ---- rows that see nothing, and what nobody sees ----


def test_rows_that_see_nothing():
    """By interval, by mask, by a bias of -inf: zeros, -inf, and no gradient."""
    spec, a = problem(2, bias="0111", mask="1111", span="bottom-right", dual=(*DUAL,), sizes=(2 * M + 9, N + 1))
    a.mask[:, :, 2 * M + 7] = False
    a.bias[:, :, 2 * M + 8] = -INF
    got, _ = run(spec, a)
    blind = got["lse"] == -INF
    assert blind[:, :, :8].all() and blind[:, :, 2 * M + 7 :].all() and not blind.all()
    for name in ("out", "tangent", "mu", "dq", "dtq"):
        assert (got[name][blind] == 0).all(), name
    assert not any(x.isnan().any() for x in got.values())
    planes = blind.unsqueeze(-1).expand(-1, -1, -1, N + 1).all(0, keepdim=True)
    assert (got["dbias"][planes] == 0).all() and (got["dtbias"][planes] == 0).all()


def test_the_first_tiles_of_a_row_are_masked():
    """An online maximum of nothing but -inf does not poison what comes after."""
    spec, a = problem(batch=1, bias="1111", sizes=(M, 3 * N + 1), dual=(*DUAL,))
    a.bias[:, :, ::2, : 2 * N] = -INF
    a.bias[:, :, 1::2, N:] = -INF
    hold(spec, a)


def test_a_bias_of_the_lowest_number():
    """finfo.min in the place of -inf: a row of it alone sees all keys alike, as in torch."""
    spec, a = problem(batch=1, bias="0111", dual=())
    a.bias[:, :, 0] = torch.finfo(F32).min
    a.bias[:, :, 1, ::2] = torch.finfo(F32).min
    out = tiles_triton.forward(spec, a)[0]
    truth = definition.attention(spec, a)[0]
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bottom-right", "packed", "window"])
def test_what_nobody_sees_may_hold_anything(kind):
    batch = 2 if kind == "window" else 1
    spec, a = problem(batch, (1, 1), sizes=(2 * M + 9, N + 3), span=kind, bias="0011", dual=(*DUAL,))
    expected, given = run(spec, a)
    first, last = queries_of(a.start, a.stop, N + 3)
    dead_q, dead_k = (a.start >= a.stop)[:, None, :, None], (first >= last)[:, None, :, None]
    assert dead_q.any() or dead_k.any()
    fill = {n: getattr(a, n).masked_fill(dead_q if n.endswith("q") else dead_k, NAN) for n in ORDER[:6]}
    given = [given[0].masked_fill(dead_q, NAN), given[1], given[2].masked_fill(dead_q, NAN), given[3]]
    b = a._replace(**fill)
    outputs = tiles_triton.forward(spec, b)
    g = cotangents(b, outputs, given)
    blind = dead_q[..., 0].expand_as(g.dl)
    g = g._replace(dl=g.dl.masked_fill(blind, NAN), delta=g.delta.masked_fill(blind, NAN))
    grads = tiles_triton.backward(spec, b, Saved(outputs[1], outputs[3]), g, (True,) * 8)
    got = dict(zip(OUTPUTS, outputs)) | dict(zip([f"d{n}" for n in ORDER], grads))
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


def test_a_nan_shows_in_its_row_alone():
    spec, a = problem(2, span="causal", sizes=(2 * M, N))
    a.tq[1, 0, 5, 3] = NAN
    a.q[0, 1, 20, 0] = NAN
    out, lse, tangent, mu = tiles_triton.forward(spec, a)
    rows = torch.zeros(2, 2, 2 * M, dtype=torch.bool)
    rows[0, 1, 20] = True
    assert torch.equal(out.isnan().any(-1), rows) and torch.equal(lse.isnan(), rows)
    rows[1, 0, 5] = True
    assert torch.equal(tangent.isnan().any(-1), rows) and torch.equal(mu.isnan(), rows)


def test_nothing_to_see():
    """No keys, and no queries."""
    spec, a = problem(sizes=(5, 0))
    got, _ = run(spec, a)
    assert (got["lse"] == -INF).all() and all((got[n] == 0).all() for n in ("out", "tangent", "mu", "dq", "dtq"))
    spec, a = problem(sizes=(0, 5))
    got, _ = run(spec, a)
    assert got["out"].numel() == 0 and all((got[n] == 0).all() for n in ("dk", "dv", "dtk", "dtv"))


# ---- what is asked for ----


@pytest.mark.parametrize("seed", range(5))
def test_gradients_that_are_needed(seed):
    """Those and no others, the same."""
    spec, a = problem(bias="0011", dual=(*DUAL,), softcap=3.0, batch=1, sizes=(M, N))
    every, given = run(spec, a)
    rng = random.Random(seed)
    needs = tuple(rng.random() < 0.4 for _ in range(8))
    got, _ = run(spec, a, needs, given)
    for name, x in got.items():
        torch.testing.assert_close(x, every[name], rtol=1e-5, atol=1e-6)


def test_the_tangent_is_a_constant():
    """Without its cotangent the backward is that of plain attention."""
    spec, a = problem(bias="0011", span="causal", dual=(*DUAL,))
    primal = a.primal()
    out, lse, _, _ = tiles_triton.forward(spec, a)
    plain, plain_lse, tangent, mu = tiles_triton.forward(spec, primal)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse) and tangent is None and mu is None
    hold(spec, primal)


def test_cotangents_of_other_strides():
    spec, a = problem(batch=1)
    got, given = run(spec, a)
    wide = [g.unsqueeze(-1).expand(*g.shape, 2).clone()[..., 0] for g in given]
    again, _ = run(spec, a, given=wide)
    assert all(torch.equal(x, again[n]) for n, x in got.items())


def test_planes_of_any_stride():
    """Bias and mask transposed in memory, and expanded without memory."""
    spec, a = problem(2, bias="1111", mask="1111", dual=(*DUAL,))
    turned = a._replace(**{n: getattr(a, n).mT.contiguous().mT for n in ("bias", "tbias", "mask")})
    got, given = run(spec, a)
    again, _ = run(spec, turned, given=given)
    assert all(torch.equal(x, again[n]) for n, x in got.items())
    wide = a._replace(mask=a.mask[:1, :, :1].expand(2, -1, M - 3, -1))
    hold(spec, wide)


def test_rows_that_no_wide_load_can_read():
    """A stride that is no multiple of 8, an address that is none of 16 bytes."""
    spec, a = problem(batch=1, sizes=(M, N))
    rows = {n: torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for n, x in zip(ORDER[:6], a)}
    hold(spec, a._replace(**rows))


def spread_out(x):
    """x [B, H, S, D] with rows 2^30 + 64 elements apart, in memory that is only there where it is touched."""
    b, h, s, d = x.shape
    stride, count = 2**30 + 64, (s - 1) * (2**30 + 64) + b * h * d
    if KIND == "cuda":
        storage = torch.zeros(count, dtype=x.dtype)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        storage = torch.frombuffer(mmap.mmap(-1, count * x.element_size(), flags=flags), dtype=x.dtype)
    return storage[:count].as_strided(x.shape, (h * d, d, stride, 1)).copy_(x)


@pytest.mark.parametrize("far", ["q", "k", "tv"])
def test_rows_beyond_2_to_the_31_elements(far):
    spec, a = problem(batch=1, sizes=(3, 3), dims=(8, 8), dtype=F16)
    got, given = run(spec, a)
    again, _ = run(spec, a._replace(**{far: spread_out(getattr(a, far))}), given=given)
    assert all(torch.equal(x, again[n]) for n, x in got.items())


def test_heads_beyond_2_to_the_31_elements():
    """An offset of a batch entry or head of 32 bits would wrap around."""
    spec, a = problem(batch=1, heads=(3, 3), sizes=(3, 3), dims=(8, 8), dtype=F16)
    got, given = run(spec, a)
    far = a._replace(**{n: spread_out(getattr(a, n).transpose(1, 2)).transpose(1, 2) for n in ("q", "k", "v", "tq")})
    assert far.q.stride(1) > 2**30
    again, _ = run(spec, far, given=given)
    assert all(torch.equal(x, again[n]) for n, x in got.items())


def test_results_lie_like_their_tensors():
    spec, a = problem(heads=(2, 2))
    got, _ = run(spec, a)
    assert all(got[n].stride() == a.q.stride() for n in ("out", "tangent", "dq"))


def test_repeats_are_bitwise_equal():
    spec, a = problem(bias="0001", dual=(*DUAL,), heads=(4, 2))
    got, given = run(spec, a)
    for _ in range(2):
        again, _ = run(spec, a, given=given)
        assert all(torch.equal(x, again[n]) for n, x in got.items())


def test_every_tile_gives_the_same():
    spec, a = problem(heads=(1, 1), sizes=(20, 40), span="causal", bias="0011", dual=(*DUAL,))
    expected, given = run(spec, a)
    tiles = {t for table in configs.ATTENTION.values() for row in table.values() for t in row}
    if KIND != "cuda":  # the interpreter knows no warps and stages
        tiles = {configs.Tile(t.queries, t.keys, 1, 1, t.parts) for t in tiles}
    for tile in tiles:
        with configs.forced(tile):
            got, _ = run(spec, a, given=given)
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x, rtol=1e-4, atol=2e-5)
