"""What the methods have in common that act on activations: their place at the model's sites.

Their trainable tree holds, besides leaves trained whole, what goes to a site under the path
`sites/<path of the site>`, such as `sites/layers[0:12]/mlp/out`.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base

SITES = "sites/"
Sites = dict[str, tuple[Any, Callable[..., Any], int]]
"""Path of a site -> what `models.Site` holds: (parameters, function, length)."""


@dataclasses.dataclass(frozen=True)
class ActivationMethod(base.Method):
    """Base of the methods that leave the weights alone and act at sites.

    A subclass defines `fresh`, what it trains, and `sites`, what becomes of that.

    Args:
      train: regexes of leaves trained whole besides, such as "^head/" for a new task's head.
    """

    mergeable: ClassVar[bool] = False

    # What differs in size is structure unless a subclass says otherwise: nothing is ever padded.
    padding_exact: ClassVar[bool] = True

    train: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def fresh(self, key: jax.Array, params: Any) -> base.Trainable:
        """What is trained at the start, by `sites/…` path."""
        raise TypeError(f"{type(self).__name__} does not define fresh")

    def sites(self, trained: base.Trainable, params: Any) -> Sites:
        """The sites of what `fresh` gave, trained since."""
        raise TypeError(f"{type(self).__name__} does not define sites")

    def _whole(self, params: Any) -> list[str]:
        return base.whole_leaves(params, self.train)

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        return {**self.fresh(key, params), **base.copies(params, self._whole(params))}

    def combine(
        self,
        params: Any,
        trainable: base.Trainable,
        *,
        key: jax.Array | None = None,
        numbers: Mapping[str, Any] | None = None,
    ) -> Any:
        trained, whole = split(trainable)
        placed = place(self.sites(trained, params), params)
        return {"params": partition.combine(params, whole), "sites": placed}

    def merge(self, params: Any, trainable: base.Trainable) -> Any:
        raise UserError(
            f"{self.name} acts on activations: no weights of the base compute the same, so it "
            "cannot be merged; keep base and adapter apart"
        )

    def count(self, params: Any) -> base.Counts:
        fresh = count_fresh(self.fresh, params)
        return base.Counts.of(fresh.items(), base.count_whole(params, self._whole(params)).items())

    def frozen(self, params: Any) -> Any:
        return base.holes(params, self._whole(params))


def split(trainable: Mapping[str, Any]) -> tuple[base.Trainable, base.Trainable]:
    """(what goes to sites, leaves of the model), by path."""
    at_sites = {p: x for p, x in trainable.items() if p.startswith(SITES)}
    return at_sites, {p: x for p, x in trainable.items() if p not in at_sites}


def place(sites: Sites, params: Any) -> dict[str, Any]:
    """The variable collection "sites": nested dicts that hold a `models.Site` at each path.

    Raises UserError for a site in a stack that `params` does not hold: it would go unseen.
    """
    from lora_jax.models.sites import Site  # Flax: not before a model is run

    held = stacks(params)
    tree: dict[str, Any] = {}
    for path, (values, fn, length) in sites.items():
        *parents, last = path.split("/")
        if partition.stack_of(path) is not None and not any(path.startswith(f"{s}/") for s in held):
            raise UserError(
                f"the adapter has {path!r}, but the parameters' layers are cut as {list(held)}: "
                "cut them as they were when it was made (`method.arrange(params)`)"
            )
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = Site(values, fn, length)
    return tree


def count_fresh(fresh: Callable[[jax.Array, Any], base.Trainable], params: Any) -> dict[str, int]:
    """Parameters of `fresh(key, params)` by target, `sites/layers/*/mlp/out`; nothing is drawn."""
    like = jax.eval_shape(fresh, jax.random.key(0), shapes(params))
    sizes = (
        (base.target_name(path), int(np.prod(x.shape, dtype=np.int64)))
        for path, values in like.items()
        for x in jax.tree.leaves(values)
    )
    return base.Counts.of(sizes).per_target


def shapes(params: Any) -> Any:
    """Shapes in place of leaves, by path: weights and holes are leaves too."""
    return {
        p: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        for p, x in partition.flatten(params).items()
    }


def stacks(params: Any) -> dict[str, tuple[int, int]]:
    """The stacks of layers in a tree: `layers[0:12]` -> (0, 12), in order."""
    found: dict[str, tuple[int, int]] = {}
    for path in partition.flatten(params):
        parts = path.split("/")
        for at, part in enumerate(parts):
            if (span := partition.stack_of(part)) is not None:
                found["/".join(parts[: at + 1])] = span
    return dict(sorted(found.items(), key=lambda item: item[1]))


def width(params: Any, leaf: str, name: str) -> int:
    """Size of the last axis of the leaf at `leaf`, by which the model shows that it has a site.

    Raises UserError where there is no such leaf.
    """
    flat = partition.flatten(params)
    if leaf not in flat:
        raise UserError(
            f"{name} needs a model with sites (a family of lora_jax.models that has {leaf!r}); "
            "this tree is of another model"
        )
    return int(flat[leaf].shape[-1])


def layer_stacks(params: Any, name: str) -> dict[str, tuple[int, int]]:
    """`stacks`; UserError where there are none."""
    found = stacks(params)
    if not found:
        raise UserError(
            f"{name} needs a model with sites in stacked layers (`layers[0:12]`), as the families "
            "of lora_jax.models have them; this tree has none"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Draw:
    """What random entries are drawn from: "normal" N(0, size²), "truncated" the same cut at two
    deviations, "uniform" U(±size), "integers" 0 to size - 1."""

    kind: str
    size: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if self.kind == "normal":
            return self.size * jax.random.normal(key, shape)
        if self.kind == "truncated":
            return self.size * jax.random.truncated_normal(key, -2.0, 2.0, shape)
        if self.kind == "uniform":
            return jax.random.uniform(key, shape, minval=-self.size, maxval=self.size)
        return jax.random.randint(key, shape, 0, int(self.size))


def draw(key: jax.Array, path: str, shape: tuple[int, ...], sample: Draw) -> jax.Array:
    """Random rows: [*shape], or [layers, *shape] for a path in a stack.

    Row i of layer l has a key of its own, whatever other rows there are and however the stack is
    cut: a smaller start is the beginning of a larger one.
    """
    layers = np.array([zlib.crc32(e.encode()) for e in partition.expand(path)], np.uint32)
    drawn = _draw(key, layers, shape, sample)
    return drawn if partition.stack_of(path) is not None else drawn[0]


@functools.partial(jax.jit, static_argnames=("shape", "sample"))
def _draw(key: jax.Array, layers: Any, shape: tuple[int, ...], sample: Draw) -> jax.Array:
    """Compiled: a start is many small draws, of few shapes."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))

    def layer(mine: jax.Array) -> jax.Array:
        return jax.vmap(lambda k: sample(k, shape[1:]))(fold(mine, jnp.arange(shape[0])))

    return jax.vmap(layer)(fold(key, layers))


def rows_in_front(rows: jax.Array, x: jax.Array) -> jax.Array:
    """[P, ...] before [B, S, ...]: the same rows for all of the batch, in x's dtype."""
    front = jnp.broadcast_to(rows.astype(x.dtype)[None], (x.shape[0], *rows.shape))
    return jnp.concatenate([front, x], axis=1)
