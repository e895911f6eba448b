"""Paths into parameter trees, ordered (regex, value) rules over them, and trees with holes.

A leaf's path is its keys joined by "/". A component `name[i:j]` is a stack: every leaf under it
carries a leading axis that runs over the layers i … j-1, and stands for the expanded paths
`name/i/…` to `name/(j-1)/…`. Users write regexes about expanded paths, so a rule about layer 3
reads the same whether layers are stacked, split in segments, or kept apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax

from lora_jax.errors import UserError, nearest

T = TypeVar("T")
_STACK = re.compile(r"^(?P<name>.*)\[(?P<start>\d+):(?P<stop>\d+)\]$")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hole:
    """Stands where a leaf was taken out of a tree: no array, only what was there.

    A method that trains a leaf whole holds it in its trainable tree; the frozen tree then need
    not keep a second copy.
    """

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})


def _is_leaf(node: Any) -> bool:
    # Weight types (lora_jax.tensors) are pytrees, yet one leaf of the parameter tree.
    return isinstance(node, Hole) or getattr(type(node), "is_weight", False)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a random key, of which only the words behind it are numbers."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree, keyed by path, in tree order. Weights and holes are leaves."""
    return _by_path(tree, _is_leaf)


def arrays(tree: Any) -> dict[str, Any]:
    """What JAX itself takes for leaves, keyed by path, in tree order: the arrays within weights."""
    return _by_path(tree, None)


def _by_path(tree: Any, is_leaf: Callable[[Any], bool] | None) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in pairs}


def unflatten_like(tree: Any, flat: Mapping[str, Any]) -> Any:
    """A tree shaped like `tree` whose leaf at each path is `flat[path]`.

    Raises UserError if the paths of `flat` are not exactly those of `tree`.
    """
    paths = list(flatten(tree))
    if set(paths) != set(flat):
        odd = sorted(set(paths) ^ set(flat))
        raise UserError(f"paths do not match the tree's: {', '.join(odd[:5])}")
    treedef = jax.tree_util.tree_structure(tree, is_leaf=_is_leaf)
    return jax.tree_util.tree_unflatten(treedef, [flat[p] for p in paths])


def replace(tree: Any, new: Mapping[str, Any]) -> Any:
    """`tree` with the leaves at the paths of `new` replaced; an unknown path is a UserError."""
    flat = flatten(tree)
    for path in new:
        if path not in flat:
            raise UserError(f"no leaf at {path!r}; {nearest(path, flat)}")
    return unflatten_like(tree, {**flat, **new})


def split(tree: Any, predicate: Callable[[str, Any], bool]) -> tuple[Any, dict[str, Any]]:
    """(tree with holes, taken leaves by path): takes each leaf where predicate(path, leaf)."""
    taken = {p: x for p, x in flatten(tree).items() if predicate(p, x)}
    return replace(tree, {p: Hole(tuple(x.shape), x.dtype) for p, x in taken.items()}), taken


def combine(tree: Any, taken: Mapping[str, Any]) -> Any:
    """The inverse of `split`: fills the holes. A hole left over is a UserError."""
    full = replace(tree, taken)
    left = [p for p, x in flatten(full).items() if isinstance(x, Hole)]
    if left:
        raise UserError(f"nothing fills the holes at {', '.join(left[:5])}")
    return full


def stack_of(path: str) -> tuple[int, int] | None:
    """The layer range (start, stop) of the stack that `path` lies in; None outside of stacks."""
    for part in path.split("/"):
        if match := _STACK.match(part):
            return int(match["start"]), int(match["stop"])
    return None


def stack_name(path: str) -> str:
    """What the stack that `path` lies in is called: `layers` of `layers[0:2]/x`."""
    return next(m["name"] for part in path.split("/") if (m := _STACK.match(part)))


def expand(path: str) -> list[str]:
    """The paths a stacked path stands for: `l[0:2]/x` is `l/0/x`, `l/1/x`; others themselves."""
    parts = path.split("/")
    for at, part in enumerate(parts):
        if match := _STACK.match(part):
            head, tail = parts[:at], parts[at + 1 :]
            layers = range(int(match["start"]), int(match["stop"]))
            return ["/".join([*head, match["name"], str(i), *tail]) for i in layers]
    return [path]


