"""Checkpoints to resume from: the latest, and the best by one evaluation metric.

Orbax writes them in the background and atomically: an interrupted save leaves only a temporary
folder, which the next `Checkpoints` on that directory removes. Arrays are stored flat, by path,
so that they can be compared with what the program expects before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from lora_jax.errors import UserError

_POLICIES = ocp.training.preservation_policies


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        step: number of updates done.
        state: like the state it was asked for.
        data: the data iterator's state as JSON text; None if none was saved.
        metrics: finite evaluation metrics saved with it, maybe empty.
    """

    step: int
    state: Any
    data: str | None
    metrics: dict[str, float]


class Checkpoints:
    """The checkpoints in one directory; use as a context manager, or call `close`.

    Args:
        directory: made if missing. Temporary folders of killed saves are removed from it, in the
            background, at the latest by the first save.
        metric: name of the evaluation metric that picks the best checkpoint; None: latest only.
        mode: "min" or "max" is best.
    """

    def __init__(self, directory: str | Path, *, metric: str | None = None, mode: str = "min"):
        if mode not in ("min", "max"):
            raise UserError(f"checkpoint mode {mode!r} must be 'min' or 'max'.")
        self.directory = Path(directory).absolute()
        self._metric, self._sign = metric, 1.0 if mode == "min" else -1.0
        policies: list[Any] = [_POLICIES.LatestN(1)]
        if metric is not None:
            # Ranked descending by cost: the policy keeps the end of the list.
            policies.append(
                _POLICIES.BestN(
                    get_metric_fn=self._cost,
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=_POLICIES.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )

    def _cost(self, metrics: Any) -> float:
        value = (metrics or {}).get(self._metric)
        return math.inf if value is None else self._sign * float(value)

    def save(self, step: int, state: Any, *, data: str | None = None, metrics: Any = None) -> None:
        """Starts to save in the background; `state` may be donated as soon as this returns.

        Waits for the save before. A step that is already saved is left as it is, unless metrics
        come for the first time.
        """
        self.wait()
        finite = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(float(v))}
        known = {c.step: c for c in self._orbax.checkpoints}
        if step in known and (known[step].metrics or not finite):
            return
        self._orbax.save_async(
            step,
            _flat(state),
            force=True,  # the caller decides when to save, not orbax's policy
            overwrite=step in known,
            metrics=finite or None,
            custom_metadata={"data": data},
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the best metric; None if no checkpoint has it."""
        scored = [
            (self._cost(c.metrics), c.step)
            for c in self._orbax.checkpoints
            if self._metric in (c.metrics or {})
        ]
        return min(scored)[1] if scored else None

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.directory / str(step)

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """The checkpoint of `step` (default: latest), as a tree like `like`.

        Args:
            like: arrays or ShapeDtypeStructs with shardings; results land where these are.

        Raises UserError if there is no such checkpoint, or names, shapes or dtypes differ.
        """
        self.wait()
        step = self.latest if step is None else step
        steps = [c.step for c in self._orbax.checkpoints]
        if step is None or step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; there are {steps}.")
        info = self._orbax.metadata(step)
        wanted = _flat(jax.tree.map(_abstract, like))
        _check(wanted, info.metadata, self.path(step))
        loaded = self._orbax.load(step, wanted)
        custom = info.custom_metadata or {}
        known = {c.step: c.metrics for c in self._orbax.checkpoints}
        return Restored(step, _unflat(like, loaded), custom.get("data"), dict(known[step] or {}))

    def wait(self) -> None:
        """Returns when nothing is being saved; raises what the background save raised."""
        self._orbax.wait()

    def close(self) -> None:
        self._orbax.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of a leaf; of the words behind it if it is a random key."""
    sharding = getattr(x, "sharding", None)
    if _is_key(x):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _flat(state: Any) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): jax.random.key_data(x)
        if _is_key(x)
        else x
        for path, x in pairs
    }


def _unflat(like: Any, flat: dict[str, Any]) -> Any:
    pairs, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, old in pairs:
        new = flat[jax.tree_util.keystr(path, simple=True, separator="/")]
        if _is_key(old):
            impl = jax.random.key_impl(old) if isinstance(old, jax.Array) else None
            new = jax.random.wrap_key_data(new, impl=impl)
        leaves.append(new)
    return jax.tree.unflatten(treedef, leaves)


def _check(wanted: dict[str, Any], saved: dict[str, Any], where: Path) -> None:
    """UserError that names the first leaves that differ: orbax's own message does not."""
    problems = [f"{name} is not in the checkpoint" for name in sorted(set(wanted) - set(saved))]
    problems += [f"{name} is only in the checkpoint" for name in sorted(set(saved) - set(wanted))]
    for name in sorted(set(wanted) & set(saved)):
        old, new = saved[name], wanted[name]
        if tuple(old.shape) != tuple(new.shape) or old.dtype != new.dtype:
            problems.append(
                f"{name} was {old.dtype}{list(old.shape)}, now {new.dtype}{list(new.shape)}"
            )
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"checkpoint {where} does not fit this run: {'; '.join(problems[:4])}{more}. "
            "Resume with the config it was made with, or use another workdir."
        )
