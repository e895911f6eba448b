"""A pack: members of one structure trained by one compiled program, in slots.

The program is the single run's own step under `vmap`: frozen parameters are shared, everything
else has a leading axis over the slots. A slot holds one member at a time; a freed slot takes the
next member, with no recompilation.

Axes: M slots, B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import partition, training
from lora_jax.data.bucketing import sizes, widen
from lora_jax.plan.cost import out_of_memory
from lora_jax.runs import Start
from lora_jax.sweeps import padding
from lora_jax.training import State
from lora_jax.training.spectra import Row, rows, update_spectra, weight_norms
from lora_jax.workbench import Batch, Workbench

_MEMBERS = "members"
"""The mapped axis, by name: what is alike in all slots may ask so, and stay unmapped."""


PEEKED = 16
"""So many batches say how long rows usually are."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a pack's program is compiled for.

    Attributes:
      state: ShapeDtypeStructs of one slot's state: the hull of all members' states.
      slots: M.
    """

    state: State
    slots: int


def hull_state(method: Any, tx: Any, trainables: Sequence[Any], numbers: Sequence[Any]) -> State:
    """Abstract state that holds each member's, padded; trees as from `method.init`/`numbers`."""
    trainable = padding.hull(trainables)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return State(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        trainable=trainable,
        opt_state=jax.eval_shape(method.wrap_optimizer(tx).init, trainable),
        keys={"dropout": key},  # type: ignore[dict-item]
        numbers=padding.hull(numbers),
    )


