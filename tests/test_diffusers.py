"""Transformers of diffusers in forward mode: values, tangents and gradients against the math path, and what stands in
their way. The truth knows no forward mode: reverse over reverse through the math path and a layer_norm written out."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from fastkd.attend import public
from fastkd.diffusion import network_jvp
from fastkd.integrations.diffusers import use_attention

diffusers = __import__("diffusers")  # after the test of that name, to whom sorts imports
pytestmark = [pytest.mark.cpu("torch's rules and diffusers' modules"), pytest.mark.real]

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
IMAGE = {"sample_size": 8, "patch_size": 2, "in_channels": 4}
SHOWN = torch.arange(5) < torch.tensor([[5], [3]])  # the second text is padded


def text(x, width=12):
    return torch.linspace(-1, 1, 10 * width, dtype=x.dtype).cos().view(2, 5, width)


def pooled(x):
    return text(x, 10)[:, 0]


def dit(**more):
    model = diffusers.DiTTransformer2DModel(**HEADS, **IMAGE, **more, num_layers=2, num_embeds_ada_norm=10)
    return model, lambda x, t: model(x, timestep=t, class_labels=torch.tensor([1, 2])).sample, (4, 8, 8)


def sd3():
    widths = {"caption_projection_dim": 32, "joint_attention_dim": 12, "pooled_projection_dim": 10}
    model = diffusers.SD3Transformer2DModel(**HEADS, **IMAGE, **widths, num_layers=2, pos_embed_max_size=16)

    def call(x, t):
        return model(x, timestep=t, encoder_hidden_states=text(x), pooled_projections=pooled(x)).sample

    return model, call, (4, 8, 8)


def flux():
    widths = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8)}
    model = diffusers.FluxTransformer2DModel(**HEADS, **widths, num_layers=1, num_single_layers=1, in_channels=4)
    ids = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1)

    def call(x, t):
        given = {"encoder_hidden_states": text(x), "pooled_projections": pooled(x), "txt_ids": torch.zeros(5, 3)}
        return model(x, timestep=t, img_ids=ids, **given).sample

    return model, call, (16, 4)


def wan():  # video; cross-attention, norms of query and key over all heads
    widths = {"text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "in_channels": 4, "out_channels": 4}
    model = diffusers.WanTransformer3DModel(**HEADS, **widths, num_layers=2, patch_size=(1, 2, 2))
    return model, lambda x, t: model(x, timestep=t, encoder_hidden_states=text(x)).sample, (4, 3, 8, 8)


def pixart():  # an additive mask
    widths = {"cross_attention_dim": 32, "caption_channels": 12, "out_channels": 8}
    model = diffusers.PixArtTransformer2DModel(**HEADS, **IMAGE, **widths, num_layers=2)
    given = {"encoder_attention_mask": SHOWN.long(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return model, lambda x, t: model(x, timestep=t, encoder_hidden_states=text(x), **given).sample, (4, 8, 8)


def hunyuan():  # a boolean mask, guidance
    layers = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1}
    widths = {"text_embed_dim": 12, "pooled_projection_dim": 10, "rope_axes_dim": (4, 4, 8), "in_channels": 4}
    model = diffusers.HunyuanVideoTransformer3DModel(**HEADS, **layers, **widths, out_channels=4, guidance_embeds=True)

    def call(x, t):
        given = {"encoder_hidden_states": text(x), "pooled_projections": pooled(x), "guidance": x.new_full((2,), 6.0)}
        return model(x, timestep=t, encoder_attention_mask=SHOWN, **given).sample

    return model, call, (4, 2, 4, 4)


def cogvideox():  # rotary embeddings that reach the processor by name
    sizes = {"sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 5, "num_layers": 2}
    widths = {"time_embed_dim": 8, "text_embed_dim": 12, "in_channels": 4, "out_channels": 4}
    model = diffusers.CogVideoXTransformer3DModel(**HEADS, **sizes, **widths, use_rotary_positional_embeddings=True)
    angles = torch.linspace(0, 9, 48 * 16, dtype=torch.float64).view(48, 16)

    def call(x, t):
        rope = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        return model(x, timestep=t, encoder_hidden_states=text(x), image_rotary_emb=rope).sample

    return model, call, (3, 4, 8, 8)


def qwen():  # complex rotary embeddings
    widths = {"joint_attention_dim": 12, "axes_dims_rope": (4, 4, 8), "in_channels": 4, "out_channels": 4}
    model = diffusers.QwenImageTransformer2DModel(**HEADS, **widths, num_layers=2, patch_size=1)
    given = {"encoder_hidden_states_mask": SHOWN, "img_shapes": [[(1, 4, 4)]] * 2}
    return model, lambda x, t: model(x, timestep=t, encoder_hidden_states=text(x), **given).sample, (16, 4)


def longcat():  # calls F.layer_norm without a module
    widths = {"dit_dim": 32, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 4}
    model = diffusers.LongCatAudioDiTTransformer(**widths, dit_depth=2, dropout=0.0)
    given = {"encoder_attention_mask": SHOWN}
    return model, lambda x, t: model(x, timestep=t, encoder_hidden_states=text(x), **given).sample, (8, 4)


NAMED = [dit, sd3, flux, wan]
FAMILIES = [*NAMED, pixart, hunyuan, cogvideox, qwen, longcat]
FLOAT32_WITHIN = (wan, longcat)
of_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
of_named = pytest.mark.parametrize("family", NAMED, ids=lambda f: f.__name__)


def drawn(family, dtype=torch.float64, **more):
    """model, function of x and t, (x, t), (tangents); no parameter is 0 or 1 throughout"""
    torch.manual_seed(0)
    model, function, shape = family(**more)
    model.eval().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.dim() < 2 or not p.any() else None
    x, tx = torch.randn(2, 2, *shape, dtype=torch.float64).to(dtype)
    t = torch.tensor([0.3, 0.7], dtype=dtype)
    return model.to(dtype), function, (x, t), (tx, torch.ones_like(t))


class WrittenOut(TorchFunctionMode):
    """F.layer_norm in plain PyTorch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (layer_norm if func is F.layer_norm else func)(*args, **kwargs or {})


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * (1 if weight is None else weight) + (0 if bias is None else bias)


