"""Say how many bytes a distillation loss takes, with gradients to hidden states and head: materialised, as F.kl_div
needs it, and fused; and how many tokens fit into a memory either way.

Nothing is run. The bytes follow from the sizes, as the functions naive_bytes and fused_bytes of fastkd.plan derive
them; tests hold them within 10% of measured peaks. Without --memory the budget is what this machine's device has left.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastkd import chunks, terminal
from fastkd.backends import BACKENDS
from fastkd.machine import available_bytes
from fastkd.problem import accumulation

# [n, V] tensors in the accumulation dtype that rows_torch.divergence holds at its peak: logits, gradient, log q, log p
# and h for the whole call; then p, log p - log q, the same where p > 0, and their product
ROW_TENSORS = 9
# float32 rows [V] that each thread of the C++ row op keeps: e^x of the student and of the teacher
THREAD_ROWS = 2

PLANNED = ("cpu", "torch")  # the backends whose row op the formulas know

Bytes = dict[str, int]  # what is alive at one moment, by name


def total(bytes: Bytes) -> int:
    """Bytes of everything that is alive."""
    return sum(bytes.values())


def input_bytes(
    tokens: int, vocab: int, hidden: int | None, teacher_hidden: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of hidden states [N, D] and heads [V, D] of both, or of both logits [N, V] where ``hidden`` is None."""
    if hidden is None:
        return 2 * tokens * vocab * dtype.itemsize
    return (tokens + vocab) * (hidden + (teacher_hidden or hidden)) * dtype.itemsize


def naive_bytes(
    tokens: int,
    vocab: int,
    hidden: int | None,
    dtype: torch.dtype = torch.bfloat16,
    logits_dtype: torch.dtype | None = None,
) -> Bytes:
    """What is alive beside the inputs at the peak of the loss in plain PyTorch, forward and backward::

        log_q = F.log_softmax((hidden @ weight.T).to(logits_dtype), -1)
        log_p = F.log_softmax((teacher_hidden @ teacher_weight.T).to(logits_dtype), -1)
        F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).backward()

    With L bytes of logits [N, V], the largest of three moments. In F.kl_div both logits (held by the caller's names),
    both log-softmaxes and the three factors exp(log_p), log_p - log_q and their product: 7 L. In the backward of the
    log-softmax its result, its gradient and that of the logits: 3 L. In that of the GEMM the gradient of the logits, in
    the GEMM's dtype, and dH and dW.

    Args:
        tokens, vocab, hidden: N, V, D; ``hidden`` None: the logits are given, and are inputs.
        dtype: of the inputs.
        logits_dtype: that the logits are cast to, such as torch.float32; None: ``dtype``.
    """
    cast = logits_dtype is not None and logits_dtype != dtype
    logits, raw = (tokens * vocab * x.itemsize for x in (logits_dtype or dtype, dtype))
    forward: Bytes = {"logits": 2 * logits} if cast or hidden is not None else {}
    forward |= {"log-softmaxes": 2 * logits, "factors in F.kl_div": 3 * logits}
    softmax = {"log-softmax": logits, "its gradient": logits, "gradient of the logits": logits + (raw if cast else 0)}
    gemm = {"gradient of the logits": raw}
    if hidden is not None:
        gemm |= {"dH": tokens * hidden * dtype.itemsize, "dW": vocab * hidden * dtype.itemsize}
    return max(forward, softmax, gemm, key=total)


