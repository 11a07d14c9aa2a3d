"""Mutation of the losses of few-step generators: breaks them in one place at a time and expects their tests to go red.

    python tests/mutate_diffusion.py [WORD ...]     only the mutants whose name holds one of the words

Works on a temporary copy of the tree, every test in a fork. Exit status 1 if a mutant survives.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
from mutate import copy_to, forked, in_turn

COPIED = ("fastkd", "tests", "pyproject.toml")
CONTINUOUS = "fastkd/diffusion/continuous.py"
CRITICS = "fastkd/diffusion/critics.py"
DISCRETE = "fastkd/diffusion/discrete.py"
MATCHING = "fastkd/diffusion/matching.py"
NETWORK = "fastkd/diffusion/network.py"
PATHS = "fastkd/diffusion/paths.py"
SAMPLES = "fastkd/diffusion/samples.py"
FORWARD_MODE = "fastkd/forward_mode.py"
LOSSES = "tests/test_diffusion_losses.py"
# the tests that go red soonest, then the others
FILES = {
    CONTINUOUS: (LOSSES, "tests/test_diffusion_continuous.py"),
    CRITICS: (LOSSES, "tests/test_diffusion_matching.py"),
    DISCRETE: (LOSSES, "tests/test_diffusion_discrete.py"),
    MATCHING: (LOSSES, "tests/test_diffusion_matching.py"),
    FORWARD_MODE: ("tests/test_diffusion_network.py",),
    NETWORK: ("tests/test_diffusion_network.py",),
    PATHS: ("tests/test_diffusion_paths.py", LOSSES, "tests/test_diffusion_discrete.py"),
    SAMPLES: (LOSSES, "tests/test_diffusion_continuous.py", "tests/test_diffusion_paths.py"),
}
MUTANTS = {  # name: (file, text, its replacement)
    "sCM: data term's sign": (
        CONTINUOUS,
        "return -samples.along(rate, x) * off.detach()",
        "return samples.along(rate, x) * off.detach()",
    ),
    "sCM: F of g not a constant": (
        CONTINUOUS,
        "samples.along(rate, x) * off.detach() -",
        "samples.along(rate, x) * off -",
    ),
    "sCM: warmup dropped": (CONTINUOUS, "- r * (samples.along(turn, x)", "- (samples.along(turn, x)"),
    "sCM: x_t's rate": (CONTINUOUS, "_once(rate, u.cos() * u.sin())", "_once(rate, u.cos())"),
    "sCM: rates exchanged": (CONTINUOUS, "rate, turn = _once(", "turn, rate = _once("),
    "sCM: tangent's sign": (CONTINUOUS, "* x + tF)", "* x - tF)"),
    "sCM: cos for cos^2": (CONTINUOUS, "_tangent(u, u.cos().square(), s * F - v", "_tangent(u, u.cos(), s * F - v"),
    "sCM: sigma_data of F dropped": (CONTINUOUS, "s * F - v, r, x, s * tF", "F - v, r, x, s * tF"),
    "sCM: sigma_data of the tangent dropped": (CONTINUOUS, "r, x, s * tF), c)", "r, x, tF), c)"),
    "sCM: log variance's sign": (CONTINUOUS, "return (-lv).exp() * squares + lv", "return lv.exp() * squares + lv"),
    "sCM: log variance not added": (CONTINUOUS, "return (-lv).exp() * squares + lv", "return (-lv).exp() * squares"),
    "sCM: log variance a constant": (
        CONTINUOUS,
        "return (-lv).exp() * squares + lv",
        "return (-lv.detach()).exp() * squares + lv.detach()",
    ),
    "sCM: sigma_data of the prior weight dropped": (CONTINUOUS, "squares / (s * u.tan())", "squares / u.tan()"),
    "sCM: direction without sigma_data": (
        CONTINUOUS,
        "(rate * velocity.double() / s).to",
        "(rate * velocity.double()).to",
    ),
    "sCM: direction of time": (
        CONTINUOUS,
        "(t.double().cos() * t.double().sin()).to(t.dtype)",
        "t.double().cos().to(t.dtype)",
    ),
    "sCM: direction rounded twice": (
        CONTINUOUS,
        "(rate * velocity.double() / s)",
        "(rate.to(velocity.dtype) * velocity / s)",
    ),
    "normalisation: c dropped": (CONTINUOUS, "scale = 1 / (samples.norm(g) + c)", "scale = 1 / samples.norm(g)"),
    "normalisation: value not squared": (
        CONTINUOUS,
        "scale.square() * samples.mean(g.square())",
        "scale * samples.mean(g.square())",
    ),
    "normalisation: gradient's factor": (
        CONTINUOUS,
        "- 2 * scale * samples.still(F, g)",
        "- scale * samples.still(F, g)",
    ),
    "normalisation: gradient's sign": (
        CONTINUOUS,
        "- 2 * scale * samples.still(F, g)",
        "+ 2 * scale * samples.still(F, g)",
    ),
    "rCM: cancellation of the root": (
        CONTINUOUS,
        "(u.cos().square() + (1 - r * r) * u.sin().square()).sqrt()",
        "(1 - r * r * u.sin().square()).clamp(min=0).sqrt()",
    ),
    "rCM: warmup of the root": (CONTINUOUS, "(1 - r * r) * u.sin()", "(1 - r) * u.sin()"),
    "rCM: root alone": (CONTINUOUS, "u.cos() * root, F - v", "root, F - v"),
    "MeanFlow: warmup dropped": (CONTINUOUS, "samples.along(k * (u - w), F) * tF", "samples.along(u - w, F) * tF"),
    "MeanFlow: sign of the step": (
        CONTINUOUS,
        "F - v + samples.along(k * (u - w), F) * tF",
        "F - v - samples.along(k * (u - w), F) * tF",
    ),
    "MeanFlow: tangent learns": (
        CONTINUOUS,
        "(prediction, tangent.detach(), velocity.detach()), (u, w), reduction, on_nan)",
        "(prediction, tangent, velocity.detach()), (u, w), reduction, on_nan)",
    ),
    "MeanFlow: velocity learns": (
        CONTINUOUS,
        "(prediction, tangent.detach(), velocity.detach()), (u, w)",
        "(prediction, tangent.detach(), velocity), (u, w)",
    ),
    "adaptive: weight learns": (
        CONTINUOUS,
        "return error / (error.detach() + eps) ** p",
        "return error / (error + eps) ** p",
    ),
    "adaptive: eps dropped": (
        CONTINUOUS,
        "return error / (error.detach() + eps) ** p",
        "return error / (error.detach() + 1e-12) ** p",
    ),
    "adaptive: p dropped": (
        CONTINUOUS,
        "return error / (error.detach() + eps) ** p",
        "return error / (error.detach() + eps)",
    ),
    "AlphaFlow: shares exchanged": (
        CONTINUOUS,
        "samples.along(share, F) * v + samples.along(1 - share, F) * ahead",
        "samples.along(1 - share, F) * v + samples.along(share, F) * ahead",
    ),
    "AlphaFlow: weight dropped": (CONTINUOUS, "return share * _adaptive(", "return _adaptive("),
    "AlphaFlow: no flow matching at t = r": (CONTINUOUS, ".where(w < u, y)", ".where(w <= u, y)"),
    "AlphaFlow: clamp dropped": (CONTINUOUS, "target = _clamped(target, samples.along(most, F))", "target = target"),
    "AlphaFlow: following learns": (
        CONTINUOUS,
        "(prediction, following.detach(), velocity.detach())",
        "(prediction, following, velocity.detach())",
    ),
    "FACM: power of the share": (CONTINUOUS, "-torch.expm1(power * torch.log1p(-u))", "u"),
    "FACM: sign of the tangent": (
        CONTINUOUS,
        "F.detach() - v + samples.along(u, F) * tF",
        "F.detach() - v - samples.along(u, F) * tF",
    ),
    "FACM: F of the step learns": (CONTINUOUS, "_clamped(F.detach() - v", "_clamped(F - v"),
    "FACM: clamp dropped": (CONTINUOUS, "samples.along(u, F) * tF, 1.0)", "samples.along(u, F) * tF, 1e9)"),
    "FACM: gradient's factor": (CONTINUOUS, "+ 2 * samples.still(F, step)", "+ samples.still(F, step)"),
    "FACM: beta is a cosine": (CONTINUOUS, "(u * (torch.pi / 2)).sin()", "(u * (torch.pi / 2)).cos()"),
    "FACM: root of the weight": (CONTINUOUS, "_adaptive(error, 0.5, least)", "_adaptive(error, 1.0, least)"),
    "FACM: cosine dropped": (CONTINUOUS, "+ samples.mean(1 - cosine_similarity(flow, v, dim=1))", "+ 0"),
    "FACM: cosine of the last dimension": (
        CONTINUOUS,
        "cosine_similarity(flow, v, dim=1))",
        "cosine_similarity(flow, v, dim=-1))",
    ),
    "FACM: flow's square dropped": (CONTINUOUS, "apart = samples.mean((flow - v).square()) +", "apart = 0 *"),
    "clamp hides an infinity": (
        CONTINUOUS,
        "x.clamp(-bound, bound).where(x.isfinite(), torch.nan)",
        "x.clamp(-bound, bound)",
    ),
    "TVM: sign of the step": (
        CONTINUOUS,
        "F + samples.along(w - u, F) * dF - ema",
        "F + samples.along(u - w, F) * dF - ema",
    ),
    "TVM: tangent a constant": (
        CONTINUOUS,
        "given = prediction, tangent, target.detach()",
        "given = prediction, tangent.detach(), target.detach()",
    ),
    "TVM: target learns": (CONTINUOUS, "tangent, target.detach(), instant", "tangent, target, instant"),
    "TVM: steps of no length stay": (CONTINUOUS, "return terminal * apart +", "return terminal +"),
    "TVM: tolerance of no length": (CONTINUOUS, "> 1e-8 + 1e-5 * u", "> 0"),
    "TVM: flow dropped": (CONTINUOUS, "+ samples.mean((flow - v).square())", "+ 0 * samples.mean((flow - v).square())"),
    "order of times unchecked": (CONTINUOUS, '"at most t", w, w <= u,', '"at most t", w, w <= u + 9,'),
    "share unchecked above": (
        CONTINUOUS,
        "if not 0 <= checks.finite_number(name, value) <= 1:",
        "if not 0 <= checks.finite_number(name, value):",
    ),
    "samples: latents stay in bfloat16": (SAMPLES, "return tuple(x.to(dtype) for x in tensors)", "return tensors"),
    "samples: all latents in float32": (
        SAMPLES,
        "torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32",
        "torch.float32",
    ),
    "samples: rows in float32": (SAMPLES, "value.double().reshape(", "value.float().reshape("),
    "samples: loss widened by rows": (
        SAMPLES,
        "losses = loss(*latents, *rows).to(dtype)",
        "losses = loss(*latents, *rows)",
    ),
    "samples: masked loss widened by rows": (
        SAMPLES,
        "losses = loss(*latents, *(x.where(good, 0.5) for x in rows)).to(dtype)",
        "losses = loss(*latents, *(x.where(good, 0.5) for x in rows))",
    ),
    "samples: latents of the masked stay": (
        SAMPLES,
        "latents = tuple(x.where(good.view(-1, *(1,) * (x.dim() - 1)), 0.0) for x in latents)",
        "latents = latents",
    ),
    "samples: rows of the masked stay": (SAMPLES, "*(x.where(good, 0.5) for x in rows)", "*rows"),
    "samples: a loss that overflows is kept": (
        SAMPLES,
        "for x in (*given, loss(*given).to(dtype))]",
        "for x in given]",
    ),
    "samples: rows that are NaN are kept": (
        SAMPLES,
        "given = [x.detach() for x in latents + rows]",
        "given = [x.detach() for x in latents + tuple(x.nan_to_num() for x in rows)]",
    ),
    "samples: masked losses stay": (SAMPLES, "_total(losses.where(good, 0.0), reduction", "_total(losses, reduction"),
    "samples: mean over all": (
        SAMPLES,
        "reduction, kept.clamp(min=1)), len(losses) - kept",
        "reduction, max(len(losses), 1)), len(losses) - kept",
    ),
    "samples: none kept divides by 0": (SAMPLES, "kept.clamp(min=1))", "kept)"),
    "samples: kept counted": (SAMPLES, "len(losses) - kept", "kept"),
    "samples: mean of no sample": (SAMPLES, "max(len(losses), 1))", "len(losses))"),
    "samples: rows not checked in the loss": (
        SAMPLES,
        "for x in (losses, *rows)]).all(0)",
        "for x in (losses,)]).all(0)",
    ),
    "samples: values of vmap not looked at": (
        SAMPLES,
        "good = good if torch.compiler.is_compiling() else values(good)",
        "good = good",
    ),
    "samples: value of still": (SAMPLES, "return dot - dot.detach()", "return dot"),
    "samples: mean is a sum": (
        SAMPLES,
        "return x.flatten(1).mean(1) if x.dim() > 1 else x",
        "return x.flatten(1).sum(1) if x.dim() > 1 else x",
    ),
    "samples: last time in float32": (SAMPLES, "(t <= last))", "(t.double() <= last))"),
    "samples: times below": (
        SAMPLES,
        'checks.all_values(name, f"a time from {first:g} to {last:g}", t, (t >= first) &',
        'checks.all_values(name, f"a time from {first:g} to {last:g}", t, (t == t) &',
    ),
    "samples: a time for each entry": (SAMPLES, "or (value.dim() and len(value) != value.numel())", "or False"),
    "paths: transfer's last time": (PATHS, "r.alpha.clamp(min=0)", "r.alpha"),
    "paths: transfer's scale": (
        PATHS,
        "scale = (at.alpha + at.sigma) / (r.alpha + r.sigma)",
        "scale = at.sigma / r.sigma",
    ),
    "paths: transfer's dtype of t": (PATHS, "new.flatten().to(t.dtype)", "new.flatten()"),
    "paths: score's sign": (PATHS, 'y, source = -r.sigma * y, "eps"', 'y, source = r.sigma * y, "eps"'),
    "paths: score's sigma": (PATHS, "y = -y / r.sigma", "y = -y"),
    "paths: F without x": (PATHS, 'y, source = r.of_x * x + r.of_f * y, "v"', 'y, source = r.of_f * y, "v"'),
    "paths: x from v": (
        PATHS,
        '(r.d_sigma * x - r.sigma * y) if target == "x"',
        '(r.d_sigma * x + r.sigma * y) if target == "x"',
    ),
    "paths: eps from v": (PATHS, "(r.alpha * y - r.d_alpha * x)) / r.turn", "(r.alpha * y + r.d_alpha * x)) / r.turn"),
    "paths: turn": (
        PATHS,
        "return self.alpha * self.d_sigma - self.d_alpha * self.sigma",
        "return self.alpha * self.d_sigma + self.d_alpha * self.sigma",
    ),
    "paths: TrigFlow's sigma": (PATHS, "Rates(cos, s * sin, -sin, s * cos", "Rates(cos, sin, -sin, s * cos"),
    "paths: EDM's F": (
        PATHS,
        "t / total, -self.sigma_data / total.sqrt()",
        "t / total, self.sigma_data / total.sqrt()",
    ),
    "paths: noise's dtype of the result": (
        PATHS,
        "return (r.alpha * x_0.double() + r.sigma * noise.double()).to(x_0.dtype)",
        "return r.alpha * x_0.double() + r.sigma * noise.double()",
    ),
    "network: eval mode of a module": (
        NETWORK,
        "training = [] if owner is None else [m for m in owner.modules() if m.training]",
        "training = []",
    ),
    "network: eval mode of what runs": (NETWORK, "if module.training:", "if False:"),
    "network: not put back": (NETWORK, "m.training = True", "pass"),
    "network: method's module": (NETWORK, 'owner = getattr(network, "__self__", network)', "owner = network"),
    "network: hooks stay": (NETWORK, "handle.remove()", "pass"),
    "network: other threads": (
        NETWORK,
        "if threading.get_ident() == thread:\n            within",
        "if True:\n            within",
    ),
    "network: autocast's cache": (NETWORK, "cache_enabled=False", "cache_enabled=True"),
    "network: autocast always on": (
        NETWORK,
        "torch.autocast(device, dtype, enabled=enabled,",
        "torch.autocast(device, dtype, enabled=True,",
    ),
    "network: no autocast of the device": (NETWORK, "if not torch.amp.is_autocast_available(device):", "if False:"),
    "network: attention of torch": (NETWORK, ", replaced(tangent_grad):", ":"),
    "network: module not named": (NETWORK, 'error.args = (f"{named(within[-1])}: {error}",)', "pass"),
    "network: failed modules stay": (NETWORK, "while within.pop() is not module:", "if within.pop() is not module:"),
    "network: loss of a tangent unseen": (NETWORK, "if _loses(module, args, kwargs, out):", "if False:"),
    "network: constants are losses": (NETWORK, "return not _same(was, now) and not", "return not"),
    "network: masks are losses": (NETWORK, "and not all(map(_is_mask, was + now))", "and True"),
    "network: chance is a loss": (NETWORK, "if was[0].is_meta or not _same(was, again(False)):", "if was[0].is_meta:"),
    "network: values of what has none": (NETWORK, "if was[0].is_meta or not", "if not"),
    "network: indices out of range": (NETWORK, "torch.linspace(0.5, 0.9,", "torch.linspace(1.1, 2.0,"),
    "network: wrapped values": (NETWORK, "torch.equal(values(x), values(y))", "torch.equal(x, y)"),
    "network: lost output unseen": (NETWORK, "if not torch.compiler.is_compiling() and not moves(out):", "if False:"),
    "network: tangents of a tensor": (NETWORK, "if not isinstance(given, (tuple, list)):", "if False:"),
    "network: warmup beyond 1": (NETWORK, "return min(1.0, step / steps)", "return step / steps"),
    "consistency: target attached": (
        DISCRETE,
        "samples.reduce(loss, (prediction, target.detach()), (w.detach(),), reduction, on_nan)",
        "samples.reduce(loss, (prediction, target), (w.detach(),), reduction, on_nan)",
    ),
    "consistency: weights attached": (
        DISCRETE,
        "(prediction, target.detach()), (w.detach(),)",
        "(prediction, target.detach()), (w,)",
    ),
    "consistency: weights dropped": (
        DISCRETE,
        "return w * _distance(e if frames is None",
        "return 1 + 0 * w * _distance(e if frames is None",
    ),
    "consistency: weights not applied": (
        DISCRETE,
        "return w * _distance(e if frames is None else e.diff(dim=frames), distance, width)",
        "return _distance(e if frames is None else e.diff(dim=frames), distance, width)",
    ),
    "consistency: frames ignored": (DISCRETE, "e if frames is None else e.diff(dim=frames)", "e"),
    "consistency: c of huber": (DISCRETE, '"huber": 0.00054,', '"huber": 0.00054001,'),
    "consistency: c of elementwise": (DISCRETE, '"elementwise huber": 0.001}', '"elementwise huber": 0.00101}'),
    "consistency: norm at c 0 is a root of a mean": (
        DISCRETE,
        "return samples.norm(e) / math.sqrt(e.shape[1:].numel())",
        "return samples.mean(e.square()).sqrt()",
    ),
    "consistency: norm not divided": (
        DISCRETE,
        "return samples.norm(e) / math.sqrt(e.shape[1:].numel())",
        "return samples.norm(e)",
    ),
    "pseudo-Huber: cancellation": (
        DISCRETE,
        "return squares / ((squares + c * c).sqrt() + c)",
        "return (squares + c * c).sqrt() - c",
    ),
    "pseudo-Huber: c not squared": (DISCRETE, "(squares + c * c).sqrt() + c)", "(squares + c).sqrt() + c)"),
    "pseudo-Huber: c not added": (DISCRETE, "(squares + c * c).sqrt() + c)", "(squares + c * c).sqrt())"),
    "elementwise: mean of absolutes at c 0 only": (
        DISCRETE,
        "samples.mean(e.abs() if c == 0 else pseudo_huber(e.square(), c))",
        "samples.mean(pseudo_huber(e.square(), c))",
    ),
    "step: alpha and sigma at t": (DISCRETE, "at = path.at(end)", "at = path.at(start)"),
    "step: not a step at the ends": (DISCRETE, ".where(moves, x).to(x_t.dtype)", ".to(x_t.dtype)"),
    "step: sign of the noise": (
        DISCRETE,
        "(at.alpha * x_0 + at.sigma * eps).where",
        "(at.alpha * x_0 - at.sigma * eps).where",
    ),
    "step: float32": (DISCRETE, "y, x = prediction.double(), x_t.double()", "y, x = prediction.float(), x_t.float()"),
    "step: times not constants, at an end": (
        DISCRETE,
        "inside = start.clamp(max=path.last).where(moves, 0.5)",
        "inside = start",
    ),
    "segments: edge itself": (
        DISCRETE,
        "torch.searchsorted(edges, t.detach().contiguous())",
        "torch.searchsorted(edges, t.detach().contiguous(), right=True)",
    ),
    "segments: in the dtype of the edges": (
        DISCRETE,
        "edges = edges.detach().to(t.dtype)",
        "edges = edges.detach(); t = t.to(edges.dtype)",
    ),
    "segments: below the first": (DISCRETE, "- 1).clamp(min=0)]", "- 1)]"),
    "guidance: conditional and not": (
        DISCRETE,
        "return (without + by * (conditional.double() - without)).to(conditional.dtype)",
        "return (conditional.double() + by * (conditional.double() - without)).to(conditional.dtype)",
    ),
    "guidance: in bfloat16": (DISCRETE, "without = unconditional.double()", "without = unconditional.float()"),
    "BOOT: previous attached": (
        DISCRETE,
        "(prediction, previous.detach(), teacher.detach()), (rate,)",
        "(prediction, previous, teacher.detach()), (rate,)",
    ),
    "BOOT: teacher attached": (
        DISCRETE,
        "(prediction, previous.detach(), teacher.detach()), (rate,)",
        "(prediction, previous.detach(), teacher), (rate,)",
    ),
    "BOOT: rate": (
        DISCRETE,
        "rate = whole / (whole - b.sigma * a.alpha)  # 1 / k",
        "rate = whole / (whole + b.sigma * a.alpha)",
    ),
    "BOOT: alpha at t": (DISCRETE, "whole = b.alpha * a.sigma", "whole = a.alpha * a.sigma"),
    "BOOT: sign of the step": (
        DISCRETE,
        "samples.along(rate, y) - (x - before)).square())",
        "samples.along(rate, y) + (x - before)).square())",
    ),
    "BOOT: 1 / k^2 dropped": (
        DISCRETE,
        "return samples.mean(((y - before) * samples.along(rate, y) - (x - before)).square())",
        "return samples.mean(((y - before) - (x - before) / samples.along(rate, y)).square())",
    ),
    "BOOT: a target in float32": (
        DISCRETE,
        "return samples.mean(((y - before) * samples.along(rate, y) - (x - before)).square())",
        "return samples.mean((y - (before + (x - before) / samples.along(rate, y))).square()) * rate.square()",
    ),
    "U-shaped: one side": (DISCRETE, "falling.where(side < 0.5, 1 - falling)", "falling"),
    "U-shaped: sign of a": (
        DISCRETE,
        "falling = -(u * math.expm1(-a)).log1p() / a",
        "falling = (u * math.expm1(a)).log1p() / a",
    ),
    "U-shaped: margin": (DISCRETE, "* (1 - 2e-5) + 1e-5).to(dtype)", ").to(dtype)"),
    "velocity matching: t dropped": (
        DISCRETE,
        "samples.along(t / size + 0 * size, velocity)",
        "samples.along(1 / size + 0 * size, velocity)",
    ),
    "velocity matching: c dropped": (DISCRETE, "size = samples.norm(tangent) + c", "size = samples.norm(tangent)"),
    "velocity matching: sign of the tangent": (
        DISCRETE,
        "return velocity - samples.along(",
        "return velocity + samples.along(",
    ),
    "velocity matching: tangent attached": (
        DISCRETE,
        "(prediction, tangent.detach(), velocity.detach()), (time,)",
        "(prediction, tangent, velocity.detach()), (time,)",
    ),
    "velocity matching: velocity attached": (
        DISCRETE,
        "(prediction, tangent.detach(), velocity.detach()), (time,)",
        "(prediction, tangent.detach(), velocity), (time,)",
    ),
    "velocity distillation: factor 2": (
        DISCRETE,
        "samples.mean(off.square()) + 2 * samples.still(y, off)",
        "samples.mean(off.square()) + samples.still(y, off)",
    ),
    "velocity distillation: value dropped": (
        DISCRETE,
        "return samples.mean(off.square()) + 2 * samples.still(y, off)",
        "return 2 * samples.still(y, off)",
    ),
    "velocity distillation: student attached": (
        DISCRETE,
        "constants = student.detach(), tangent",
        "constants = student, tangent",
    ),
    "velocity distillation: sign": (
        DISCRETE,
        "off = u - _target(v, du, t, width)",
        "off = _target(v, du, t, width) - u",
    ),
    "gradient: attached": (MATCHING, "(sample, gradient.detach()), (w.detach(),)", "(sample, gradient), (w.detach(),)"),
    "gradient: weights attached": (
        MATCHING,
        "(sample, gradient.detach()), (w.detach(),)",
        "(sample, gradient.detach()), (w,)",
    ),
    "descent: half dropped": (
        MATCHING,
        "return 0.5 * scale.square() * samples.mean",
        "return scale.square() * samples.mean",
    ),
    "descent: scale not squared": (
        MATCHING,
        "return 0.5 * scale.square() * samples.mean",
        "return 0.5 * scale * samples.mean",
    ),
    "descent: scale of the gradient": (MATCHING, "+ scale * samples.still(x, g)", "+ samples.still(x, g)"),
    "descent: as written in papers, rounded": (
        MATCHING,
        "return 0.5 * scale.square() * samples.mean(g.square()) + scale * samples.still(x, g)",
        "return 0.5 * samples.mean((x - (x - samples.along(scale, x) * g).detach()).square())",
    ),
    "DMD: sign": (MATCHING, "return _descent(x, fake - real, w /", "return _descent(x, real - fake, w /"),
    "DMD: real attached": (
        MATCHING,
        "if normalize else w)\n\n    return samples.reduce(loss, (sample, real.detach(), fake.detach())",
        "if normalize else w)\n\n    return samples.reduce(loss, (sample, real, fake.detach())",
    ),
    "DMD: normaliser always": (
        MATCHING,
        "w / _distance(x, real, least) if normalize else w",
        "w / _distance(x, real, least)",
    ),
    "distance: floor": (MATCHING, ".abs()).clamp(min=floor)", ".abs()) + floor"),
    "distance: attached": (MATCHING, "samples.mean((x - real).detach().abs())", "samples.mean((x - real).abs())"),
    "distance: root mean square": (
        MATCHING,
        "samples.mean((x - real).detach().abs())",
        "samples.mean((x - real).detach().square()).sqrt()",
    ),
    "distance: over the batch": (
        MATCHING,
        "return samples.mean((x - real).detach().abs()).clamp(min=floor)",
        "return (x - real).detach().abs().mean().clamp(min=floor)",
    ),
    "VSD: sign": (
        MATCHING,
        "gradient_loss(sample, y - z, weights=weights",
        "gradient_loss(sample, z - y, weights=weights",
    ),
    "VSD: weights dropped": (MATCHING, "gradient_loss(sample, y - z, weights=weights,", "gradient_loss(sample, y - z,"),
    "VSD: difference in bfloat16": (
        MATCHING,
        "y, z = samples.wide(real.detach(), fake.detach())",
        "y, z = real.detach(), fake.detach()",
    ),
    "TDM: sign": (MATCHING, "(x - x.detach() + (fake - real)).square()", "(x - x.detach() + (real - fake)).square()"),
    "TDM: not divided": (
        MATCHING,
        "samples.mean(pseudo_huber(squares, c)) / _distance(x, real, least)",
        "samples.mean(pseudo_huber(squares, c))",
    ),
    "TDM: sample's mean in place of its sum": (
        MATCHING,
        "pseudo_huber(samples.mean(squares) * entries, c)",
        "pseudo_huber(samples.mean(squares), c)",
    ),
    "TDM: not by entries": (
        MATCHING,
        "pseudo_huber(samples.mean(squares) * entries, c) / entries",
        "pseudo_huber(samples.mean(squares) * entries, c)",
    ),
    "TDM: weights dropped": (
        MATCHING,
        "return w * samples.mean(pseudo_huber(squares, c))",
        "return samples.mean(pseudo_huber(squares, c))",
    ),
    "SiD: alpha dropped": (MATCHING, "found = y * (real - x - alpha * y)", "found = y * (real - x - y)"),
    "SiD: predictions constants": (
        MATCHING,
        "found = y * (real - x - alpha * y)",
        "found = y.detach() * (real - x - alpha * y)",
    ),
    "SiD: normaliser dropped": (MATCHING, "/ (_distance(x, real, least) if normalize else 1)", "/ 1"),
    "SiD: check of what is attached": (
        MATCHING,
        "if torch.is_grad_enabled() and sample.requires_grad and not y.requires_grad:",
        "if False:",
    ),
    "SiD: check without grad": (
        MATCHING,
        "if torch.is_grad_enabled() and sample.requires_grad and",
        "if sample.requires_grad and",
    ),
    "SIM: root a constant": (
        MATCHING,
        "root = torch.hypot(samples.norm(y),",
        "root = torch.hypot(samples.norm(y.detach()),",
    ),
    "SIM: c dropped": (MATCHING, "torch.full((), c, dtype=y.dtype", "torch.full((), 0 * c, dtype=y.dtype"),
    "SIM: of real": (MATCHING, "samples.mean(y * (fake - x)) / root", "samples.mean(y * (real - x)) / root"),
    "SIM: a mean in the root": (
        MATCHING,
        "torch.hypot(samples.norm(y),",
        "torch.hypot(samples.mean(y.square()).sqrt(),",
    ),
    "balanced: clamp": (MATCHING, "/ size).clamp(0, 1), y)", "/ size), y)"),
    "balanced: a and 1 - a": (MATCHING, "return (a * c + (1 - a) * d)", "return (a * d + (1 - a) * c)"),
    "balanced: floor": (MATCHING, ".square().clamp(min=torch.finfo(y.dtype).tiny)", ".square()"),
    "balanced: attached": (
        MATCHING,
        "samples.wide(conditional.detach(), unconditional.detach())",
        "samples.wide(conditional, unconditional.detach())",
    ),
    "balanced: scale": (MATCHING, "scale: float = 0.018", "scale: float = 0.02"),
    "random scales: one for all": (MATCHING, "torch.rand((len(like), *(1,)", "torch.rand((1, *(1,)"),
    "denoising: target attached": (
        CRITICS,
        "(prediction, target.detach()), (w.detach(),)",
        "(prediction, target), (w.detach(),)",
    ),
    "denoising: weights": (
        CRITICS,
        "return w * samples.mean((y - target).square())",
        "return samples.mean((y - target).square())",
    ),
    "generator: label": (CRITICS, "y.clamp(-most, most) + 0 * y, 1.0)", "y.clamp(-most, most) + 0 * y, 0.0)"),
    "generator: infinity clamped away": (CRITICS, "y.clamp(-most, most) + 0 * y,", "y.clamp(-most, most),"),
    "generator: softplus hides an infinity": (
        CRITICS,
        'return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction="none")',
        "return F.softplus(-logits if label else logits)",
    ),
    "discriminator: labels": (CRITICS, "_bce(fake, 0.0) + _bce(real, 1.0)", "_bce(fake, 1.0) + _bce(real, 0.0)"),
    "discriminator: penalty": (CRITICS, "+ factor * (real - near).square()", "+ (real - near).square()"),
    "phased: b": (CRITICS, "(end.sigma + a * start.sigma)).sqrt()", "(end.sigma + start.sigma)).sqrt()"),
    "phased: a": (CRITICS, "a = end.alpha / start.alpha", "a = end.alpha"),
    "phased: naive noise": (CRITICS, "end.sigma / b * n", "n"),
    "phased: x_0": (CRITICS, "x_0 = x / start.alpha - a", "x_0 = x / start.alpha + a"),
    "phased: score": (CRITICS, '"score": -n / b}', '"score": -n / end.sigma}'),
    "phased: F": (CRITICS, "(v - end.of_x * x_t) / end.of_f", "v / end.of_f"),
    "phased: target attached": (CRITICS, "made.detach().to(x_s.dtype)", "made.to(x_s.dtype)"),
    "phased: x_t detached": (
        CRITICS,
        "x, n = x_s.double(), noise.detach().double()",
        "x, n = x_s.detach().double(), noise.detach().double()",
    ),
    "phased: order not checked": (CRITICS, '"after s", then, then > first,', '"after s", then, then >= first,'),
    "TDM weights: sign of the exponent": (
        CRITICS,
        "(samples.mean(n.square()) - samples.mean(mixed.square()))",
        "(samples.mean(mixed.square()) - samples.mean(n.square()))",
    ),
    "TDM weights: clamp": (CRITICS, ".square().clamp(max=top)", ".square()"),
    "TDM weights: half": (CRITICS, "found * (0.5 * (samples", "found * (1.0 * (samples"),
    "TDM weights: attached": (CRITICS, "return found.detach().to(", "return found.to("),
    "ratio: limit of logits": (CRITICS, "m.clamp(-10, 10)", "m.clamp(-20, 20)"),
    "ratio: clamps": (CRITICS, ".exp().clamp(least, most)", ".exp()"),
    "ratio: mean of a sample": (CRITICS, "    m = samples.mean(y)\n", "    m = y.mean().expand(len(y))\n"),
    "by time: rate": (CRITICS, "kept * old + (1 - kept) * total", "(1 - kept) * old + kept * total"),
    "by time: NaN in the mean": (
        CRITICS,
        "torch.stack((good.double(), r.where(good, 0.0)))",
        "torch.stack((good.double(), r))",
    ),
    "by time: counts what is not finite": (
        CRITICS,
        "torch.stack((good.double(), r.where(good, 0.0)))",
        "torch.stack((torch.ones_like(r), r.where(good, 0.0)))",
    ),
    "by time: last bin": (CRITICS, ".clamp(0, bins - 1).long()", ".clamp(0, bins - 2).long()"),
    "by time: old means": (CRITICS, "return (r / (new[at] + EPS))", "return (r / (old[at] + EPS))"),
    "by time: empty bins": (CRITICS, "torch.where(count > 0, kept * old", "torch.where(count > -1, kept * old"),
    "EPS": (CRITICS, "EPS = 1e-6", "EPS = 1e-5"),
    "f: softened": (
        CRITICS,
        '"softened_reverse_kl": lambda r: 1 / (1 + r)',
        '"softened_reverse_kl": lambda r: r / (1 + r)',
    ),
    "f: Jensen-Shannon": (
        CRITICS,
        '"jensen_shannon": lambda r: r / (1 + r)',
        '"jensen_shannon": lambda r: 1 / (1 + r)',
    ),
    "f: Hellinger": (CRITICS, '"squared_hellinger": torch.sqrt', '"squared_hellinger": torch.rsqrt'),
    "f: forward": (CRITICS, '"forward_kl": lambda r: r,', '"forward_kl": lambda r: 1 / r,'),
    "f: Jeffreys": (CRITICS, '"jeffreys": lambda r: 1 + r', '"jeffreys": lambda r: 2 + r'),
    "f: Neyman": (CRITICS, '"neyman_chi_square": torch.reciprocal', '"neyman_chi_square": torch.square'),
    "f: reverse": (CRITICS, '"reverse_kl": torch.ones_like', '"reverse_kl": torch.clone'),
    "f: default": (CRITICS, 'divergence: str = "jensen_shannon"', 'divergence: str = "forward_kl"'),
    "f: mean over what is not finite": (
        CRITICS,
        "(good.sum().to(h.dtype), h.where(good, 0.0).sum())",
        "(good.sum().to(h.dtype), h.sum())",
    ),
    "f: attached": (CRITICS, "(r,) = samples.wide(ratio.detach())\n    h =", "(r,) = samples.wide(ratio)\n    h ="),
    "Uni-Instruct: Jeffreys": (CRITICS, "0.4 * r + 0.6", "0.6 * r + 0.4"),
    "Uni-Instruct: default": (CRITICS, 'divergence: str = "forward_kl"', 'divergence: str = "jeffreys"'),
    "Uni-Instruct: attached": (
        CRITICS,
        "(r,) = samples.wide(ratio.detach())\n    return r if",
        "(r,) = samples.wide(ratio)\n    return r if",
    ),
    "shared: not summed": (CRITICS, "dist.all_reduce(sums, group=group)", "pass"),
    "velocity matching: an infinite norm hidden": (
        DISCRETE,
        "samples.along(t / size + 0 * size, velocity)",
        "samples.along(t / size, velocity)",
    ),
    "SIM: an infinite norm hidden": (MATCHING, "/ root + 0 * root", "/ root"),
    "balanced: 0 / 0": (
        MATCHING,
        "samples.mean((d - c) * d) * math.prod(y.shape[1:]) / size",
        "samples.mean((d - c) * d) * (math.prod(y.shape[1:]) / size)",
    ),
    "ratio: infinity clamped away": (CRITICS, ".clamp(least, most) + 0 * m", ".clamp(least, most)"),
    "samples: times outside where nobody looks": (SAMPLES, "inside = (t >= first) & (t <= last)", "inside = t == t"),
    "samples: order where nobody looks": (SAMPLES, "return found.where(right, torch.nan)", "return found"),
    "an op without a rule": (
        FORWARD_MODE,
        '        raise NotImplementedError(f"{op} has',
        '        return out\n        raise NotImplementedError(f"{op} has',
    ),
}


class First:
    """The first test that fails."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid


def failing_test(tree: Path, path: str) -> str | None:
    """The first test that goes red when path is broken, in a fork of its own."""

    def search() -> str | None:
        first = First()
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *FILES[path]], plugins=[first])
        return (first.name or f"exit status {status}") if status else None

    return forked(tree, search)


def main() -> int:
    mutants = {n: m for n, m in MUTANTS.items() if not sys.argv[1:] or any(word in n for word in sys.argv[1:])}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_to(tree, COPIED)
        sys.path[:0] = [str(tree), str(tree / "tests")]
        sys.dont_write_bytecode = True
        for path in {path for path, *_ in mutants.values()}:
            if red := failing_test(tree, path):
                print(f"before any mutation the tree is red: {red}")
                return 1
        return in_turn(tree, mutants, failing_test)


if __name__ == "__main__":
    raise SystemExit(main())