def gradients(model, loss):
    return torch.autograd.grad(loss, [*model.parameters()], allow_unused=True, retain_graph=True)


def forward(model, function, xs, ts):
    """Output, tangent, and the gradients of both to all parameters."""
    out, tangent = torch.func.jvp(function, xs, ts)
    return out, tangent, *gradients(model, (out.double().sin() * tangent).sum())


def double_backward(model, function, xs, ts):
    out, tangent = torch.autograd.functional.jvp(function, xs, ts, create_graph=True)
    return out, tangent, *gradients(model, (out.double().sin() * tangent).sum())


def true(*given):
    with sdpa_kernel(SDPBackend.MATH), WrittenOut():
        return double_backward(*given)


def math_path(*given):
    with sdpa_kernel(SDPBackend.MATH), WrittenOut():
        return forward(*given)


def errors(got, want):
    """Of the output, of the tangent, and of all gradients together, relative."""
    assert [g is None for g in got] == [w is None for w in want]
    got, want = ([y[0], y[1], torch.cat([g.flatten() for g in y[2:] if g is not None])] for y in (got, want))
    return [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]


@of_family
def test_float64(family):
    given = drawn(family)
    want = true(*given)
    assert all(w.any() for w in want[:2]) and sum(w.abs().max() > 1e-3 for w in want[2:] if w is not None) > 20
    assert use_attention(given[0]) > 0
    got = forward(*given)
    tolerance = 1e-6 if family in FLOAT32_WITHIN else 1e-10
    assert max(errors(got, want)) < tolerance
    assert (max(errors(got, want)) > 1e-10) == (family in FLOAT32_WITHIN)
    size = max(w.abs().max() for w in want[2:] if w is not None).item()
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance * size)


@of_family
def test_float32_is_as_exact_as_the_math_path(family):
    want = true(*drawn(family))
    given = drawn(family, torch.float32)
    base = errors(math_path(*given), want)
    use_attention(given[0])
    for got, allowed in zip(errors(forward(*given), want), base, strict=True):
        assert got <= 2 * min(allowed, 1e-4) + 1e-6


@of_named
def test_autocast(family):
    given = drawn(family, torch.float32)
    want = [y if y is None else y.double() for y in math_path(*given)]
    with torch.autocast("cpu", torch.bfloat16):
        base = errors(math_path(*given), want)
        use_attention(given[0])
        got = forward(*given)
    assert got[0].dtype == torch.bfloat16
    for error, allowed in zip(errors(got, want), base, strict=True):
        assert error <= 2 * min(allowed, 0.02)


@of_family
def test_the_time_alone(family):
    model, function, (x, t), (_, dt) = drawn(family)
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.func.jvp(lambda t: function(x, t), (t,), (dt,))
    use_attention(model)
    got = torch.func.jvp(lambda t: function(x, t), (t,), (dt,))
    assert want[1].any()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * want[1].abs().max().item())


