"""Runs a random call of block-sparse attention on some backends and compares it with the oracle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import block_sparse_attention
from dilated_attention_pytorch.ops.block_sparse_attention import explain_backend
from guards import oracle, rounding
from guards.draws import Case, Dice

NAMES = ("query", "key", "value", "block_bias", "mass_probe")


@dataclass(frozen=True)
class Outcome:
    """What became of one call: what is wrong with it, or why it was refused; else nothing."""

    kind: str
    backend: str
    wrong: str = ""
    refusal: str = ""


def expected(case: Case) -> tuple[dict[str, Tensor], rounding.Bounds]:
    """The oracle's results and gradients, and how far others may be off."""
    options, dtype = case.options, case.dtype
    q, k, v = (
        x.to(dtype).double().contiguous().requires_grad_()
        for x in (case.query, case.key, case.value)
    )
    bias = options["block_bias"]
    if bias is not None:
        bias = bias.double().requires_grad_()
    out, lse, p = oracle.attention(
        q, k, v, case.slots, scale=options["scale"], bias=bias, rows=case.rows
    )
    grad_out = case.grad_out.double()
    grads = [grad_out]
    if case.grad_lse is not None:
        grads.append(case.grad_lse.double())
    inputs = [q, k, v] if bias is None else [q, k, v, bias]
    found = torch.autograd.grad([out, lse][: len(grads)], inputs, grads, allow_unused=True)
    want = {"out": out.detach(), "lse": lse.detach()}
    for name, x, grad in zip(NAMES, inputs, found, strict=False):
        want[name] = torch.zeros_like(x) if grad is None else grad
    shape = (len(q), *case.pattern.kv_indices.shape[1:])
    p = p.detach()
    want["mass_probe"] = oracle.tile_mass(p, grad_out, case.slots, case.rows, shape)
    call = rounding.Call(
        q.detach(), k.detach(), v.detach(), case.slots, case.rows, shape, case.scale,
        None if bias is None else bias.detach(), p, grad_out,
        None if case.grad_lse is None else grads[1],
    )  # fmt: skip
    limits = rounding.bounds(call, dtype)
    limits["block_bias"], limits["mass_probe"] = limits.pop("bias"), limits.pop("mass")
    for name in ("block_bias", "mass_probe"):
        given = options[name]
        # One bias for all samples has the sum of their gradients.
        if given is not None and given.shape[0] < shape[0]:
            limits[name] = limits[name].sum(0, keepdim=True)
        if given is not None and given.shape[0] == 1 and name == "mass_probe":
            want[name] = want[name].sum(0, keepdim=True)
        if given is not None:
            eps = torch.finfo(given.dtype).eps
            # A sum over samples may cancel what was rounded: by its terms, which the bound follows.
            wider = max(1.0, eps / torch.finfo(dtype).eps)
            limits[name] = limits[name] * wider + 4 * eps * want[name].abs()
            large = want[name].abs() > torch.finfo(given.dtype).max / 4
            limits[name] = limits[name].masked_fill(large, torch.inf)
    return want, limits


def difference(
    name: str, got: Tensor, want: Tensor, limit: Tensor, nan: Tensor | None = None
) -> str:
    """What is wrong with a result, or nothing. ``nan``: rows ``(b, h, n)`` that read one."""
    if got.shape != want.shape:
        return f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    # A gradient has its own input's dtype, which may be narrower than the others'.
    limit = limit + 4 * torch.finfo(got.dtype).tiny
    got = got.detach().double().cpu()
    same = (got == want) | ((got - want).abs() <= limit) | ~(limit < torch.inf)
    if name in ("out", "lse") and nan is not None:
        # A row that reads NaN must not look as if it had not.
        rows = nan if name == "lse" else nan.transpose(1, 2)[..., None]
        same = torch.where(rows & want.isnan(), ~got.isfinite(), same)
    if bool(same.all()):
        return ""
    at = tuple(int(x) for x in (~same).nonzero()[0])
    return (
        f"{name}{list(at)} is {float(got[at]):.6g}, not {float(want[at]):.6g} "
        f"(+- {float(limit[at]):.2g}); {int((~same).sum())} of {same.numel()} are wrong"
    )


def rows_of_nan(case: Case) -> Tensor:
    """Rows ``(b, h, n)`` that read a NaN; a scale of 0 may leave out the product altogether."""
    group = case.query.shape[2] // case.key.shape[2]
    q, k, v = (x.transpose(1, 2).isnan().any(-1) for x in (case.query, case.key, case.value))
    k, v = (x.repeat_interleave(group, 1)[:, :, None] for x in (k, v))
    found = v if case.scale == 0 else q[..., None] | k | v
    return ((case.slots >= 0) & found).any(-1)


