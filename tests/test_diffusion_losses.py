"""Every loss of fastkd.diffusion: values and gradients against its transcription, and what all have in common."""

import pytest
import torch
from diffusion_cases import Case
from diffusion_continuous import CASES as CONTINUOUS
from diffusion_discrete import CASES as DISCRETE
from diffusion_matching import CASES as MATCHING

from fastkd.diffusion import sid_loss, sim_loss

CASES: dict[str, Case] = {**CONTINUOUS, **DISCRETE, **MATCHING}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DTYPES = {  # of latents, of what is one number for a sample
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "float32, float64": (torch.float32, torch.float64),
    "float64, float32": (torch.float64, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16, float32": (torch.float16, torch.float32),
}


def upstream(n):
    return torch.linspace(-1, 1.5, n, dtype=torch.float64)


def gradients(y, inputs):
    found = torch.autograd.grad(y, list(inputs.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), found)}


def near(got, want, rtol, name=""):
    error, size = (got.double() - want.double()).abs().max(), want.double().abs().max()
    assert error <= rtol * size + 1e-14, f"{name}: error {error:.2e} of {size:.2e}"


def checked(case, given):
    """Values and gradients are those of the transcription, in float64, of what is given."""
    exact = {n: x.detach().double().requires_grad_() for n, x in given.items()}
    before = {n: x.detach().clone() for n, x in given.items()}
    wide = any(x.dtype == torch.float64 for x in given.values() if x.dim() > 1)
    rtol = 1e-11 if all(x.dtype == torch.float64 for x in given.values()) else 2e-5
    want, got = case.truth(exact), case(given, reduction="none")
    assert got.dtype == (torch.float64 if wide else torch.float32)
    near(got, want, rtol, "loss")
    up = upstream(len(want))
    expected, found = gradients((want * up).sum(), exact), gradients((got.double() * up).sum(), given)
    for n, g in found.items():
        if n in case.learns:
            assert expected[n].any() and g.dtype == given[n].dtype, n
            near(g, expected[n], max(rtol, torch.finfo(g.dtype).eps), f"gradient of {n}")
        else:
            assert not g.any() and not expected[n].any(), f"{n} is a constant"
    for reduction, total in (("mean", want.mean()), ("sum", want.sum())):
        near(case(given, reduction=reduction), total, 10 * rtol, reduction)
    assert all(torch.equal(x.detach(), before[n]) for n, x in given.items()), "written over"


@each
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_values_and_gradients(case, dtypes):
    checked(case, case.leaves(*dtypes))


@each
def test_a_float32_latent_among_others(case):
    """Each in its own dtype; what learns is what a network gives in bfloat16."""
    low = {n: x.detach().bfloat16().requires_grad_() for n, x in case.leaves().items() if n in case.learns}
    checked(case, {**case.leaves(torch.float32, torch.float64), **low})


ATTACHED = (sid_loss, sim_loss)  # what they predict depends on the sample, which learns through it
LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "every other": lambda x: torch.stack((x, -x), -1)[..., 0],
    "reversed": lambda x: x.flip(0).contiguous().flip(0),
}


@each
def test_layouts(case):
    given = case.leaves()
    want = case(given, reduction="none")
    expected = gradients(want.sum(), given)
    for name, layout in LAYOUTS.items():
        moved = {n: layout(x.detach()) if x.dim() > 1 else x.detach().expand(2, -1)[0] for n, x in given.items()}
        moved = {n: x.requires_grad_() for n, x in moved.items()}
        got = case(moved, reduction="none")
        near(got, want, 1e-12, name)
        for n, g in gradients(got.sum(), moved).items():  # the upstream gradient is one number, expanded
            near(g, expected[n], 1e-12, name)
    rows = {n: x[:1].detach().expand_as(x) for n, x in given.items()}
    near(case(rows, reduction="none"), case({n: x.clone() for n, x in rows.items()}, reduction="none"), 1e-12)
    for shape in ((-1, 1, 1), (-1, 1)):
        tall = {n: x.detach().reshape(shape) if x.dim() == 1 else x.detach() for n, x in given.items()}
        assert torch.equal(
            case(tall, reduction="none"), case({n: x.detach() for n, x in given.items()}, reduction="none")
        )


