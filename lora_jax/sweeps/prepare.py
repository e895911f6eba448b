"""A pack made ready to train: its program, and how many of its members are in it at once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Literal

import jax

from lora_jax import host, training
from lora_jax.errors import UserError
from lora_jax.plan import device_bytes, device_memory
from lora_jax.runs import begin
from lora_jax.sweeps import pack, planner
from lora_jax.sweeps.train import FILES_A_SLOT, OTHER_FILES
from lora_jax.workbench import Workbench

Mode = Literal["auto", "packed", "serial"]


@dataclasses.dataclass
class Prepared:
    """A pack that is ready to train: its program, and what is expected of it."""

    plan: planner.PackPlan
    program: pack.Program
    mode: Literal["packed", "serial"]
    probed: int  # programs that were compiled for the choice alone
    seconds: float


def prepare(
    plan: planner.PackPlan, bench: Workbench, *, mode: Mode, slots: int | None, memory: int | None
) -> Prepared:
    """Compiles a pack's program, and chooses how many members are in it at once.

    Args:
      bench: that of the pack's members.
      mode, slots, memory: see `sweep.Options`.

    Raises:
      UserError: not even one member a device fits in memory.
    """
    members = plan.members
    start = begin(bench, members[0].experiment)
    shapes, numbers = zip(*(bench.shapes(m.experiment) for m in members), strict=True)
    like = pack.hull_state(start.method, start.tx, shapes, numbers)
    axis = 1 if bench.mesh is None else bench.mesh.shape["sweep"]

    def program(slots: int) -> pack.Program:
        return pack.Program(bench, start, pack.Shape(like, slots), chunk=eval_chunk(slots))

    count = len(members)
    wanted = axis if mode == "serial" else min(count, slots or count)
    most = _with_files(wanted)
    limit = memory or memory_bytes(bench)
    first = _fits(program(-(-most // axis) * axis), count, limit, axis)
    fewer = slot_counts(count, first.shape.slots, axis) if mode == "auto" else ()
    chosen, seconds, probed = fastest(itertools.chain([first], map(program, fewer)), count)
    seconds *= chosen.usual_share * members[0].experiment.training.steps
    found = Prepared(
        plan, chosen, "serial" if chosen.shape.slots == axis else "packed", probed, seconds
    )
    print(
        f"pack of {count} members: {found.mode}, {chosen.shape.slots} at a time, "
        f"{plan.params:,} parameters each ({plan.padding:.0%} padding), "
        f"{chosen.bytes() / 2**30:.2f} GiB, about {seconds:.0f} s of training",
        flush=True,
    )
    return found


def _fits(program: pack.Program, members: int, limit: int, axis: int) -> pack.Program:
    """The program, or one with fewer slots that fits in `limit` bytes a device."""
    while (need := program.bytes()) > limit:
        slots = program.shape.slots
        fewer = planner.fewer_slots(
            slots, members, fixed=device_bytes(program.frozen), need=need, limit=limit, axis=axis
        )
        if slots == axis or fewer >= slots:
            raise UserError(
                f"a pack of {slots} needs {need / 2**30:.2f} GiB on a device and "
                f"{limit / 2**30:.2f} are "
                "there: use a smaller batch, remat, or a mesh with fsdp"
            )
        program = program.with_slots(fewer)
    return program


def _with_files(slots: int) -> int:
    """How many slots this process may hold the files of, `slots` at most."""
    allowed = host.allow_open_files(slots * FILES_A_SLOT + OTHER_FILES)
    most = max(1, (allowed - OTHER_FILES) // FILES_A_SLOT)
    if most < slots:
        print(f"{most} members at once: this process may open {allowed} files (ulimit -n)")
    return min(slots, most)


def slot_counts(members: int, slots: int, axis: int) -> Iterator[int]:
    """Numbers of slots to try besides `slots`: about thirds, down to one a device of the sweep axis
    (`axis` of them), with as few as possible empty in the last round."""
    while slots > axis:
        third = max(axis, slots // 3 // axis * axis)
        rounds = -(-members // third)
        slots = min(third, -(-members // (rounds * axis)) * axis)
        yield slots


def fastest(programs: Iterable[pack.Program], members: int) -> tuple[pack.Program, float, int]:
    """(program, seconds of one step of all members, programs that were compiled besides).

    They are compiled and timed in turn until one is no faster: a CPU's caches hold few members at
    once, where an accelerator is not busy with few.
    """
    best, least, compiled = None, math.inf, 0
    for program in programs:
        seconds = -(-members // program.shape.slots) * program.seconds_a_step()
        compiled += program.programs
        if seconds >= least:
            break
        best, least = program, seconds
    assert best is not None
    return best, least, compiled - best.programs


def eval_chunk(slots: int) -> int:
    """Slots evaluated together: a CPU is busy with one, an accelerator is not."""
    return 1 if jax.default_backend() == "cpu" else min(slots, 8)


def memory_bytes(bench: Workbench) -> int:
    """What a pack may use of a device's (or, on a CPU, this host's) memory: 80 %."""
    mesh = bench.mesh or training.make_mesh()
    return int(device_memory(mesh, None) * 0.8)