def run(case: Case, backend: str, device: str) -> dict[str, Tensor]:
    """Results and gradients of one call."""

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor) or device == "cpu":
            return x
        # Copied by its storage, so that strides and what lies between stay.
        return torch.empty(0, dtype=x.dtype, device=device).set_(
            x.untyped_storage().to(device=device), x.storage_offset(), x.shape, x.stride()
        )

    options = {name: place(x) for name, x in case.options.items()}
    inputs = {
        "query": place(case.query), "key": place(case.key), "value": place(case.value),
        "block_bias": options.pop("block_bias"), "mass_probe": options.pop("mass_probe"),
    }  # fmt: skip
    inputs = {
        name: x.detach().requires_grad_(case.needs[name])
        for name, x in inputs.items()
        if x is not None
    }
    pattern = case.pattern if device == "cpu" else case.pattern.to(device)
    q, k, v = (inputs[name] for name in NAMES[:3])
    with torch.autocast(device, torch.bfloat16, enabled=case.autocast):
        result = block_sparse_attention(
            q, k, v, pattern, backend=backend, block_bias=inputs.get("block_bias"),
            mass_probe=inputs.get("mass_probe"), **options,
        )  # fmt: skip
    out, lse = result if isinstance(result, tuple) else (result, None)
    if out.dtype != case.dtype:
        raise AssertionError(f"the output is {out.dtype}, not {case.dtype}")
    found = {"out": out} if lse is None else {"out": out, "lse": lse}
    needed = [name for name, x in inputs.items() if x.requires_grad]
    if needed:
        grads = [place(case.grad_out)]
        outs = [out]
        if case.grad_lse is not None and lse is not None and lse.requires_grad:
            outs, grads = [out, lse], [*grads, place(case.grad_lse)]
        gradients = torch.autograd.grad(outs, [inputs[name] for name in needed], grads)
        found |= dict(zip(needed, gradients, strict=True))
    return found


def check(case: Case, backends: Sequence[str], device: str) -> list[Outcome]:
    """Compares each backend with the oracle."""
    dice, outcomes = Dice(case.seed + 1), []
    want, limits = expected(case)
    for backend in backends:
        fill = dice.chance(0.5)
        try:
            # Memory that nobody wrote is NaN.
            torch.use_deterministic_algorithms(fill, warn_only=True)
            found = run(case, backend, device)
            again = run(case, backend, device) if dice.chance(0.1) else found
        except ValueError as error:
            outcomes.append(_refused(case, backend, error))
            continue
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}".split("\n")[0]
            outcomes.append(Outcome("attention", backend, wrong))
            continue
        finally:
            torch.use_deterministic_algorithms(False)
        # PyTorch's own attention may give 0 in rows that read NaN.
        nan = None if backend in ("dense", "auto") and case.complete else rows_of_nan(case)
        wrong = [difference(name, x, want[name], limits[name], nan) for name, x in found.items()]
        if not (device != "cpu" and backend in ("dense", "flash_atomic")):
            wrong += [
                f"{name} differs from run to run"
                for name, x in found.items()
                if not torch.equal(x.detach().nan_to_num(7.0), again[name].detach().nan_to_num(7.0))
            ]
        outcomes.append(Outcome("attention", backend, "; ".join(x for x in wrong if x)))
    return outcomes


def _refused(case: Case, backend: str, error: ValueError) -> Outcome:
    """A named backend may refuse, for a reason that ``explain_backend`` gives as well."""
    text = str(error)
    match = re.match(r"backend='\w+' cannot run this: (.*); use backend='auto'", text)
    if backend == "auto" or backend in ("gather", "reference") or match is None:
        return Outcome("attention", backend, f"ValueError: {text}")
    reason = re.sub(r"-?\d+(\.\d+)?|torch\.\w+", "_", match[1])
    if case.query.device.type == "cpu":
        options = {**case.options, "backend": backend}
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                explain_backend(case.query, case.key, case.value, case.pattern, **options)
        except ValueError as explained:
            if str(explained) == text:
                return Outcome("attention", backend, "", reason)
        return Outcome("attention", backend, f"explain_backend does not say: {text}")
    return Outcome("attention", backend, "", reason)


def some_backends(case: Case, device: str) -> list[str]:
    """Backends that take the call, and sometimes one that will refuse it."""
    dice = Dice(case.seed + 2)
    if device != "cpu":
        names = ["triton", "flash", "gather", "dense", "auto"]
        shares = [1.0, 0.05, 0.2, 1.0 if case.complete else 0.03, 0.3]
    else:
        names = ["gather", "reference", "cpp", "dense", "auto"]
        fits = case.query.dtype == torch.float32
        shares = [1.0, 0.5, 1.0 if fits else 0.03, 1.0 if case.complete else 0.03, 0.25]
    return [name for name, share in zip(names, shares, strict=True) if dice.chance(share)]
