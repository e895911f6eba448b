"""The base of an experiment: read or drawn, quantised, placed; before any method has touched it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import pretrained, training
from lora_jax.errors import UserError
from lora_jax.experiment import ModelConfig
from lora_jax.tensors.quantized import quantize


def options(model: ModelConfig, task: Any) -> dict[str, Any]:
    """Fields of the family's config that an experiment sets."""
    head = {} if task.head == "lm" else {"num_labels": task.num_labels}
    return {"remat": model.remat, "unroll": model.unroll, "head": task.head, **head}


def load(model: ModelConfig, task: Any, mesh: Any, rules: Any) -> tuple[Any, Any]:
    """(model, parameters), quantised where `model.quantize` asks for it.

    The dense model then lies in the host's memory, and its leaves go to the device one at a time (a
    stack of layers is one leaf) to be quantised there: it is never whole on an accelerator. On a
    mesh it is, in its shards, until it is quantised; the quantised leaves are then cut as far as
    their layout allows (`training.shardings`).

    Args:
      task: gives the head.
      mesh: None: one device.
      rules: ordered (regex, axes) of the mesh.
    """
    if model.init_seed is not None:
        return _draw(model, model.init_seed, task, mesh, rules)
    if model.shape is not None:
        raise UserError(
            "model.shape has no weights to train: set model.source instead, or model.init_seed "
            "to draw them"
        )
    placed: dict[str, Any] = {}
    if mesh is not None:
        placed = {"mesh": mesh, "shardings": training.load_shardings(mesh, rules)}
    read = functools.partial(
        pretrained.load_pretrained,
        model.source,
        dtype=model.dtype,
        compute_dtype=model.compute_dtype,
        head_seed=model.head_seed,
        **options(model, task),
        **placed,
    )
    if model.quantize is None:
        return read()
    if mesh is not None:
        found, params = read()
        return found, _placed(quantize(params, model.quantize), mesh, rules)
    (device,) = jnp.zeros(()).devices()
    with jax.default_device(_host()):
        found, params = read()
    return found, quantize(params, model.quantize, device=device)


def _draw(model: ModelConfig, seed: int, task: Any, mesh: Any, rules: Any) -> tuple[Any, Any]:
    """(model, parameters), none of them pretrained."""
    found, params = pretrained.draw(
        pretrained.hf_config(model.source, model.shape),
        seed,
        dtype=model.dtype,
        compute_dtype=model.compute_dtype,
        **options(model, task),
    )
    if model.quantize is not None:
        params = quantize(params, model.quantize)
    return found, params if mesh is None else _placed(params, mesh, rules)


def _placed(params: Any, mesh: Any, rules: Any) -> Any:
    for path, (parts, wanted) in training.less_cut(params, mesh, rules).items():
        print(f"{path} is quantised in blocks: on the mesh in {parts} of {wanted} parts")
    return jax.device_put(params, training.shardings(params, mesh, rules))


def sha256(model: ModelConfig) -> str | None:
    """Of the files that hold the weights; None where they are drawn."""
    return None if model.init_seed is not None else pretrained.base_sha256(model.source)


def name(model: ModelConfig) -> str:
    """What an adapter calls its base; "" where there is none to load."""
    return "" if model.init_seed is not None else model.source


def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            "model.quantize loads the dense weights on the host, but JAX was told to leave its "
            "CPU out: set JAX_PLATFORMS to cuda,cpu (or tpu,cpu), or leave it unset"
        ) from None
