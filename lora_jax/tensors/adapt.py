"""`adapt(f)`: run any JAX function on trees whose leaves are weights (W + s·A·B, …).

The function is traced once with ordinary arrays of the weights' shapes. The resulting equations
are then run again: one that touches no weight is bound unchanged (custom_vjp, shard_map, Pallas
calls, anything), one that touches a weight goes to the weight's rule for that primitive. Control
flow (jit, remat, scan, while, cond) is entered only where a weight goes in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from lora_jax.tensors.base import WeightError, is_weight, stacked

Handler = Callable[[Any, list[Any], str], Sequence[Any]]


def adapt(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, but its arguments' leaves may be weights; outputs, transforms and signature as before.

    Arrays are traced; Python scalars, strings, None and functions stay the constants they are.
    Raises WeightError, with the operation, the parameter's path and the line of the model, for
    an operation that the weight has no rule for: no weight becomes dense unless asked to
    (`densify`).
    """

    @functools.wraps(f)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_weight)
        if not any(map(is_weight, leaves)):
            return f(*args, **kwargs)
        dynamic = [i for i, x in enumerate(leaves) if _is_dynamic(x)]

        def flat(*values: Any) -> Any:
            full = list(leaves)
            for i, value in zip(dynamic, values, strict=True):
                full[i] = value
            inner_args, inner_kwargs = jax.tree.unflatten(treedef, full)
            return f(*inner_args, **inner_kwargs)

        values = [leaves[i] for i in dynamic]
        jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*map(_abstract, values))
        return jax.tree.unflatten(jax.tree.structure(out), evaluate(jaxpr, values))

    return adapted


def _is_dynamic(x: Any) -> bool:
    return is_weight(x) or isinstance(x, jax.Array | np.ndarray | np.generic)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_weight(x) else x


def evaluate(closed: jex.ClosedJaxpr, args: Sequence[Any], caller: str = "") -> list[Any]:
    """The outputs of a closed jaxpr, with weights allowed among the inputs and outputs.

    `caller` is the source line of the equation that the jaxpr belongs to, for errors.
    """
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    plain: list[Any] = []  # equations since the last weight; run together, exactly as they are
    for eqn in jaxpr.eqns:
        # What `plain` has not computed yet is no weight, so absent from env is enough to know.
        touches = [v for v in eqn.invars if not isinstance(v, jex.Literal) and v in env]
        if not any(is_weight(env[v]) for v in touches):
            plain.append(eqn)
            continue
        _run_plain(jaxpr, plain, env)
        plain = []
        outputs = _dispatch(eqn, [read(v) for v in eqn.invars], caller)
        env.update(zip(eqn.outvars, outputs, strict=True))
    _run_plain(jaxpr, plain, env)
    return [read(v) for v in jaxpr.outvars]


def _run_plain(jaxpr: jex.Jaxpr, eqns: list[Any], env: dict[Any, Any]) -> None:
    """Binds equations that touch no weight, with their names, source lines and contexts."""
    if not eqns:
        return
    outvars = [v for e in eqns for v in e.outvars if not isinstance(v, jex.DropVar)]
    made = set(outvars)
    used = (v for e in eqns for v in e.invars if not isinstance(v, jex.Literal))
    invars = list(dict.fromkeys(v for v in used if v not in made))
    effects = frozenset().union(*(e.effects for e in eqns))
    debug = jaxpr.debug_info.with_unknown_names()  # its argument names are not this run's
    run = jaxpr.replace(
        constvars=(), invars=invars, outvars=outvars, eqns=eqns, effects=effects, debug_info=debug
    )
    values = jex.jaxpr_as_fun(jex.ClosedJaxpr(run, ()))(*(env[v] for v in invars))
    env.update(zip(outvars, values, strict=True))


def _dispatch(eqn: Any, values: list[Any], caller: str) -> Sequence[Any]:
    name = eqn.primitive.name
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](eqn, values, _source_line(eqn) or caller)
    at = [i for i, x in enumerate(values) if is_weight(x)]
    weight = values[at[0]]
    rule = getattr(weight, f"rule_{name}", None)
    why = ""
    if name in _OWN_DERIVATIVE:
        why = "is a function with a derivative of its own, which is about an array"
    elif len(at) > 1:
        why = f"also takes the weight {values[at[1]].path!r}"
    elif rule is None:
        why = f"has no rule for {type(weight).__name__}"
    else:
        result = rule(values, at[0], eqn.params)
        if result is not NotImplemented:
            return result if eqn.primitive.multiple_results else [result]
        why = f"is used in a way the {type(weight).__name__} rule cannot do"
    shapes = ", ".join(str(tuple(v.aval.shape)) for v in eqn.invars)
    raise WeightError(
        f"{name}({shapes}) on {weight.path!r} {why}, at {_place(_source_line(eqn), caller)}. "
        + weight.advice.format(path=weight.path)
    )