@of_named
def test_detached(family):
    model, function, xs, ts = drawn(family)
    want = true(model, function, xs, ts)
    constant = want[1].detach()
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradients(model, (function(*xs).sin() * constant).sum())
    use_attention(model, "detach")
    out, tangent = torch.func.jvp(function, xs, ts)
    for loss in (out.sin() * constant).sum(), (out.sin() * tangent.detach()).sum():
        assert max(errors((out, tangent, *gradients(model, loss)), (*want[:2], *plain))) < 1e-6
    through = errors((out, tangent, *gradients(model, (out.sin() * tangent).sum())), want)
    assert through[2] > 1e-3  # what attention takes for constant is missing


def called(monkeypatch, model, function, xs, ts):
    """The tangent, and the settings that attention was called with."""
    seen = []
    run = public._run
    monkeypatch.setattr(public, "_run", lambda *a, **k: seen.append((k["tangent_grad"], k["backend"])) or run(*a, **k))
    tangent = torch.func.jvp(function, xs, ts)[1]
    monkeypatch.undo()
    return tangent, seen


@of_named
def test_once_more_changes_the_settings(family, monkeypatch):
    given = drawn(family)
    count = use_attention(given[0])
    want, seen = called(monkeypatch, *given)
    assert seen == count * [("full", None)]
    assert use_attention(given[0], "detach", "torch") == count
    tangent, seen = called(monkeypatch, *given)
    assert seen == count * [("detach", "torch")]
    torch.testing.assert_close(tangent, want)


@pytest.mark.parametrize("remade", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_keep_it_and_their_own_weights(remade):
    model, _, xs, ts = drawn(sd3)
    use_attention(model)
    other = remade(model)
    given = {"encoder_hidden_states": text(xs[0]), "pooled_projections": pooled(xs[0])}
    walk = lambda m: torch.func.jvp(lambda x, t: m(x, timestep=t, **given).sample, xs, ts)  # noqa: E731
    torch.testing.assert_close(walk(other), walk(model))
    before = walk(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    torch.testing.assert_close(walk(model), before, rtol=0, atol=0)
    assert (walk(other)[1] - before[1]).norm() > 0.1 * before[1].norm()


def test_what_is_saved_is_the_plain_model(tmp_path):
    model, _, xs, _ = drawn(sd3, torch.float32)
    signature, keys = inspect.signature(model.forward), list(model.state_dict())
    use_attention(model)
    assert inspect.signature(model.forward) == signature and list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).eval()
    given = {"encoder_hidden_states": text(xs[0]), "pooled_projections": pooled(xs[0])}
    with torch.no_grad():
        torch.testing.assert_close(*(m(*xs[:1], timestep=xs[1], **given).sample for m in (model, other)))


@pytest.mark.parametrize("family", [sd3, flux, cogvideox], ids=lambda f: f.__name__)
def test_other_processors_are_served_too(family):
    model, function, xs, ts = drawn(family)
    use_attention(model)
    want = torch.func.jvp(function, xs, ts)
    kinds = {type(p) for p in model.attn_processors.values()}
    model.fuse_qkv_projections()
    torch.testing.assert_close(torch.func.jvp(function, xs, ts), want)
    model.unfuse_qkv_projections()
    model.set_attn_processor({name: type(p)() for name, p in model.attn_processors.items()})
    assert {type(p) for p in model.attn_processors.values()} == kinds
    torch.testing.assert_close(torch.func.jvp(function, xs, ts), want)


@pytest.mark.parametrize("way", ["jvp of vmap", "vmap of jvp", "jvp of jvp", "jvp of grad", "grad of jvp"])
def test_other_transforms(way):
    attn = drawn(flux)[0].transformer_blocks[0].attn
    x, t = torch.randn(2, 3, 2, 9, 32, dtype=torch.float64)
    call = lambda x: attn(x, encoder_hidden_states=text(x, 32))[0]  # noqa: E731
    along = lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1]  # noqa: E731
    walks = {
        "jvp of vmap": lambda: along(torch.vmap(call), x, t),
        "vmap of jvp": lambda: torch.vmap(lambda x, t: along(call, x, t))(x, t),
        "jvp of jvp": lambda: along(lambda x: along(call, x, t[0]), x[0], t[1]),
        "jvp of grad": lambda: along(torch.func.grad(lambda x: call(x).sin().sum()), x[0], t[0]),
        "grad of jvp": lambda: torch.func.grad(lambda x: along(call, x, t[0]).sin().sum())(x[0]),
    }
    with sdpa_kernel(SDPBackend.MATH), WrittenOut():
        want = walks[way]()
    use_attention(attn)
    torch.testing.assert_close(walks[way](), want)


