"""Hold a kernel, ours or anybody's, against a float64 reference.

The rule, on the largest error over the elements and on the norm, for the value and for every gradient::

    norm(op - ref64) <= 2 * norm(baseline - ref64) + atol

where the baseline is the reference on the same inputs in their own dtypes (logits from the model's GEMM upcast to
float32, softmax in float32), and atol is one rounding of the reference in the narrowest dtype of the inputs and 16 in
float32, in which sums over the vocabulary are accumulated. The whole allowance is capped at a tenth of the reference.
(Element by element against the baseline's error at the same element, the rule would fail by chance: somewhere among
many elements the baseline is right by luck.) Where the reference is infinite or NaN the op must be too. Example::

    from fastkd import testing

    def mine(student, teacher):                       # any function of the same arguments
        return my_kernel(student.hidden, student.weight, teacher.hidden, teacher.weight)

    inputs = testing.kd_inputs("plain", dtype=torch.bfloat16)
    print(testing.compare(mine, fastkd.reference.kd_loss, inputs))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from fastkd import divergences, targets
from fastkd.sources import Head, Labels

__all__ = ["KD_FEATURES", "Report", "Row", "allowance", "compare", "kd_inputs"]

CAP = 0.1  # of the reference's own norm
SUMS = 16 * torch.finfo(torch.float32).eps  # the order in which float32 sums are taken


def allowance(reference: Tensor, baseline: Tensor, eps: float, order: float = math.inf) -> float:
    """What the norm of the given order of op - reference may be; ``reference`` in float64."""
    size = float(torch.linalg.vector_norm(reference, order))
    own = float(torch.linalg.vector_norm(baseline.double() - reference, order))
    return min(2 * own + (eps + SUMS) * size, CAP * size)


@dataclass(frozen=True)
class Row:
    """One compared tensor: its largest error and what is allowed, and the same on the 2-norm."""

    name: str
    error: float
    allowed: float
    norm_error: float
    norm_allowed: float
    ok: bool
    why: str = ""

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"FAIL {self.why}"
        return (
            f"{self.name:32s} error {self.error:9.2e} of {self.allowed:9.2e}   "
            f"norm {self.norm_error:9.2e} of {self.norm_allowed:9.2e}   {verdict}"
        )


@dataclass(frozen=True)
class Report:
    """The rows of one comparison. True if all are within the rule; ``check()`` raises AssertionError if not."""

    rows: tuple[Row, ...]

    def __bool__(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))

    def check(self) -> Report:
        if not self:
            raise AssertionError(f"outside the tolerance rule:\n{self}")
        return self


def _compare_one(name: str, got: Tensor | None, reference: Tensor, baseline: Tensor | None, eps: float) -> Row:
    def failed(why: str) -> Row:
        return Row(name, math.inf, 0.0, math.inf, 0.0, False, why)

    if got is None:
        return failed("no gradient where the reference has one")
    if got.shape != reference.shape:
        return failed(f"shape {list(got.shape)}, expected {list(reference.shape)}")
    assert baseline is not None  # it has what the reference has
    got = got.detach().double()
    finite = reference.isfinite()
    if not torch.equal(got[~finite].nan_to_num(nan=7.0), reference[~finite].nan_to_num(nan=7.0)):
        return failed("infinities or NaNs differ from the reference's")
    if not bool(got[finite].isfinite().all()):
        return failed("infinite or NaN where the reference is finite")
    got, reference, baseline = got[finite], reference[finite], baseline.detach().double()[finite]
    baseline = torch.where(baseline.isfinite(), baseline, reference)
    if not reference.numel():
        return Row(name, 0.0, 0.0, 0.0, 0.0, True)
    error = (got - reference).abs()
    worst = int(error.argmax())
    numbers = (
        *(float(error[worst]), allowance(reference, baseline, eps)),
        *(float(error.norm()), allowance(reference, baseline, eps, 2)),
    )
    ok = numbers[0] <= numbers[1] and numbers[2] <= numbers[3]
    return Row(
        name, *numbers, ok, "" if ok else f"at flat index {worst}: {got[worst]:.6g}, expected {reference[worst]:.6g}"
    )


def compare(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    *,
    baseline: Callable[..., Any] | None = None,
    cotangent_seed: int = 0,
) -> Report:
    """Values and gradients of ``op(**inputs)`` against ``reference(**inputs)`` in float64.

    Args:
        op: the function under test; it returns a tensor or a tuple of tensors.
        reference: the same function by definition; it must accept float64.
        inputs: keyword arguments; tensors may lie inside dataclasses such as :class:`fastkd.Head`. Gradients are
            compared for the floating tensors that require grad, under a random, non-uniform upstream gradient.
        baseline: what sets the scale of the error; None: ``reference`` on the inputs as they are.

    Returns:
        A :class:`Report`: print it, test its truth, or ``check()`` it.
    """
    eps = max((torch.finfo(x.dtype).eps for x in _floats(inputs)), default=torch.finfo(torch.float32).eps)
    got = _evaluate(op, inputs, cotangent_seed)
    truth = _evaluate(reference, _cast(inputs, torch.float64), cotangent_seed)
    base = _evaluate(baseline or reference, inputs, cotangent_seed)
    return Report(
        tuple(
            _compare_one(name, got.get(name), exact.detach().double(), base[name], eps)
            for name, exact in truth.items()
            if exact is not None
        )
    )


def _evaluate(op: Callable[..., Any], inputs: dict[str, Any], seed: int) -> dict[str, Tensor | None]:
    """Outputs and gradients by name, on fresh leaves."""
    leaves: dict[str, Tensor] = {}

    def fresh(path: Any, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().requires_grad_(x.requires_grad)
        if x.requires_grad:
            leaves[_pytree.keystr(path).replace("['", "").replace("']", "")] = x
        return x

    outputs = op(**_pytree.tree_map_with_path(fresh, inputs))
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    results: dict[str, Tensor | None] = {
        f"output {i}" if len(outputs) > 1 else "value": y for i, y in enumerate(outputs)
    }
    smooth = [y for y in outputs if y.requires_grad]
    if leaves and smooth:
        generator = torch.Generator().manual_seed(seed)
        cotangents = [(torch.rand(y.shape, generator=generator, dtype=torch.float64) + 0.5).to(y) for y in smooth]
        grads = torch.autograd.grad(smooth, list(leaves.values()), cotangents, allow_unused=True)
        results.update({f"grad {name}": g for name, g in zip(leaves, grads, strict=True)})
    return results


def _floats(inputs: Any) -> Iterator[Tensor]:
    return (x for x in _pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point())


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return _pytree.tree_map(cast, inputs)


class _Maker:
    """Random tensors of one case, from one seed; drawn in float64 on the CPU, so that every dtype sees one case."""

    def __init__(
        self, tokens: int, vocab: int, hidden: tuple[int, int], dtype: torch.dtype, seed: int, device: Any
    ) -> None:
        self.tokens, self.vocab, self.hidden, self.dtype, self.device = tokens, vocab, hidden, dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return x.to(self.device, self.dtype).requires_grad_(grad)

    def uniform(self, low: float, high: float) -> Tensor:
        """One number per token, float32."""
        x = torch.rand(self.tokens, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return x.to(self.device, torch.float32)

    def ids(self, *shape: int, ignored: bool = False) -> Tensor:
        x = torch.randint(self.vocab, shape or (self.tokens,), generator=self.generator)
        if ignored:
            x[1::4] = -100
        return x.to(self.device)

    def head(self, d: int, grad: bool, **kwargs: Any) -> Head:
        hidden = self.normal(self.tokens, d, grad=grad)
        return Head(hidden, self.normal(self.vocab, d, scale=2 / math.sqrt(d), grad=grad), **kwargs)

    def logits(self, grad: bool) -> Tensor:
        return self.normal(self.tokens, self.vocab, scale=2.0, grad=grad)


def _heads(m: _Maker, **kwargs: Any) -> dict[str, Any]:
    return {"student": m.head(m.hidden[0], True), "teacher": m.head(m.hidden[1], False), **kwargs}


def _masked(m: _Maker) -> Tensor:
    w = m.uniform(0.2, 2.0)
    w[::3] = 0
    return w


def _with_head(m: _Maker, side: str, **changes: Any) -> dict[str, Any]:
    inputs = _heads(m)
    return {**inputs, side: replace(inputs[side], **changes)}


def _batched(m: _Maker) -> dict[str, Any]:
    def head(d: int, grad: bool) -> Head:
        return Head(
            m.normal(2, 3, m.tokens, d, grad=grad), m.normal(2, 3, m.vocab, d, scale=2 / math.sqrt(d), grad=grad)
        )

    return {"student": head(m.hidden[0], True), "teacher": head(m.hidden[1], False)}


# feature -> keyword arguments of kd_loss in which it matters far more than the tolerance
KD_FEATURES: dict[str, Callable[[_Maker], dict[str, Any]]] = {
    "plain": _heads,
    "bias": lambda m: _with_head(m, "student", bias=m.normal(m.vocab, scale=2.0)),
    "teacher bias": lambda m: _with_head(m, "teacher", bias=m.normal(m.vocab, scale=2.0, grad=False)),
    "softcap": lambda m: _with_head(m, "student", softcap=3.0),
    "teacher softcap": lambda m: _with_head(m, "teacher", softcap=3.0),
    "logit_scale": lambda m: _with_head(m, "student", logit_scale=0.5),
    "teacher logit_scale": lambda m: _with_head(m, "teacher", logit_scale=0.5),
    "all of the head": lambda m: _with_head(m, "student", bias=m.normal(m.vocab), softcap=4.0, logit_scale=1.5),
    "temperature": lambda m: _heads(m, temperature=2.5),
    "temperature per token": lambda m: _heads(m, temperature=m.uniform(0.5, 3.0)),
    "teacher temperature": lambda m: _heads(m, temperature=0.7, teacher_temperature=m.uniform(0.5, 3.0)),
    "t_squared": lambda m: _heads(m, temperature=m.uniform(0.5, 3.0), t_squared=True),
    "weights": lambda m: _heads(m, weights=_masked(m)),
    "labels": lambda m: _heads(m, labels=m.ids(ignored=True), label_weight=0.3, temperature=2.0, t_squared=True),
    "label_weight per token": lambda m: _heads(m, labels=m.ids(), label_weight=m.uniform(0.0, 1.0)),
    "num_tokens": lambda m: _heads(m, num_tokens=2.5 * m.tokens, weights=_masked(m)),
    "both receive gradients": lambda m: {"student": m.head(m.hidden[0], True), "teacher": m.head(m.hidden[1], True)},
    "logits": lambda m: {
        "student": m.logits(True),
        "teacher": m.logits(True),
        "temperature": 1.5,
        "weights": _masked(m),
    },
    "logits and head": lambda m: {"student": m.logits(True), "teacher": m.head(m.hidden[1], False)},
    "head and logits": lambda m: {
        "student": m.head(m.hidden[0], True),
        "teacher": m.logits(False),
        "weights": _masked(m),
    },
    "teacher labels": lambda m: {"student": m.head(m.hidden[0], True), "teacher": Labels(m.ids(ignored=True))},
    "teacher labels smoothed": lambda m: {
        "student": m.logits(True),
        "teacher": Labels(m.ids(), 0.2),
        "temperature": 2.0,
    },
    "batched heads": _batched,
    "weighted sum": lambda m: _heads(
        m, divergence=0.3 * divergences.ForwardKL() + m.uniform(0.2, 1.0) * divergences.JensenShannon(0.3)
    ),
    "target Interpolate": lambda m: _heads(m, target=targets.Interpolate(m.uniform(0.1, 0.9)), temperature=1.5),
    "target Enhance": lambda m: _heads(m, target=targets.Enhance(m.ids(), 1.7)),
    "target Clip": lambda m: _heads(m, target=targets.Clip(-1.0, m.uniform(0.5, 2.0))),
    "target AddNoise": lambda m: _heads(m, target=targets.AddNoise(1.5, seed=7)),
    "target Power": lambda m: _heads(m, target=targets.Power(2.0), temperature=1.5),
    "target MixUniform": lambda m: _heads(m, target=targets.MixUniform(0.3), divergence="reverse_kl"),
}


def kd_inputs(
    feature: str = "plain",
    *,
    tokens: int = 13,
    vocab: int = 1031,
    hidden: tuple[int, int] = (24, 40),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **overrides: Any,
) -> dict[str, Any]:
    """Keyword arguments of :func:`fastkd.kd_loss` for a named feature of ``KD_FEATURES``.

    The default sizes are an odd number of tokens and a vocabulary that no tile divides. ``overrides`` replace
    arguments.
    """
    if feature not in KD_FEATURES:
        raise ValueError(f"feature must be one of {list(KD_FEATURES)}, got {feature!r}")
    return {**KD_FEATURES[feature](_Maker(tokens, vocab, hidden, dtype, seed, device)), **overrides}
