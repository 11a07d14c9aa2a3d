"""The one driver: walks over chunks of tokens, so that only a chunk of logits is alive at a time.

Per chunk: a GEMM (or a view) gives each source's rows, one row op gives losses and writes the gradient over the
student's rows, and two GEMMs fold that gradient into dhidden and dweight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks
from fastkd.problem import KD, KDTensors, Select, Side, Spec, Stats, Tensors, accumulation
from fastkd.rows_torch import Rows

CHUNK_BYTES = 32 * 2**20  # of logits a source, where the number of tokens that gives lies in the range below
CHUNK_TOKENS = (256, 1024)  # fewer drown in the accumulation of dweight, more gain nothing
PART_BYTES = 4 * 2**20  # of a partial dweight, so that it is accumulated from cache


@dataclass(frozen=True)
class Chunk:
    """Heads [start, stop) with all their tokens, or the tokens `rows` of one head."""

    start: int
    stop: int
    rows: slice | Tensor

    def take(self, x: Tensor) -> Tensor:
        """x [B, N, ...] -> [n, ...] of one head, or [heads, N, ...] of several."""
        return x[self.start : self.stop] if self.stop - self.start > 1 else x[self.start][self.rows]

    def vector(self, x: Tensor) -> Tensor:
        """x [B, N, ...] -> [n, ...], contiguous."""
        x = self.take(x)
        return (x.flatten(0, 1) if self.stop - self.start > 1 else x).contiguous()


def chunk_tokens(vocab: int, itemsize: int) -> int:
    low, high = CHUNK_TOKENS
    return min(max(CHUNK_BYTES // (vocab * itemsize), low), high)


def chunks(batch: int, tokens: int, size: int, live: Tensor | None) -> Iterator[Chunk]:
    """All tokens, or those that are live [B, N], at most `size` at a time."""
    if live is None and batch > 1 and 2 * tokens <= size:
        group = size // tokens
        for b in range(0, batch, group):
            yield Chunk(b, min(b + group, batch), slice(None))
        return
    for b in range(batch):
        listed = None if live is None else live[b].nonzero().squeeze(-1)
        count = tokens if listed is None else listed.numel()
        for n in range(0, count, size):
            stop = min(n + size, count)
            yield Chunk(b, b + 1, slice(n, stop) if listed is None else listed[n:stop])


class Dense:
    """A source at work: gives chunks of raw logits, and folds their gradients."""

    def __init__(
        self, side: Side, x: Tensor, w: Tensor | None, b: Tensor | None, needs: Sequence[bool], rows: ModuleType
    ) -> None:
        self.x, self.rows, self.is_head = x, rows, w is not None
        self.w = None if w is None else w.to(side.compute_dtype)
        self.b = None if b is None else b.to(side.compute_dtype)
        self.dtype = x.dtype if w is None else side.compute_dtype
        self.needs = tuple(needs)
        self.vocab = x.shape[-1] if w is None else w.shape[-2]
        self.dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        self.dw = _Accumulated(w, self.dtype, rows) if w is not None and needs[1] else None
        self.db = torch.zeros(b.shape, dtype=accumulation(b.dtype), device=b.device) if b is not None and needs[2] else None
        self.db_dtype = None if b is None else b.dtype
        self.buffer = torch.empty(0, dtype=self.dtype, device=x.device)

    def logits(self, chunk: Chunk) -> Tensor:
        """Raw rows [n, V]: in a buffer that lives until the next chunk, or a view of logits that must not be written."""
        x = chunk.take(self.x)
        if self.w is None:
            x = x.flatten(0, -2)
            return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        x, w, b = x.to(self.dtype), self._of(self.w, chunk), None if self.b is None else self._of(self.b, chunk)
        out = self._scratch(x.shape[:-1].numel()).view(*x.shape[:-1], self.vocab)
        if x.dim() == 2:
            torch.mm(x, w.t(), out=out) if b is None else torch.addmm(b, x, w.t(), out=out)
        elif b is None:
            torch.bmm(x, w.transpose(1, 2), out=out)
        else:
            torch.baddbmm(b.unsqueeze(1), x, w.transpose(1, 2), out=out)
        return out.view(-1, self.vocab)

    def _scratch(self, n: int) -> Tensor:
        if self.buffer.numel() < n * self.vocab:
            self.buffer = torch.empty(n * self.vocab, dtype=self.dtype, device=self.x.device)
        return self.buffer[: n * self.vocab].view(n, self.vocab)

    def _of(self, w: Tensor, chunk: Chunk) -> Tensor:
        """The head's part for this chunk: [V, D], or [heads, V, D]."""
        if w.shape[0] == 1:
            return w[0] if chunk.stop - chunk.start == 1 else w.expand(chunk.stop - chunk.start, *w.shape[1:])
        return w[chunk.start : chunk.stop] if chunk.stop - chunk.start > 1 else w[chunk.start]

    def gradient(self, chunk: Chunk, raw: Tensor) -> Tensor | None:
        """Where the row op writes: over a head's own logits, or into the gradient of given logits."""
        if not any(self.needs):
            return None
        if self.is_head:
            return raw
        assert self.dx is not None
        if isinstance(chunk.rows, slice):
            return chunk.take(self.dx).flatten(0, -2)
        return self._scratch(raw.shape[0])

    def fold(self, chunk: Chunk, g: Tensor) -> None:
        """dx = G W, dW += G^T x, db += sum G; for logits dx = G."""
        if self.w is None:
            if not isinstance(chunk.rows, slice):
                assert self.dx is not None
                self.dx[chunk.start].index_copy_(0, chunk.rows, g)
            return
        x = chunk.take(self.x).to(self.dtype)
        g = g.view(*x.shape[:-1], self.vocab)
        if self.dx is not None:
            w, direct = self._of(self.w, chunk), isinstance(chunk.rows, slice) and self.dx.dtype == self.dtype
            out = chunk.take(self.dx) if direct else None
            dx = torch.matmul(g, w, out=out)
            if not direct and isinstance(chunk.rows, slice):
                chunk.take(self.dx).copy_(dx)
            elif not direct:
                self.dx[chunk.start].index_copy_(0, chunk.rows, dx.to(self.dx.dtype))  # type: ignore[arg-type]
        if self.dw is not None:
            self.dw.add(chunk, g, x)
        if self.db is not None:
            if g.dim() == 3 and self.db.shape[0] > 1:
                self.db[chunk.start : chunk.stop] += g.sum(1, dtype=self.db.dtype)
            else:
                self.db[chunk.start if self.db.shape[0] > 1 else 0] += g.flatten(0, -2).sum(0, dtype=self.db.dtype)

    def grads(self) -> list[Tensor]:
        db = None if self.db is None or self.db_dtype is None else self.db.to(self.db_dtype)
        dw = None if self.dw is None else self.dw.finish()
        return [t for t in (self.dx, dw, db) if t is not None]