@each
def test_which_require_a_gradient(case):
    """Each alone has the gradient that it has with the others; a second backward has it again; no_grad has no graph."""
    given = case.leaves()
    loss = case(given)
    expected, again = gradients(loss, given), gradients(loss, given)
    for n, x in given.items():
        near(again[n], expected[n], 0, n)
        alone = {m: y.detach().clone().requires_grad_(m == n) for m, y in given.items()}
        if case.loss in ATTACHED and n == "sample":
            with pytest.raises(ValueError, match="must carry the sample's gradient"):
                case(alone)
            continue
        loss = case(alone)
        assert loss.requires_grad == (n in case.learns), n
        if loss.requires_grad:
            near(torch.autograd.grad(loss, alone[n])[0], expected[n], 1e-12, n)
        assert x.grad is None
    with torch.no_grad():
        assert not case(given).requires_grad


@each
@pytest.mark.parametrize("on_nan", ["raise", "mask"])
def test_within_vmap_and_grad(case, on_nan):
    """Sample by sample, and over copies of the batch."""
    given = case.leaves()
    want, expected = case(given, reduction="none"), gradients(case(given, reduction="sum"), given)
    given = {n: x.detach() for n, x in given.items()}

    def loss(x, **settings):
        found = case(x, on_nan=on_nan, **settings)
        return found if on_nan == "raise" else found[0]

    near(torch.func.vmap(lambda x: loss({n: y[None] for n, y in x.items()}))(given), want, 1e-12)
    first = case.learns[0]
    many = torch.stack((given[first], given[first].flip(0)))
    got = torch.func.vmap(lambda y: loss({**given, first: y}, reduction="none"))(many)
    near(got[0], want, 1e-12)
    found = torch.func.grad(lambda ys: loss({**given, **ys}, reduction="sum"))({n: given[n] for n in case.learns})
    for n, g in found.items():
        near(g, expected[n], 1e-12, n)
    if on_nan == "raise":
        many[1, 2] = torch.nan
        with pytest.raises(FloatingPointError, match="samples is not finite"):
            torch.func.vmap(lambda y: loss({**given, first: y}))(many)


@each
def test_order_and_number_of_samples(case):
    given = {n: x.clone() for n, x in case.inputs.items()}
    losses, order = case(given, reduction="none"), torch.tensor([2, 0, 3, 1])
    near(case({n: x[order] for n, x in given.items()}, reduction="none"), losses[order], 1e-12)
    if not case.couples:
        for some in (slice(1, 3), slice(2, 3)):
            near(case({n: x[some] for n, x in given.items()}, reduction="none"), losses[some], 1e-12)
        twice = {n: torch.cat((x, x)) for n, x in given.items()}
        near(case(twice), case(given), 1e-12)
        for on_nan in ("raise", "mask"):
            none = {n: x[:0].clone().requires_grad_() for n, x in given.items()}
            for reduction in ("mean", "sum", "none"):
                loss = case(none, reduction=reduction, on_nan=on_nan)
                loss, masked = loss if on_nan == "mask" else (loss, 0)
                assert masked == 0 and loss.shape == ((0,) if reduction == "none" else ()) and not loss.any()
                assert all(g.shape == none[n].shape for n, g in gradients(loss.sum(), none).items())


def masks(case, given, count=1):
    """Sample 1 is left out and counted, the others are as without it; gradients are finite, and 0 for it."""
    losses, masked = case(given, reduction="none", on_nan="mask")
    assert masked == count and losses[1] == 0 and losses.isfinite().all()
    mean, kept = case(given, on_nan="mask")[0], [0, 2, 3]
    found = gradients(mean, given)
    for n, g in found.items():
        assert g.isfinite().all() and not g[1].any(), n
    if not case.couples:
        others = {n: x.detach()[kept].requires_grad_() for n, x in given.items()}
        rtol = 1e-12 if losses.dtype == torch.float64 else 1e-6
        near(losses[kept], case(others, reduction="none"), rtol)
        near(mean, case(others), rtol)
        for n, g in gradients(case(others), others).items():
            near(found[n][kept], g, rtol, n)


@each
def test_samples_that_are_not_finite(case):
    for name, x in case.inputs.items():
        if x.dim() == 1:
            continue
        for bad in (float("nan"), float("inf")):
            given = case.leaves()
            with torch.no_grad():
                given[name][1, 0, 2] = bad
            with pytest.raises(FloatingPointError, match=r"of 4 samples is not finite: .*on_nan='mask'"):
                case(given)
            masks(case, given)


@pytest.mark.parametrize("case", CONTINUOUS.values(), ids=CONTINUOUS.keys())
def test_samples_whose_loss_overflows(case):
    """Finite inputs, a loss that is not, and no NaN in a gradient; a clamp, and a factor of 0, may keep it finite."""
    counts = []
    for name, x in case.inputs.items():
        given = case.leaves(torch.float32)
        if x.dim() > 1:
            with torch.no_grad():
                given[name][1] *= 1e30
            loss, masked = case(given, on_nan="mask")
            counts.append(int(masked))
            assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, given).values()), name
            if masked:
                masks(case, given)
    assert any(counts)