def test_compiled():
    model = drawn(flux)[0]
    attn, x = model.transformer_blocks[0].attn, torch.randn(2, 9, 32, dtype=torch.float64)

    def walk(x, tx):
        return torch.func.jvp(lambda x: attn(x, encoder_hidden_states=text(x, 32))[0], (x,), (tx,))

    with sdpa_kernel(SDPBackend.MATH):
        want = walk(x, x.flip(0))
    use_attention(model)
    torch._dynamo.reset()
    got = torch.compile(walk, fullgraph=True, backend="aot_eager")(x, x.flip(0))
    torch.testing.assert_close(got, want)


# what stands in the way, in the order of the module's list


@of_family
def test_fused_attention_refuses(family):
    _, function, xs, ts = drawn(family)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(function, xs, ts)


@pytest.mark.parametrize("way", [forward, double_backward])
@pytest.mark.parametrize("family", [dit, sd3], ids=lambda f: f.__name__)
def test_gradients_of_torchs_layer_norm_are_wrong(family, way):
    given = drawn(family)
    want = true(*given)
    with sdpa_kernel(SDPBackend.MATH):
        out, tangent, wrong = errors(way(*given), want)
    assert max(out, tangent) < 1e-12 and wrong > 0.02


def test_attention_backends():
    model, function, xs, ts = drawn(flux)
    want = true(model, function, xs, ts)[:2]
    use_attention(model)
    try:
        model.set_attention_backend("flex")
        with pytest.raises(RuntimeError, match="functorch"):
            torch.func.jvp(function, xs, ts)
    finally:
        model.set_attention_backend("native")
    for backend in ("native", "_native_math", "_native_flash", "_native_efficient"):
        with diffusers.models.attention_dispatch.attention_backend(backend):
            torch.testing.assert_close(torch.func.jvp(function, xs, ts), want)