class _Accumulated:
    """dW [B or 1, V, D]: a sum over chunks kept in float32 (float64), cast once."""

    def __init__(self, w: Tensor, compute: torch.dtype, rows: ModuleType) -> None:
        self.wide, self.compute, self.rows = accumulation(w.dtype), compute, rows
        self.out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
        self.acc = self.out if w.dtype == self.wide else torch.empty(w.shape[1:], dtype=self.wide, device=w.device)
        self.written = [False] * w.shape[0]
        self.open: int | None = None  # the head whose sum is in acc and not yet in out

    def add(self, chunk: Chunk, g: Tensor, x: Tensor) -> None:
        if g.dim() == 3 and len(self.written) > 1:  # several heads, each seen once and whole
            self._whole(self.out[chunk.start : chunk.stop], g, x)
            self.written[chunk.start : chunk.stop] = [True] * (chunk.stop - chunk.start)
            return
        if g.dim() == 3:
            g, x = g.flatten(0, 1), x.flatten(0, 1)
        index = chunk.start if len(self.written) > 1 else 0
        if self.open not in (None, index):
            self._close()
        acc = self.out[index] if self.acc is self.out else self.acc
        self._partial(acc, g, x, first=not self.written[index])
        self.written[index] = True
        self.open = index

    def _whole(self, out: Tensor, g: Tensor, x: Tensor) -> None:
        if out.dtype == self.compute:
            torch.bmm(g.transpose(1, 2), x, out=out)
        else:
            out.copy_(torch.bmm(g.transpose(1, 2), x))

    def _partial(self, acc: Tensor, g: Tensor, x: Tensor, first: bool) -> None:
        if self.compute == self.wide:
            torch.mm(g.t(), x, out=acc) if first else acc.addmm_(g.t(), x)
            return
        step = max(PART_BYTES // (x.shape[1] * x.element_size()), 64)
        part = torch.empty(min(step, acc.shape[0]), x.shape[1], dtype=self.compute, device=x.device)
        for v in range(0, acc.shape[0], step):
            block = acc[v : v + step]
            torch.mm(g[:, v : v + step].t(), x, out=part[: block.shape[0]])
            self.rows.accumulate(block, part[: block.shape[0]], first)

    def _close(self) -> None:
        if self.acc is not self.out and self.open is not None:
            self.out[self.open].copy_(self.acc)

    def finish(self) -> Tensor:
        self._close()
        for index, written in enumerate(self.written):
            if not written:
                self.out[index].zero_()
        return self.out


def _live(factor: Tensor) -> Tensor | None:
    """Which tokens count, None for all."""
    if factor.numel() == 0 or all(s == 0 for s in factor.stride()):  # one number for all
        factor = factor.flatten()[:1]
    live = factor != 0
    if bool(live.all()):
        return None
    return live if live.dim() == 2 else live.new_zeros(1, 1)


def _kd(spec: KD, flat: Tensors, cotangents: Sequence[Tensor], needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    a, rows = KDTensors.of(flat), _rows(spec)
    seed = cotangents[0] if cotangents else None
    factor = a.factor if seed is None else a.factor * seed.to(a.factor.dtype)
    live = _live(factor)
    if live is not None and live.numel() == 1:
        live = live.expand(factor.shape)
    student = Dense(spec.student, a.s_x, a.s_w, a.s_b, needs[1:4], rows)
    teacher = None
    if spec.teacher is not None and a.t_x is not None:
        teacher = Dense(spec.teacher, a.t_x, a.t_w, a.t_b, needs[4:7], rows)
    plain = not student.is_head and not (teacher and teacher.is_head)  # given logits: the row op passes over ignored rows
    loss = torch.zeros(factor.shape, dtype=factor.dtype, device=factor.device)
    size = spec.chunk or chunk_tokens(spec.vocab, student.dtype.itemsize)
    batch, tokens = factor.shape
    for chunk in chunks(batch, tokens, size, None if plain else live):
        s = student.logits(chunk)
        t = None if teacher is None else teacher.logits(chunk)
        row = _rows_of(spec, a, factor, chunk)
        part = _kd_chunk(spec, a, chunk, row, rows, (student, s), (teacher, t))
        _put(loss, chunk, part.to(loss.dtype))
    out = _times_live(a.factor, loss)
    grads = [loss if seed is None else loss * seed] if needs[0] else []
    grads += student.grads() + (teacher.grads() if teacher else [])
    return [out.sum() if spec.total else out], grads


def _kd_chunk(
    spec: KD, a: KDTensors, chunk: Chunk, row: Rows, rows: ModuleType, student: Any, teacher: Any
) -> Tensor:
    """The row op on one chunk, for the student's gradient and for the teacher's (the roles exchanged)."""
    (source, s), (source_t, t) = student, teacher
    raw_t, g_t = t, None if source_t is None else source_t.gradient(chunk, t)
    if spec.target is not None:
        t, row = _transformed(spec, a, chunk, row, s, t), replace(row, teacher=Side(), t_temperature=torch.ones_like(row.factor))
    g = source.gradient(chunk, s)
    if g is s and g_t is not None:
        g = torch.empty_like(s)
    loss = rows.divergence(s, t, g, row)
    if g is not None:
        source.fold(chunk, g)
    if g_t is not None:
        rows.divergence(raw_t, s, g_t, _exchanged(row))
        source_t.fold(chunk, g_t)
    return loss


def _rows_of(spec: KD, a: KDTensors, factor: Tensor, chunk: Chunk) -> Rows:
    def vector(x: Tensor | None) -> Tensor | None:
        return None if x is None else chunk.vector(x)

    hard_temperature = None
    if a.labels is not None:
        hard_temperature = chunk.vector(a.s_temperature if spec.label_tempered else torch.ones_like(a.s_temperature))
    weights = None if a.term_weights is None else torch.stack([chunk.vector(w) for w in a.term_weights])
    return Rows(
        vocab=spec.vocab,
        student=spec.student,
        teacher=spec.teacher or Side(),
        factor=chunk.vector(factor),
        s_temperature=chunk.vector(a.s_temperature),
        t_temperature=chunk.vector(a.t_temperature),
        divergences=spec.divergences,
        term_weights=weights,
        normalized=spec.target_class is None or spec.target_class.normalized,
        labels=vector(a.labels),
        label_weight=vector(a.label_weight),
        label_temperature=hard_temperature,
        label_smoothing=spec.label_smoothing,
    )


def _exchanged(row: Rows) -> Rows:
    """Teacher and student exchanged; the labels do not reach the teacher."""
    return replace(
        row,
        student=row.teacher,
        teacher=row.student,
        s_temperature=row.t_temperature,
        t_temperature=row.s_temperature,
        divergences=tuple(d.exchanged for d in row.divergences),
        labels=None,
        label_weight=None,
        label_temperature=None,
    )


def _transformed(spec: KD, a: KDTensors, chunk: Chunk, row: Rows, s: Tensor, t: Tensor) -> Tensor:
    """The target transform's log-weights [n, V] in the place of the teacher's logits."""
    target = spec.build_target(tuple(chunk.vector(x).unsqueeze(-1) for x in a.target))
    assert target is not None
    batch, tokens = a.factor.shape
    token = chunk.vector(torch.arange(batch * tokens, device=s.device).view(batch, tokens))
    z_t, z_s = row.teacher.effective(t, spec.vocab), row.student.effective(s, spec.vocab)
    return target(z_t, z_s, row.t_temperature.unsqueeze(-1), token)


def _put(out: Tensor, chunk: Chunk, part: Tensor) -> None:
    """out [B, N, ...][chunk] = part [n, ...]"""
    if isinstance(chunk.rows, Tensor):
        out[chunk.start].index_copy_(0, chunk.rows, part)
    else:
        view = chunk.take(out)
        view.copy_(part.view(view.shape))


def _times_live(factor: Tensor, loss: Tensor) -> Tensor:
    return torch.where(factor == 0, 0.0, factor * loss)


def _select(spec: Select, flat: Tensors, cotangents: Sequence[Tensor], needs: Sequence[bool]) -> Any:
    x, w, b, temperature, ids = flat
    assert x is not None and temperature is not None and ids is not None
    out = torch.empty(ids.shape, dtype=temperature.dtype, device=x.device)

    def row_op(rows: ModuleType, chunk: Chunk, s: Tensor, g: Tensor | None) -> None:
        given = chunk.vector(cotangents[0]) if cotangents else None
        part = rows.select(s, g, spec.student, spec.vocab, chunk.vector(temperature), chunk.vector(ids), given)
        _put(out, chunk, part.to(out.dtype))

    return [out], _walk(spec, x, w, b, needs, row_op)


def _stats(spec: Stats, flat: Tensors, cotangents: Sequence[Tensor], needs: Sequence[bool]) -> Any:
    x, w, b, temperature = flat
    assert x is not None and temperature is not None
    out = [torch.empty(temperature.shape, dtype=temperature.dtype, device=x.device) for _ in range(3)]
    out.append(torch.empty(temperature.shape, dtype=torch.int64, device=x.device))

    def row_op(rows: ModuleType, chunk: Chunk, s: Tensor, g: Tensor | None) -> None:
        given = tuple(chunk.vector(c) for c in cotangents) or None
        parts = rows.stats(s, g, spec.student, spec.vocab, chunk.vector(temperature), given)
        for whole, part in zip(out, parts, strict=True):
            _put(whole, chunk, part.to(whole.dtype))

    return out, _walk(spec, x, w, b, needs, row_op)


def _walk(
    spec: Any, x: Tensor, w: Tensor | None, b: Tensor | None, needs: Sequence[bool], row_op: Callable[..., None]
) -> list[Tensor]:
    rows = _rows(spec)
    source = Dense(spec.student, x, w, b, needs[:3], rows)
    for chunk in chunks(x.shape[0], x.shape[1], spec.chunk or chunk_tokens(spec.vocab, source.dtype.itemsize), None):
        raw = source.logits(chunk)
        g = source.gradient(chunk, raw)
        row_op(rows, chunk, raw, g)
        if g is not None:
            source.fold(chunk, g)
    return source.grads()


def _rows(spec: Spec) -> ModuleType:
    load = backends.BACKENDS[spec.backend].rows
    assert load is not None
    return load()


@dataclass(frozen=True)
class Op:
    run: Callable[..., tuple[list[Tensor], list[Tensor]]]
    outputs: int


OPS: dict[type, Op] = {KD: Op(_kd, 1), Select: Op(_select, 1), Stats: Op(_stats, 4)}


def count(spec: Spec) -> int:
    return OPS[type(spec)].outputs


def run(spec: Spec, tensors: Tensors, cotangents: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """The outputs of an op, then the gradient of each tensor in `needs` for the cotangents (none given: 1)."""
    if not cotangents:
        check_values(spec, tensors)
    device = next(t.device.type for t in tensors if t is not None)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        outputs, grads = OPS[type(spec)].run(spec, tensors, cotangents, needs)
    return outputs + grads


def outputs_like(spec: Spec, tensors: Tensors) -> list[Tensor]:
    """Empty tensors of the outputs' shapes and dtypes."""
    if isinstance(spec, KD):
        factor = KDTensors.of(tensors).factor
        return [factor.new_empty(()) if spec.total else factor.new_empty(factor.shape)]
    temperature = tensors[3]
    assert temperature is not None
    if isinstance(spec, Select):
        assert tensors[4] is not None
        return [temperature.new_empty(tensors[4].shape)]
    shape = temperature.shape
    return [*(temperature.new_empty(shape) for _ in range(3)), temperature.new_empty(shape, dtype=torch.int64)]


def check_values(spec: Spec, tensors: Tensors) -> None:
    """What only a look at the values shows; devices other than the CPU are not made to wait for it."""
    if isinstance(spec, KD):
        indices, limit = KDTensors.of(tensors).labels, spec.vocab
        name = "teacher.ids" if spec.teacher is None else "labels"
    else:
        indices, limit, name = (tensors[4] if isinstance(spec, Select) else None), spec.vocab, "ids"  # type: ignore[attr-defined]
    if indices is not None and checks.readable(indices):
        checks.all_values(name, f"in [0, {limit}) or ignore_index", indices, (indices >= 0) & (indices < limit))