def _place(line: str, caller: str) -> str:
    # What a library's jitted function does may be cached from another caller, or have no line.
    if line and caller and line != caller:
        return f"{line}, called from {caller}"
    return line or caller or "an unknown line"


def _source_line(eqn: Any) -> str:
    """file:line of the model's own code that made the equation: the innermost foreign frame."""
    traceback = eqn.source_info.traceback
    libraries = ("/jax/", "/flax/", "/lora_jax/tensors/", "/jaxlib/", "functools.py", "contextlib")
    frames = traceback.frames if traceback is not None else []
    for frame in frames:
        if not any(part in frame.file_name.replace("\\", "/") for part in libraries):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""


def _jit(eqn: Any, values: list[Any], caller: str) -> Sequence[Any]:
    return evaluate(eqn.params["jaxpr"], values, caller)


def _call(eqn: Any, values: list[Any], caller: str) -> Sequence[Any]:
    body = eqn.params["call_jaxpr"]
    closed = body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())
    return evaluate(closed, values, caller)


def _barrier(eqn: Any, values: list[Any], caller: str) -> Sequence[Any]:
    return jax.lax.optimization_barrier(values)


def _remat(eqn: Any, values: list[Any], caller: str) -> Sequence[Any]:
    closed = jex.ClosedJaxpr(eqn.params["jaxpr"], ())
    run = jax.checkpoint(
        lambda *xs: evaluate(closed, xs, caller),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return run(*values)


def _scan(eqn: Any, values: list[Any], caller: str) -> Sequence[Any]:
    params = eqn.params
    n_const, n_carry = params["num_consts"], params["num_carry"]
    consts, carry, xs = (
        values[:n_const],
        values[n_const : n_const + n_carry],
        values[n_const + n_carry :],
    )
    sliced, whole, treedef, mask = _split_stacked(xs)

    def body(carry: Any, step: Any) -> tuple[Any, Any]:
        moving, fixed = iter(step), iter(whole)
        leaves = [next(moving) if m else next(fixed) for m in mask]
        inputs = [*consts, *carry, *jax.tree.unflatten(treedef, leaves)]
        outputs = evaluate(params["jaxpr"], inputs, caller)
        return outputs[:n_carry], outputs[n_carry:]

    carry, ys = jax.lax.scan(
        body, carry, sliced, params["length"], params["reverse"], params["unroll"]
    )
    return [*carry, *ys]


def _split_stacked(xs: list[Any]) -> tuple[list[Any], list[Any], Any, list[bool]]:
    """Scanned inputs as flat arrays: those that are sliced, those that every step shares."""
    leaves, treedef = jax.tree.flatten(xs)
    flags = [stacked(x) for x in xs]
    mask = jax.tree.leaves(flags)
    sliced = [x for x, m in zip(leaves, mask, strict=True) if m]
    whole = [x for x, m in zip(leaves, mask, strict=True) if not m]
    return sliced, whole, treedef, mask


def _while(eqn: Any, values: list[Any], caller: str) -> Sequence[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts = values[:n_cond]
    body_consts = values[n_cond : n_cond + n_body]
    return jax.lax.while_loop(
        lambda carry: evaluate(params["cond_jaxpr"], [*cond_consts, *carry], caller)[0],
        lambda carry: evaluate(params["body_jaxpr"], [*body_consts, *carry], caller),
        values[n_cond + n_body :],
    )


def _cond(eqn: Any, values: list[Any], caller: str) -> Sequence[Any]:
    index, *operands = values
    branches = [functools.partial(_run_branch, b, caller) for b in eqn.params["branches"]]
    return jax.lax.switch(index, branches, *operands)


def _run_branch(closed: jex.ClosedJaxpr, caller: str, *operands: Any) -> list[Any]:
    return evaluate(closed, operands, caller)


_CONTROL_FLOW: dict[str, Handler] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "optimization_barrier": _barrier,
    "checkpoint": _remat,
    "remat": _remat,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}

# Not entered: what is inside would be differentiated by the usual rules, silently.
_OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call")
