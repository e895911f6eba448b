"""Checkpoints to resume from: the latest, and the best by one evaluation metric.

Orbax writes them in the background and atomically: an interrupted save leaves only a temporary
folder, which the next `Checkpoints` on that directory removes. Arrays are stored flat, by path,
so that they can be compared with what the program expects before anything is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lora_jax import partition
from lora_jax.errors import UserError, nearest

_POLICIES = ocp.training.preservation_policies
_TRAINABLE = "trainable/"


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


@dataclasses.dataclass
class _FirstBest(ocp.training.preservation_policies.PreservationPolicy):
    """Keeps the checkpoint of least cost, of equals the first: orbax's BestN keeps the last, and
    how long ago the best one was would then never grow on a metric that stands still."""

    cost: Callable[[Any], float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        costs = [self.cost(c.metrics) for c in checkpoints]
        best = min(range(len(costs)), key=costs.__getitem__, default=None)
        return [i == best and math.isfinite(costs[i]) for i in range(len(costs))]


class Checkpoints:
    """The checkpoints in one directory; use as a context manager, or call `close`.

    Args:
        directory: made if missing. Temporary folders of killed saves are removed from it, in the
            background, at the latest by the first save.
        metric: name of the evaluation metric that picks the best checkpoint, of equal ones the
            first; None: latest only.
        mode: "min" or "max" is best.

    Raises UserError if the directory cannot be made.
    """

    def __init__(self, directory: str | Path, *, metric: str | None = None, mode: str = "min"):
        if mode not in ("min", "max"):
            raise UserError(f"checkpoint mode {mode!r} must be 'min' or 'max'.")
        self.directory = Path(directory).absolute()
        self._metric, self._sign = metric, 1.0 if mode == "min" else -1.0
        self._saving: int | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the checkpoint directory {self.directory}: {error.strerror}; "
                "choose a workdir that can be written."
            ) from error
        self._orbax = self._open()

    def _open(self) -> Any:
        policies: list[Any] = [_POLICIES.LatestN(1)]
        if self._metric is not None:
            policies.append(_FirstBest(self._cost))
        return ocp.training.Checkpointer(
            self.directory,
            preservation_policy=_POLICIES.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """UserError for a save that fails; what it had written is removed.

        A failure in the background has the type that the writing library gives it, so any
        exception that is not the caller's own counts.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            step, self._saving = self._saving, None
            for part in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
            # After a failure orbax no longer knows the checkpoints that are on the disk, and
            # raises the same again at each call.
            with contextlib.suppress(type(error)):
                self._orbax.close()
            self._orbax = self._open()
            kept = self.latest
            kept_text = "there is none before it" if kept is None else f"{self.path(kept)} is whole"
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.directory}: {error}; "
                f"{kept_text}. Free space there, or choose another workdir."
            ) from error

    def _cost(self, metrics: Any) -> float:
        value = (metrics or {}).get(self._metric)
        return math.inf if value is None else self._sign * float(value)

    def save(self, step: int, state: Any, *, data: str | None = None, metrics: Any = None) -> None:
        """Starts to save in the background; `state` may be donated as soon as this returns.

        Waits for the save before. A step that is already saved is left as it is, unless metrics
        come for the first time.
        """
        self.wait()
        if metrics and self._metric is not None and self._metric not in metrics:
            raise UserError(
                f"the metric {self._metric!r} that picks the best checkpoint is not among those of "
                f"the evaluation; {nearest(self._metric, metrics)}"
            )
        finite = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(float(v))}
        known = {c.step: c for c in self._orbax.checkpoints}
        if step in known and (known[step].metrics or not finite):
            return
        self._saving = step
        with self._writing():
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

    def stale(self) -> int:
        """Updates from the best checkpoint to the latest; 0 where none has the metric."""
        self.wait()
        best, latest = self.best, self.latest
        return 0 if best is None or latest is None else latest - best

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.directory / str(step)

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """The checkpoint of `step` (default: latest), as a tree like `like`.

        Args:
            like: arrays or ShapeDtypeStructs with shardings; results land where these are.

        Raises UserError if there is no such checkpoint, or names, shapes or dtypes differ.
        """
        step, info = self._find(step)
        wanted = _flat(jax.tree.map(_abstract, like))
        _check(wanted, info.metadata, self.path(step))
        loaded = self._orbax.load(step, wanted)
        custom = info.custom_metadata or {}
        return Restored(step, _unflat(like, loaded), custom.get("data"), self.metrics(step))

    def restore_trainable(self, like: Any, step: int | None = None) -> Any:
        """The trainable tree alone of the State saved at `step` (default: latest).

        Args:
            like: arrays or ShapeDtypeStructs with shardings, such as `state.trainable`.

        Raises as `restore`.
        """
        step, info = self._find(step)
        flat = _flat(jax.tree.map(_abstract, like))
        wanted = {_TRAINABLE + name: leaf for name, leaf in flat.items()}
        saved = {n: x for n, x in info.metadata.items() if n.startswith(_TRAINABLE)}
        _check(wanted, saved, self.path(step))
        loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
        with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
            loaded = self._orbax.load(step, wanted)
        return _unflat(like, {n.removeprefix(_TRAINABLE): x for n, x in loaded.items()})

    def _find(self, step: int | None) -> tuple[int, Any]:
        self.wait()
        step = self.latest if step is None else step
        steps = [c.step for c in self._orbax.checkpoints]
        if step is None or step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; there are {steps}.")
        return step, self._orbax.metadata(step)

    def metrics(self, step: int) -> dict[str, float]:
        """The finite evaluation metrics saved with `step`, maybe none."""
        return dict(
            next((c.metrics for c in self._orbax.checkpoints if c.step == step), None) or {}
        )

    def wait(self) -> None:
        """Returns when nothing is being saved; UserError if the save under way failed."""
        with self._writing():
            self._orbax.wait()

    def close(self) -> None:
        """Waits for the save under way, and raises as `wait`."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is None:
            self.close()
            return
        # A save that fails now must not hide the error that is already on its way.
        with contextlib.suppress(UserError):
            self.close()


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of a leaf; of the words behind it if it is a random key."""
    sharding = getattr(x, "sharding", None)
    if partition.is_key(x):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _flat(state: Any) -> dict[str, Any]:
    flat = partition.arrays(state)
    return {path: jax.random.key_data(x) if partition.is_key(x) else x for path, x in flat.items()}


def _unflat(like: Any, flat: dict[str, Any]) -> Any:
    leaves = []
    for path, old in partition.arrays(like).items():
        new = flat[path]
        if partition.is_key(old):
            impl = jax.random.key_impl(old) if isinstance(old, jax.Array) else None
            new = jax.random.wrap_key_data(new, impl=impl)
        leaves.append(new)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


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