def module(path: str) -> str:
    """The module that owns the leaf: the path without its last name (NNX's `/value` aside)."""
    path = path.removesuffix("/value")
    return path.rsplit("/", 1)[0] if "/" in path else path


def is_embedding(path: str) -> bool:
    """Whether the leaf is called `embedding`, as Flax calls tables of vectors."""
    return path.removesuffix("/value").endswith("embedding")


def sibling(path: str, name: str) -> str:
    """The path of the leaf called `name` in the module that owns the leaf at `path`."""
    leaf = path.removesuffix("/value")
    parent, slash, _ = leaf.rpartition("/")
    return f"{parent}{slash}{name}{path[len(leaf) :]}"


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` is found in an expanded leaf path or in its module's path.

    A leaf of NNX's `dense/kernel/value` may also be called `dense/kernel`.
    """
    names = (path, path.removesuffix("/value"), module(path))
    return any(re.search(pattern, name) for name in names)


@dataclasses.dataclass(frozen=True)
class Rules(Generic[T]):
    """Ordered (regex, value) over expanded paths: the first match wins.

    A bare value is short for one rule that matches everything.
    """

    rules: tuple[tuple[str, T], ...]

    @classmethod
    def of(cls, value: Any) -> Rules:
        """From a bare value, or a sequence of (regex, value) pairs."""
        pairs = isinstance(value, Sequence) and not isinstance(value, str)
        if pairs and not all(isinstance(x, Sequence) and len(x) == 2 for x in value):
            raise UserError(f"{value!r}: rules are pairs of a regex and a value, (('query$', 8),)")
        rules = tuple((str(p), v) for p, v in value) if pairs else ((".*", value),)
        for pattern, _ in rules:
            compiled(pattern)
        return cls(rules)

    def get(self, path: str, default: Any = None) -> Any:
        """The value of the first rule that matches the expanded `path`."""
        return next((v for p, v in self.rules if matches(p, path)), default)

    def check(self, paths: Iterable[str], what: str) -> None:
        """UserError for a rule that matches none of the expanded `paths`, with near misses."""
        check_patterns((p for p, _ in self.rules if p != ".*"), paths, what)


def compiled(pattern: str) -> re.Pattern[str]:
    """The compiled regex; UserError where it is not one."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}") from None


def listed(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """One regex or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def check_patterns(patterns: Iterable[str], paths: Iterable[str], what: str) -> None:
    """UserError for the first pattern that matches no path."""
    paths = list(paths)
    for pattern in patterns:
        compiled(pattern)
        if not any(matches(pattern, p) for p in paths):
            # Layers repeat: offer each module once, by the path of the layer seen first.
            names = {re.sub(r"/\d+/", "/*/", module(p)): module(p) for p in reversed(paths)}
            raise UserError(
                f"{what}: the pattern {pattern!r} matches nothing; "
                f"{nearest(pattern.strip('$^'), names.values(), n=5)}"
            )


def split_stacks(tree: Any, bounds: Mapping[str, Sequence[int]]) -> Any:
    """Cuts stacks into segments: `{"layers": [10]}` makes `layers[0:10]`, `layers[10:30]`.

    A layer that is trained whole must not share an array with frozen ones: cut there. UserError
    for a stack that is not there.
    """
    there = {m["name"] for p in flatten(tree) for part in p.split("/") if (m := _STACK.match(part))}
    if unknown := [name for name in bounds if name not in there]:
        raise UserError(f"there is no stack {unknown[0]!r}; {nearest(unknown[0], there)}")
    return _split_stacks(tree, bounds)


def _split_stacks(tree: Any, bounds: Mapping[str, Sequence[int]]) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    out: dict[str, Any] = {}
    for key, sub in tree.items():
        match = _STACK.match(str(key))
        if not match:
            out[key] = _split_stacks(sub, bounds)
            continue
        start, stop = int(match["start"]), int(match["stop"])
        inside = {b for b in bounds.get(match["name"], ()) if start < b < stop}
        cuts = sorted({start, stop, *inside})
        for i, j in itertools.pairwise(cuts):
            part = sub
            if (i, j) != (start, stop):
                cut = slice(i - start, j - start)
                part = jax.tree.map(lambda x, cut=cut: x[cut], sub)
            out[f"{match['name']}[{i}:{j}]"] = part
    return out
