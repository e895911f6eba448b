"""An experiment's plan: its model as shapes, its batches as one made-up example gives them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import bases, training
from lora_jax.errors import UserError
from lora_jax.experiment import Experiment
from lora_jax.plan.devices import device_memory, mesh_for, parse_memory
from lora_jax.plan.plan import Plan, plan_step
from lora_jax.pretrained.assemble import abstract_params
from lora_jax.pretrained.load import build_model, family_of
from lora_jax.pretrained.shape import hf_config
from lora_jax.tensors.quantized import quantize
from lora_jax.workbench import Workbench


def plan_config(
    experiment: Experiment, *, topology: str | None = None, memory: int | str | None = None
) -> Plan:
    """What a training step of the experiment needs; no weight is read and no data opened.

    It is an upper bound where the data would show that fewer positions carry loss, and leaves out
    a method's `prepare` and the evaluation.

    Args:
      topology: a TPU slice to compile for, such as "v5e:8x8" (needs the extra `tpu`, not a TPU);
        None: the devices that are here.
      memory: of a device, in bytes or as "24GiB"; None: what the device has.
    """
    mesh = mesh_for(experiment.mesh, topology)
    bench = Sketch(experiment, mesh)
    return plan_step(
        bench.loss,
        experiment.method.scheduled(experiment.training.steps),
        training.make_optimizer(experiment.optimizer, experiment.training.steps),
        bench.params,
        next(bench.batches(0)),
        mesh=mesh,
        memory=device_memory(mesh, topology) if memory is None else parse_memory(memory),
        rules=bench.sharding_rules,
        accumulate=experiment.training.accumulate,
    )


class Sketch(Workbench):
    """A workbench whose parameters are `ShapeDtypeStruct`s and whose data is one long example."""

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        model, self._uncut = self._load()
        return model, jax.eval_shape(self.experiment.method.arrange, self._uncut)

    def _load(self) -> tuple[Any, Any]:
        m = self.experiment.model
        dtype = _dtype(m.compute_dtype or m.dtype).name
        options = {"dtype": dtype, **bases.options(m, self.task)}
        model = build_model(hf_config(m.source, m.shape), options)
        params = abstract_params(family_of(model).tensors(model.config), _dtype(m.dtype))
        if m.quantize is not None:
            params = jax.eval_shape(functools.partial(quantize, rules=m.quantize), params)
        return model, params

    @property
    def pad_id(self) -> int:
        return 0

    @functools.cached_property
    def train_examples(self) -> list[dict[str, Any]]:
        d = self.experiment.data
        if self.task.reads == "images":
            shape = self.model.config.image_shape
            return [{"image": np.zeros(shape, np.uint8), "label": 0}]
        length = d.length
        tokens = np.ones(length, np.int32)
        if self.task.head == "lm":
            return [{"tokens": tokens, "loss_mask": np.ones(length, np.float32)}]
        label = 0 if self.task.head == "classification" else 0.0
        return [{"tokens": tokens, "token_type_ids": np.zeros(length, np.int32), "label": label}]


def _dtype(name: str) -> jnp.dtype:
    try:
        return jnp.dtype(name)
    except TypeError:
        raise UserError(f"model dtype {name!r}: write float32, bfloat16 or float16") from None