def fused_bytes(
    tokens: int,
    vocab: int,
    hidden: int | None,
    teacher_hidden: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "cpu",
    device: str = "cpu",
    chunk_tokens: int | None = None,
) -> Bytes:
    """What is alive beside the inputs at the peak of :func:`fastkd.kd_loss`, forward and backward, forward KL.

    With n = min(N, chunk_tokens) tokens in a chunk, the largest of three moments. In the row op: the chunk's logits of
    student and teacher [n, V], dH [N, D], the sum of dW, and what the row op itself needs (C++: a row of each source
    for every thread; torch: 9 tensors [n, V] in float32). While a chunk is folded into dW [V, D]: the same with a part
    of dW instead. When the sum is rounded to dW: both. On a device memory counts when it is allocated, on the CPU when
    it is first written. One chunk alone needs no sum: its GEMM writes dW.

    Args:
        tokens, vocab, hidden, teacher_hidden: N, V, the D of either; ``hidden`` None: the logits are given, and their
            gradient [N, V] is what is alive.
        dtype: of the inputs.
        backend: "cpu" or "torch", whose row op and whose sum of dW are meant.
        device: "cpu", or any other type of device.
        chunk_tokens: as for kd_loss.
    """
    size = min(chunk_tokens or chunks.chunk_tokens(vocab), tokens)
    rows = _row_bytes(size, vocab, dtype, backend)
    if hidden is None:
        return {"gradient of the logits": tokens * vocab * dtype.itemsize, "row op": rows}
    compute = torch.float32 if dtype == torch.float16 and device == "cpu" else dtype
    one, lazy, width = tokens <= size, device == "cpu", accumulation(dtype).itemsize
    extra = 0 if one and compute == dtype else sum_bytes(backend, dtype)

    buffers = {f"{name}'s logits, a chunk": size * vocab * compute.itemsize for name in ("student", "teacher")}
    if compute != dtype:
        buffers["heads in float32"] = vocab * (hidden + (teacher_hidden or hidden)) * compute.itemsize
    dh = {"dH": tokens * hidden * dtype.itemsize}
    dw = {"dW": vocab * hidden * dtype.itemsize}
    summed = {"sum of dW, beside it": vocab * hidden * extra} if extra else {}
    part = min(max(chunks.PART_BYTES // (hidden * compute.itemsize), 64), vocab) * hidden * compute.itemsize
    direct = extra == 0 or compute.itemsize == width  # the GEMM itself writes or adds to the sum

    # a sum in a tensor of its own leaves dW unwritten until it is rounded; one beside dW lies partly in it
    kept = dh | summed | ({} if lazy and extra == width else dw)
    in_row_op = buffers | ({} if lazy and one else kept) | {"row op": rows}
    folding = buffers | kept | ({} if direct else {"part of dW": part})
    return max(in_row_op, folding, buffers | dh | summed | dw, key=total)


def default_backend(dtype: torch.dtype, device: str) -> str:
    """The backend that kd_loss chooses for inputs of a dtype on a type of device."""
    able = device == "cpu" and dtype != torch.float64 and BACKENDS["cpu"].unavailable() is None
    return "cpu" if able else "torch"


def sum_bytes(backend: str, dtype: torch.dtype) -> int:
    """Bytes an element of dW that a backend's sum takes beside dW itself."""
    rows = BACKENDS[backend].rows
    assert rows is not None
    extra: int = rows().Sum.extra_bytes(dtype)
    return extra


def _row_bytes(size: int, vocab: int, dtype: torch.dtype, backend: str) -> int:
    """Memory of the row op's own."""
    if backend == "cpu":
        return THREAD_ROWS * torch.get_num_threads() * vocab * 4
    return ROW_TENSORS * size * vocab * accumulation(dtype).itemsize


def plans(
    heads: terminal.Heads,
    tokens: int,
    dtype: torch.dtype,
    backend: str,
    device: str,
    chunk_tokens: int | None,
) -> dict[str, Bytes]:
    """naive, naive with float32 logits where that differs, and fused."""
    shape = tokens, heads.vocab, heads.hidden
    found = {"naive": naive_bytes(*shape, dtype)}
    if dtype.itemsize == 2:
        found["naive fp32"] = naive_bytes(*shape, dtype, torch.float32)
    sizes = {"backend": backend, "device": device, "chunk_tokens": chunk_tokens}
    return found | {"fused": fused_bytes(*shape, heads.teacher_hidden, dtype, **sizes)}  # type: ignore[arg-type]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastkd plan`."""
    parser.add_argument("--tokens", type=terminal.positive, nargs="+", metavar="N", default=[8192], help="tokens")
    terminal.head_arguments(parser)
    parser.add_argument("--dtype", nargs="+", choices=terminal.DTYPES, default=["bf16"], help="of states and heads")
    parser.add_argument("--chunk-tokens", type=terminal.positive, metavar="N", default=None, help="as for kd_loss")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="planned for; need not be there")
    parser.add_argument("--backend", choices=PLANNED, default=None, help="None: what kd_loss would choose")
    parser.add_argument("--memory", type=memory, metavar="SIZE", default=None, help="budget, such as 80GiB or 512MiB")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def memory(text: str) -> int:
    """Bytes from such as 80GiB, 24 GB, 512MiB or 1000000."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGT])(i?)B)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 80GiB, got {text!r}")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit or " ")))


def run(args: argparse.Namespace) -> int:
    """Prints the plan; 0."""
    if not terminal.heads(args, [], []):
        args.fail("expected --model, or --vocab and --hidden")
    report = examine(args)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, Console())
    return 0


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that `fastkd plan` prints, as plain data."""
    budget = args.memory if args.memory is not None else _left(args)
    cases = []
    for heads, tokens, name in product(terminal.heads(args, [], []), args.tokens, args.dtype):
        dtype = terminal.DTYPES[name]
        backend = args.backend or default_backend(dtype, args.device)
        _check_backend(args, backend, dtype)
        settings = backend, args.device, args.chunk_tokens
        cases.append(
            {
                "tokens": tokens,
                **asdict(heads),
                "dtype": name,
                "backend": backend,
                "input_bytes": input_bytes(tokens, heads.vocab, heads.hidden, heads.teacher_hidden, dtype),
                "plans": {
                    kind: {
                        "bytes": total(parts),
                        "parts": parts,
                        "tokens_that_fit": fit(heads, dtype, kind, settings, budget),
                    }
                    for kind, parts in plans(heads, tokens, dtype, *settings).items()
                },
            }
        )
    return {"device": args.device, "memory": budget, "cases": cases}


def _check_backend(args: argparse.Namespace, backend: str, dtype: torch.dtype) -> None:
    reason = BACKENDS[backend].unavailable()
    if backend == "cpu" and (args.device != "cpu" or dtype == torch.float64):
        reason = f"its row ops run on the CPU and have no float64, got {dtype} on {args.device}"
    if reason is not None:
        args.fail(f"argument --backend: {backend!r} cannot serve: {reason}")


def _left(args: argparse.Namespace) -> int | None:
    """What the device has left; None where there is no such device here, or the system does not tell."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return None
    return available_bytes(args.device)


def fit(
    heads: terminal.Heads, dtype: torch.dtype, kind: str, settings: tuple[str, str, int | None], budget: int | None
) -> int | None:
    """The most tokens whose inputs and loss fit into the budget."""
    if budget is None:
        return None

    def fits(tokens: int) -> bool:
        needed = total(plans(heads, tokens, dtype, *settings)[kind])
        return needed + input_bytes(tokens, heads.vocab, heads.hidden, heads.teacher_hidden, dtype) <= budget

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the plan for people."""
    for case in report["cases"]:
        fused = case["plans"]["fused"]["bytes"]
        models = case["model"] and " from ".join(dict.fromkeys((case["model"], case["teacher_model"])))
        hidden = " and ".join(f"{d:,}" for d in dict.fromkeys((case["hidden"], case["teacher_hidden"])))
        title = f"{models + ': ' if models else ''}{case['tokens']:,} tokens, vocabulary {case['vocab']:,}, "
        title += f"hidden {hidden}, {case['dtype']}; the inputs take {terminal.size(case['input_bytes'])}"
        table = Table("loss", "peak", "to fused", "tokens that fit", "alive at the peak", title=title)
        table.title_justify = "left"
        for column in table.columns[1:4]:
            column.justify = "right"
        for kind, plan in case["plans"].items():
            parts = "\n".join(f"{name} {terminal.size(count)}" for name, count in plan["parts"].items())
            tokens = "" if plan["tokens_that_fit"] is None else f"{plan['tokens_that_fit']:,}"
            name = f"{kind} ({case['backend']})" if kind == "fused" else kind
            table.add_row(name, terminal.size(plan["bytes"]), f"{plan['bytes'] / fused:.1f} x", tokens, parts)
        console.print(table)
    console.print("Bytes beside the inputs, with the gradients dH and dW of the student.", highlight=False)
    if report["memory"] is None:
        console.print("How many tokens fit: give a budget with --memory.", highlight=False)
    else:
        budget = terminal.size(report["memory"])
        console.print(f"Tokens whose inputs and loss fit into {budget} of {report['device']} memory.", highlight=False)
