"""An experiment: the frozen dataclasses that a config becomes, once, at the edge.

Everything that decides a run's numbers stands here with its default; a saved config is complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lora_jax import config as configs
from lora_jax import methods, training
from lora_jax.data import sources, tasks
from lora_jax.errors import UserError


def _at_least(least: int, config: Any, part: str, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) < least:
            raise UserError(f"{part}.{name}={value} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The base model: alias, Hugging Face folder, .gguf or hub id. The task chooses the head."""

    source: str = "smollm2-135m"
    dtype: str = "float32"  # of the parameters
    compute_dtype: str | None = None  # of the activations; None: as the parameters
    remat: str = "none"  # none | full | dots
    unroll: int | None = None  # layers per iteration of the scan; None: all, if they are few
    head_seed: int = 0  # of a head that the pretrained weights lack
    quantize: Literal["nf4", "int8"] | None = None  # kernels of attention and MLP; see lj.quantize
    # The fields of a Hugging Face config.json in place of `source`: a shape with no weights,
    # for `lora-jax plan`, or with an init_seed.
    shape: Any = None
    # All weights are drawn by it; `source` then gives its shape and its tokenizer. None: they are
    # the source's.
    init_seed: int | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on: records of `source`, made examples by `task`."""

    source: Any
    task: Any
    validation: str = "validation[:128]"  # the split for evaluation
    validation_source: Any = None  # that it is a split of, if not of `source`
    batch_size: int = 8  # rows a step
    length: int = 128  # tokens a row
    packing: bool = True  # several examples a row; language models only
    buckets: tuple[int, ...] = ()  # row lengths of padded batches; (): `length` alone
    loss: Literal["completion", "all"] = "completion"
    too_long: Literal["error", "truncate", "drop"] = "error"
    seed: int = 0  # of the order: runs that differ in Experiment.seed alone see the same batches

    def __post_init__(self) -> None:
        _at_least(1, self, "data", "batch_size", "length")
        _at_least(0, self, "data", "seed")

    @property
    def validating(self) -> Any:
        """The source of the validation records."""
        return dataclasses.replace(self.validation_source or self.source, split=self.validation)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    steps: int = 100
    accumulate: int = 1  # micro-batches a step
    eval_every: int = 0  # steps; 0: at the end only
    save_every: int = 0  # steps; 0: at evaluations and at the end only
    log_every: int = 10
    # Converged, and so done before `steps`: so many evaluations in a row without a better principal
    # metric than the best before them; 0: never.
    patience: int = 0
    keep: Literal["last", "best"] = "last"  # which evaluated state the adapter is of
    chunk: int = 512  # positions whose logits exist at one time
    label_smoothing: float = 0.0
    dropout_seed: int = 0  # of the dropout masks, likewise apart from Experiment.seed
    start_from: str | None = None  # an adapter folder to go on from

    def __post_init__(self) -> None:
        _at_least(0, self, "training", "steps", "eval_every", "save_every", "log_every", "patience")
        _at_least(1, self, "training", "accumulate", "chunk")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"training.label_smoothing={self.label_smoothing} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Predictions on the validation records, scored by the task's metrics."""

    batch_size: int = 64
    max_new_tokens: int = 48
    num_beams: int = 1  # 1: greedy
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # 0: off
    base_shots: tuple[int, ...] = ()  # examples in the base model's prompt; best is kept
    show: int = 8  # answers printed side by side
    # Singular values of each update ΔW = s·A·B to log at every evaluation, with its size, into
    # spectra.jsonl and metrics.jsonl; 0: none of it. On 2 CPU cores an evaluation takes so much
    # longer: MiniLM-L6's 12 matrices of rank 8, 2 ms; SmolLM2's 210 of rank 16, 0.1 s, and of
    # rank 256, seconds.
    spectra: int = 16
    # General text whose loss is measured before and after: what training made the model forget.
    forgetting: Any = None  # a source; its `text` field is read
    forgetting_blocks: int = 64  # blocks of DataConfig.length tokens

    def __post_init__(self) -> None:
        _at_least(1, self, "evaluation", "batch_size", "max_new_tokens", "num_beams",
                  "forgetting_blocks")  # fmt: skip
        _at_least(0, self, "evaluation", "no_repeat_ngram_size", "show", "spectra")
        if any(k < 0 for k in self.base_shots):
            raise UserError(f"evaluation.base_shots={self.base_shots} must be 0 or more each")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run's numbers.

    `seed` is of the method's start. The order of the data, the dropout masks and a new head have
    seeds of their own, so that runs over seeds, ranks or rates are paired; vary `data.seed`,
    `training.dropout_seed` and `model.head_seed` as well where a spread should include them.
    """

    data: DataConfig
    model: ModelConfig = ModelConfig()
    method: Any = dataclasses.field(default_factory=methods.LoRA)
    optimizer: training.OptimizerConfig = dataclasses.field(
        default_factory=training.OptimizerConfig
    )
    mesh: training.MeshConfig = dataclasses.field(default_factory=training.MeshConfig)
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0
    training: TrainingConfig = TrainingConfig()  # last: the name hides the module from here on


def kinds() -> dict[str, configs.Kinds]:
    """The fields whose `kind` chooses a class, and the classes."""
    source: configs.Kinds = {"tfds": sources.TFDS, "files": sources.Files}
    return {
        "method": methods.METHODS,
        "source": source,
        "validation_source": source,
        "forgetting": source,
        "task": tasks.TASKS,
    }


def from_dict(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """The experiment a config describes; unknown keys and wrong types are UserErrors."""
    built = configs.build(Experiment, config, kinds())
    if overrides:
        built = configs.build(Experiment, configs.override(to_dict(built), overrides), kinds())
    return built


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The complete config, of plain JSON values."""
    return configs.expand(experiment, kinds())