@each
def test_no_sample_is_finite(case):
    given = case.leaves()
    with torch.no_grad():
        given[case.learns[0]].fill_(torch.nan)
    loss, masked = case(given, on_nan="mask")
    assert loss == 0 and masked == 4 and not any(g.any() for g in gradients(loss, given).values())


# one for each loss: settings choose among lines that others have, too
ONCE = {case.loss: name for name, case in reversed(CASES.items())}.values()
once = pytest.mark.parametrize("case", [CASES[name] for name in ONCE], ids=ONCE)


@once
def test_compiled(case):
    """Nothing looks at values there, those of times included: a NaN is left out, whatever it is of."""
    torch._dynamo.reset()
    f = torch.compile(lambda x, y: (case(x), *case(y, on_nan="mask")), fullgraph=True, backend="aot_eager")
    good, given = case.leaves(torch.float32), case.leaves(torch.float32)
    want = case(good)
    expected = gradients(want, good)
    loss, rest, masked = f(good, given)
    assert masked == 0
    for found, x in ((loss, good), (rest, given)):
        near(found, want, 1e-6)
        for n, g in gradients(found, x).items():
            near(g, expected[n], 1e-5, n)
    for name in case.inputs:
        given = case.leaves(torch.float32)
        with torch.no_grad():
            given[name][1] = torch.nan
        _, rest, masked = f(good, given)
        assert masked == 1, name
        if not case.couples:
            near(rest, case({n: x[[0, 2, 3]] for n, x in given.items()}), 1e-6, name)
        for n, g in gradients(rest, given).items():
            assert g.isfinite().all() and not g[1].any(), (name, n)
        with pytest.raises(RuntimeError, match="the loss of a sample is not finite; on_nan='mask'"):
            f(given, good)


@pytest.mark.parametrize(("name", "dynamic"), [("sCM, log variance", True), ("TVM", False)])
def test_inductor(name, dynamic):
    """One of each, the slowest."""
    torch._dynamo.reset()
    case = CASES[name]
    f = torch.compile(lambda x: case(x, on_nan="mask"), fullgraph=True, dynamic=dynamic)
    for some in (slice(4), slice(3)) if dynamic else (slice(4),):
        given, again = ({n: x.detach()[some] for n, x in case.leaves(torch.float32).items()} for _ in range(2))
        for x in (*given.values(), *again.values()):
            x.requires_grad_()
        (found, masked), want = f(given), case(again)
        near(found, want, 1e-6)
        assert masked == 0
        found.backward()
        for n, g in gradients(want, again).items():
            near(torch.zeros_like(g) if given[n].grad is None else given[n].grad, g, 1e-5, n)


@each
def test_bad_input(case):
    given = dict(case.inputs)
    for name, x in given.items():
        shorter = {**given, name: x[:, :2] if x.dim() > 1 else x[:3]}
        with pytest.raises(ValueError, match="must have shape"):
            case(shorter)
        with pytest.raises(TypeError, match=f"{name} must be float32"):
            case({**given, name: x.to(torch.int64)})
        with pytest.raises(ValueError, match="on one device"):
            case({**given, name: x.to("meta")})
        with pytest.raises(TypeError, match=f"{name} must be a (tensor|number)"):
            case({**given, name: "x"})
    for name in ("reduction", "on_nan"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            case(given, **{name: "no"})


OUTSIDE = [
    pytest.param(case, wrong, id=f"{name}, {wrong:g}")
    for name, case in CASES.items()
    for wrong in ((-0.1,) if "EDM" in name else (-0.1, 1e9))  # EDM's times have no end
    if "t" in case.inputs
]


@pytest.mark.parametrize(("case", "wrong"), OUTSIDE)
def test_times_outside_where_nobody_looks(case, wrong):
    """They count as NaN."""
    torch._dynamo.reset()
    f = torch.compile(lambda x: case(x, on_nan="mask"), fullgraph=True, backend="aot_eager")
    given = case.leaves(torch.float32)
    with torch.no_grad():
        given["t"][1] = wrong
    with pytest.raises(ValueError, match="t must be a time from"):
        case(given)
    loss, masked = f(given)
    assert masked == 1 and loss.isfinite()
    for n, g in gradients(loss, given).items():
        assert g.isfinite().all() and not g[1].any(), n