@torch.library.custom_op("fastkd_test::foreign", mutates_args=())
def foreign(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()


def test_kernels_without_a_rule(monkeypatch):
    model, function, xs, ts = drawn(flux)
    there = diffusers.models.transformers.transformer_flux
    monkeypatch.setattr(there, "dispatch_attention_fn", lambda q, k, v, **_: foreign(q, k, v))
    assert not torch.func.jvp(lambda q: foreign(q, q, q), (torch.ones(1, 4, 2, 8),), (torch.ones(1, 4, 2, 8),))[1].any()
    plain = torch.func.jvp(function, xs, ts)[1]  # without a word
    use_attention(model)
    with pytest.raises(NotImplementedError, match=r"fastkd_test.foreign.* has no forward-mode rule"):
        torch.func.jvp(function, xs, ts)
    monkeypatch.setattr(there, "dispatch_attention_fn", lambda q, k, v, **_: (q + k + v).detach())
    with pytest.raises(RuntimeError, match=r"tangent ends in FluxAttnProcessor.*set_attention_backend\('native'\)"):
        torch.func.jvp(function, xs, ts)
    monkeypatch.undo()
    assert (torch.func.jvp(function, xs, ts)[1] - plain).norm() > 0.01 * plain.norm()
    function(*xs)  # no tangents, no error


class Opaque(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class Network(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x, timestep=t, class_labels=torch.tensor([1, 2])).sample


def test_a_layer_without_a_rule_is_named_by_network_jvp():
    model, function, xs, ts = drawn(dit)
    use_attention(model)
    want = torch.func.jvp(function, xs, ts)[1]
    torch.testing.assert_close(network_jvp(Network(model), xs, ts)[1], want)
    model.transformer_blocks[1].ff.net[2].__class__ = Opaque
    assert (torch.func.jvp(function, xs, ts)[1] - want).norm() > 0.01 * want.norm()  # without a word
    with pytest.raises(RuntimeError, match=r"transformer_blocks.1.ff.net.2' \(Opaque\)"):
        network_jvp(Network(model), xs, ts)


def test_a_model_that_loses_the_tangent():
    model, function, (x, t), (tx, _) = drawn(dit)
    use_attention(model)
    model.pos_embed.proj.__class__ = type("Cut", (nn.Conv2d,), {"forward": lambda self, x: x.new_zeros(2, 32, 4, 4)})
    with pytest.raises(RuntimeError, match="tangent ends in DiTTransformer2DModel"):
        torch.func.jvp(lambda x: function(x, t), (x,), (tx,))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class TwiceInOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    backward = Twice.backward


@pytest.mark.parametrize("function, error", [(TwiceInOne, "setup_context"), (Twice, "jvp function")])
def test_autograd_functions_refuse(function, error):
    with pytest.raises(RuntimeError, match=error):
        torch.func.jvp(function.apply, (torch.ones(2),), (torch.ones(2),))


def test_checkpointing():
    model, function, xs, ts = drawn(sd3)
    use_attention(model)
    want, plain = forward(model, function, xs, ts), gradients(model, function(*xs).sin().sum())
    model.train()  # where diffusers checkpoints; there is no dropout
    model.enable_gradient_checkpointing()
    for g, w in zip(gradients(model, function(*xs).sin().sum()), plain, strict=True):
        torch.testing.assert_close(g, w)
    with pytest.raises(CheckpointError):
        forward(model, function, xs, ts)
    model.disable_gradient_checkpointing()
    assert max(errors(forward(model, function, xs, ts), want)) < 1e-12

    def around(x, t, dx, dt):
        return checkpoint(lambda *a: torch.func.jvp(function, a[:2], a[2:]), x, t, dx, dt, use_reentrant=False)

    out, tangent = around(*xs, *ts)
    assert max(errors((out, tangent, *gradients(model, (out.sin() * tangent).sum())), want)) < 1e-12


@of_named
def test_integer_timesteps(family):
    model, function, (x, t), (tx, dt) = drawn(family)
    use_attention(model)
    x_alone = torch.func.jvp(lambda x: function(x, (t * 10).long()), (x,), (tx,))[1]
    silent = torch.func.jvp(lambda x, t: function(x, (t * 10).long()), (x, t), (tx, dt))[1]
    torch.testing.assert_close(silent, x_alone)
    assert not torch.func.jvp(lambda t: function(x, (t * 10).long()), (t,), (dt,))[1].any()
    with pytest.raises(ValueError, match="floating point"):
        torch.func.jvp(lambda t: function(x, t), ((t * 10).long(),), (dt.long(),))
    torch.testing.assert_close(function(x, (t * 10).long()), function(x, (t * 10).long().to(t.dtype)))


def test_no_grad_and_inference_mode():
    model, function, xs, ts = drawn(sd3)
    use_attention(model)
    want = torch.func.jvp(function, xs, ts)[1]
    for tangent in (
        torch.func.jvp(torch.no_grad()(function), xs, ts)[1],
        torch.inference_mode()(torch.func.jvp)(function, xs, ts)[1],
    ):
        torch.testing.assert_close(tangent, want)
        assert want.requires_grad and not tangent.requires_grad
    with pytest.raises(RuntimeError, match="inference tensor"):
        torch.func.jvp(torch.inference_mode()(function), xs, ts)


def test_train_mode_draws_anew():
    model, function, xs, ts = drawn(dit, dropout=0.5)
    use_attention(model)
    walks = lambda: [torch.func.jvp(function, xs, ts)[1] for _ in range(2)]  # noqa: E731
    assert torch.equal(*walks())
    model.train()
    assert not torch.equal(*walks())


@pytest.mark.parametrize("dim", [1, 2], ids=["rows", "images"])
def test_group_norm_is_right(dim):
    x, t = torch.randn(2, 2, 8, *([5] * dim), dtype=torch.float64)

    def by_hand(x):
        y = x.unflatten(1, (2, 4)).flatten(2)
        y = y - y.mean(-1, keepdim=True)
        return (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view_as(x)

    def all_of(function):
        x.requires_grad_()
        out, tangent = torch.func.jvp(function, (x,), (t,))
        return out, tangent, *torch.autograd.grad((out.sin() * tangent).sum(), x)

    torch.testing.assert_close(all_of(lambda x: F.group_norm(x, 2)), all_of(by_hand))


@pytest.mark.parametrize(
    "model, kwargs, error, message",
    [
        ("transformer", {}, TypeError, "model must be a torch.nn.Module, such as pipeline.transformer, got str"),
        (nn.Linear(1, 1), {}, ValueError, "model must have attention processors, got a Linear without any"),
        (nn.Linear(1, 1), {"tangent_grad": "some"}, ValueError, "tangent_grad must be one of .*, got 'some'"),
    ],
)
def test_bad_input(model, kwargs, error, message):
    with pytest.raises(error, match=message):
        use_attention(model, **kwargs)


def test_an_unknown_backend_is_named():
    model, function, xs, ts = drawn(dit)
    with pytest.raises(ValueError, match="some"):
        use_attention(model, backend="some")
        torch.func.jvp(function, xs, ts)