class Program:
    """The compiled functions of a pack.

    Args:
      bench: what the members share.
      start: any member's; the program reads its method's and optimizer's structure alone, all
        numbers come with the slots' states.
      shape: of the slots.
      chunk: slots that are evaluated together.
    """

    def __init__(self, bench: Workbench, start: Start, shape: Shape, *, chunk: int = 1):
        self.bench, self.shape, self.chunk = bench, shape, min(chunk, shape.slots)
        self.method = start.method
        self.frozen = start.frozen
        self._start = start
        self._compiled: dict[str, Any] = {}
        self._functions: dict[Callable[[Any, Batch], Any], Any] = {}
        self._single = training.step_function(
            functools.partial(bench.loss, axis_name=_MEMBERS),
            start.method,
            start.tx,
            accumulate=bench.experiment.training.accumulate,
        )

    def with_slots(self, slots: int) -> Program:
        shape = dataclasses.replace(self.shape, slots=slots)
        return Program(self.bench, self._start, shape, chunk=self.chunk)

    # Training.

    @functools.cached_property
    def step(self) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
        """(frozen, states [M, …], batches [M, B, T], live bool [M]) -> (states, metrics [M]).

        A slot that is not live, or whose loss or gradient is not finite, keeps its state.
        """
        mesh = self.bench.mesh
        across = None if mesh is None else "sweep"

        def packed(frozen: Any, states: State, batches: Batch, live: jax.Array):
            new, metrics = jax.vmap(
                self._single, in_axes=(None, 0, 0), axis_name=_MEMBERS, spmd_axis_name=across
            )(frozen, states, batches)
            good = live & (metrics["finite"] > 0)

            def chosen(after: jax.Array, before: jax.Array) -> jax.Array:
                return jnp.where(good.reshape(-1, *[1] * (after.ndim - 1)), after, before)

            kept = new.replace(
                step=chosen(new.step, states.step),
                trainable=jax.tree.map(chosen, new.trainable, states.trainable),
                opt_state=jax.tree.map(chosen, new.opt_state, states.opt_state),
            )
            return kept, metrics

        if mesh is None:
            return jax.jit(packed, donate_argnums=1)
        everywhere = NamedSharding(mesh, PartitionSpec("sweep"))
        return jax.jit(packed, donate_argnums=1, out_shardings=(self.shardings, everywhere))

    @functools.cached_property
    def compiled(self) -> Any:
        """`step`, compiled for batches of the longest rows."""
        return self._compiled_for(self.batch)

    def run(self, states: State, batches: Batch, live: np.ndarray) -> tuple[State, Any]:
        """One step of all slots; batches [M, B, T] on the host.

        Compiled once for each length of rows (one, or as many as there are buckets): slots take
        new members with no recompilation.
        """
        one = {name: x[0] for name, x in batches.items()}
        return self._compiled_for(one)(self.frozen, states, self.place_batches(batches), live)

    def _compiled_for(self, batch: Batch) -> Any:
        key = json.dumps({name: x.shape for name, x in batch.items()}, sort_keys=True)
        if key not in self._compiled:
            arguments = self._abstract(batch)
            self._compiled[key] = self.step.lower(*arguments).compile()  # type: ignore[attr-defined]
        return self._compiled[key]

    @property
    def programs(self) -> int:
        """How many were compiled for the step."""
        return len(self._compiled)

    def _abstract(self, example: Batch) -> tuple[Any, State, Any, Any]:
        slots, mesh = self.shape.slots, self.bench.mesh

        def stacked(x: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((slots, *x.shape), x.dtype, sharding=sharding)

        live = jax.ShapeDtypeStruct((slots,), jnp.bool_)
        batch = self.place_batches({n: np.stack([x] * slots) for n, x in example.items()})
        batches = {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
            for n, x in batch.items()
        }
        if mesh is None:
            return self.frozen, jax.tree.map(stacked, self.shape.state), batches, live
        states = jax.tree.map(stacked, self.shape.state, self.shardings)
        return self.frozen, states, batches, live

    @functools.cached_property
    def batch(self) -> Batch:
        """The first batch, with rows as long as any batch's."""
        bench, data = self.bench, self.bench.experiment.data
        first = next(bench.batches(data.seed))
        if not data.buckets:
            return first
        longest = min(data.length, max(len(e["tokens"]) for e in bench.train_examples))
        size = next(s for s in sizes(data.length, data.buckets) if s >= longest)
        return widen(first, size, bench.pad_id)

    @functools.cached_property
    def usual_share(self) -> float:
        """Slots of tokens in a usual batch, as part of those in `batch`, whose rows are longest."""
        bench, data = self.bench, self.bench.experiment.data
        if not data.buckets:
            return 1.0
        some = itertools.islice(bench.batches(data.seed), PEEKED)
        return float(np.mean([b["tokens"].size for b in some])) / self.batch["tokens"].size

    def bytes(self) -> int:
        """What the step needs on a device: arguments, temporaries, and outputs of their own.

        Where the compiler itself refuses, what it asked for.
        """
        try:
            memory = self.compiled.memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            return out_of_memory(error)[0]
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh

    def seconds_a_step(self) -> float:
        """Measured on slots that hold zeros: the work does not depend on the values.

        The best of two or three: the first also pays for memory that is new.
        """
        states = self.empty()
        batches = {n: np.stack([x] * self.shape.slots) for n, x in self.batch.items()}
        live = np.ones(self.shape.slots, bool)
        _ = self.compiled  # which takes longer than the steps
        best, spent = float("inf"), 0.0
        for done in range(1, 4):
            began = time.perf_counter()
            states, metrics = self.run(states, batches, live)
            jax.block_until_ready((states, metrics))
            took = time.perf_counter() - began
            best, spent = min(best, took), spent + took
            if done > 1 and spent > 2.0:
                break
        return best

    # Places.

    @functools.cached_property
    def shardings(self) -> State:
        """Where the stacked states live: slots over `sweep`, the rest as in a single run."""
        mesh = self.bench.mesh
        assert mesh is not None
        tx = self.method.wrap_optimizer(self._start.tx)
        single = training.state_shardings(
            self.shape.state, self.bench.params, tx, mesh, self.bench.sharding_rules
        )
        return jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec("sweep", *s.spec)), single)

    def place(self, states: State) -> State:
        return states if self.bench.mesh is None else jax.device_put(states, self.shardings)

    def place_batches(self, batches: Batch) -> Any:
        """[M, B, …] host arrays onto the mesh: slots over `sweep`, rows over data and fsdp."""
        if self.bench.mesh is None:
            return batches
        return training.place_batch(batches, self.bench.mesh, lead="sweep")

    # Slots.

    def empty(self) -> State:
        """Slots that hold nothing: zeros."""

        def zeros(x: Any) -> jax.Array:
            if partition.is_key(x):
                return jnp.broadcast_to(jax.random.key(0), (self.shape.slots, *x.shape))
            return jnp.zeros((self.shape.slots, *x.shape), x.dtype)

        return self.place(jax.tree.map(zeros, self.shape.state))

    @functools.cached_property
    def put(self) -> Callable[[State, Any, State], State]:
        """(states, slot number, one padded state) -> states; the old states are donated."""

        def put(states: State, slot: Any, one: State) -> State:
            return jax.tree.map(lambda all_, x: all_.at[slot].set(x), states, one)

        if self.bench.mesh is None:
            return jax.jit(put, donate_argnums=0)
        return jax.jit(put, donate_argnums=0, out_shardings=self.shardings)

    @functools.cached_property
    def take(self) -> Callable[[Any, Any], Any]:
        """(states or a part of them, slot number) -> that slot's, padded."""
        return jax.jit(padding.take)

    # Evaluation.

    def outputs(
        self,
        function: Callable[[Any, Batch], Any],
        states: State,
        slots: Sequence[int],
        batches: Sequence[Batch],
    ) -> list[list[Any]]:
        """`function(variables, batch)` of each slot and batch: [slot][batch], on the host.

        Slots go through `chunk` at a time in one program, the last chunk filled by repetition.
        """
        run = self._mapped(function)
        found: list[list[Any]] = [[] for _ in slots]
        for at in range(0, len(slots), self.chunk):
            some = list(slots[at : at + self.chunk])
            index = np.array(some + [some[-1]] * (self.chunk - len(some)))
            held = jax.tree.map(lambda x, i=index: x[i], (states.trainable, states.numbers))
            for batch in batches:
                arrays = {n: x for n, x in batch.items() if n != "rows"}
                out = jax.device_get(run(self.frozen, *held, arrays))
                for k in range(len(some)):
                    found[at + k].append(jax.tree.map(lambda x, k=k: x[k], out))
        return found

    def spectra(self, states: State, slots: Sequence[int]) -> list[list[Row]]:
        """`spectra.rows` of some slots: one program decomposes the factors of all of them."""
        held = states.trainable, states.numbers
        found = jax.device_get(self._spectra(self.frozen, *held, self._weight_norms))
        return [rows(padding.take(found, slot)) for slot in slots]

    @functools.cached_property
    def _spectra(self) -> Callable[..., Any]:
        k = self.bench.experiment.evaluation.spectra
        one = functools.partial(update_spectra, self.method, k=k)
        return jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)))

    @functools.cached_property
    def _weight_norms(self) -> Any:
        """Of the base, which all slots share: once for all of a pack's evaluations."""
        one = self.shape.state
        return weight_norms(self.method, self.frozen, one.trainable, one.numbers)

    def _mapped(self, function: Callable[[Any, Batch], Any]) -> Callable[..., Any]:
        cache = self._functions
        if function not in cache:

            def one(frozen: Any, trainable: Any, numbers: Any, batch: Batch) -> Any:
                return function(self.method.combine(frozen, trainable, numbers=numbers), batch)

            def alone(frozen: Any, trainable: Any, numbers: Any, batch: Batch) -> Any:
                # Under vmap a loop of decoding copies its cache at each token: not for one slot.
                first = padding.take((trainable, numbers), 0)
                out = one(frozen, first[0], first[1], batch)
                return jax.tree.map(lambda x: x[None], out)

            mapped = alone if self.chunk == 1 else jax.vmap(one, in_axes=(None, 0, 0, None))
            cache[function] = jax.jit(mapped)
        return cache[function]
