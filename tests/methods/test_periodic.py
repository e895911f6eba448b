"""What is done now and then costs nothing in between, of one run and of mapped members alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from descendants import METHODS, prepared, toy_params

from lora_jax.methods.periodic import where_due
from lora_jax.training import State

OLD = {"x": jnp.arange(6.0).reshape(3, 2)}  # a row a member


def act(old: Any, factor: Any, key: Any) -> Any:
    return {"x": old["x"] * factor + jax.random.normal(key, old["x"].shape)}


@pytest.mark.parametrize("due", [[True, False, True], [False] * 3, [True] * 3])
def test_each_member_is_its_own(due: list[bool]) -> None:
    keys, factor = jax.random.split(jax.random.key(0), 3), jnp.float32(10)

    def one(d: Any, old: Any, key: Any) -> Any:
        return where_due(d, act, old, factor, key)

    got = jax.jit(jax.vmap(one))(jnp.array(due), OLD, keys)["x"]
    for i, d in enumerate(due):
        old = {"x": OLD["x"][i]}
        wanted = act(old, factor, keys[i]) if d else old
        np.testing.assert_allclose(got[i], wanted["x"], rtol=1e-6)
        np.testing.assert_allclose(one(jnp.array(d), old, keys[i])["x"], wanted["x"], rtol=1e-6)
    # One state for all members, each of which may be due.
    shared = jax.vmap(one, (0, None, 0))(jnp.array(due), {"x": OLD["x"][0]}, keys)["x"]
    kept = (np.asarray(shared) == np.asarray(OLD["x"][0])).all(1)
    assert (kept == ~np.array(due)).all()


def primitives(jaxpr: Any, *, inside_cond: bool) -> set[str]:
    """Names of all that is computed; those of conditionals' branches if asked for."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        if equation.primitive.name == "cond" and not inside_cond:
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                found |= primitives(getattr(inner, "jaxpr", inner), inside_cond=inside_cond)
    return found


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_galore_decomposes_where_a_member_is_due() -> None:
    method, params = prepared("galore"), toy_params()
    trainable = method.init(jax.random.key(0), params)
    tx = method.wrap_optimizer(optax.adam(1e-3))
    two = jax.tree.map(lambda x: jnp.stack([x, x]), (trainable, tx.init(trainable)))
    jaxpr = jax.make_jaxpr(jax.vmap(tx.update))(two[0], two[1], two[0]).jaxpr
    assert "svd" in primitives(jaxpr, inside_cond=True)
    assert "svd" not in primitives(jaxpr, inside_cond=False)


def test_relora_draws_where_a_member_is_due() -> None:
    method, params = METHODS["relora"], toy_params()
    trainable = method.init(jax.random.key(0), params)
    tx = method.wrap_optimizer(optax.adam(1e-3))

    def after(step: Any, trainable: Any, opt_state: Any, key: Any) -> Any:
        state = State(step, trainable, opt_state, {"dropout": key}, method.numbers(params))
        return method.after_update(state).trainable

    two = jax.tree.map(lambda x: jnp.stack([x, x]), (trainable, tx.init(trainable)))
    steps, keys = jnp.array([1, 2]), jax.random.split(jax.random.key(1), 2)
    jaxpr = jax.make_jaxpr(jax.vmap(after))(steps, *two, keys).jaxpr
    assert {"random_bits", "dot_general"} <= primitives(jaxpr, inside_cond=True)
    assert not {"random_bits", "dot_general"} & primitives(jaxpr, inside_cond=False)
    a_1, a_2 = next(iter(jax.vmap(after)(steps, *two, keys).values()))["a"]
    assert not np.array_equal(a_1, a_2)  # the second is due
