"""What the runs on one base model and one task share: weights, tokenizer, records, loss, scores.

A single run has a workbench of its own; the members of a sweep work on one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import bases, partition, pretrained, training
from lora_jax.data import loader
from lora_jax.data.placeholders import behind_prompts
from lora_jax.data.tasks.chat import Chat
from lora_jax.data.tasks.prompted import opening
from lora_jax.data.tasks.text import Text
from lora_jax.errors import UserError
from lora_jax.experiment import Experiment, to_dict
from lora_jax.methods import Method
from lora_jax.pretrained.load import family_of
from lora_jax.tensors import adapt
from lora_jax.training import decoding, evaluation, loss, prompts

Batch = dict[str, Any]


class Workbench:
    """Reads only `model`, `data`, `evaluation`, `mesh` and the loss's settings of the experiment,
    and how its method cuts the base and lengthens prompts: see `serves`.

    Args:
      experiment: of any of the runs.
      mesh: in place of the experiment's own (a pack's has a sweep axis).
    """

    def __init__(self, experiment: Experiment, mesh: Any = None):
        self.experiment = experiment
        wanted = experiment.mesh
        self.mesh = mesh or (training.make_mesh(wanted) if wanted.devices > 1 else None)
        self.task = experiment.data.task
        self._prepared: dict[str, Any] = {}
        self._shapes: dict[str, tuple[Any, Any]] = {}
        # A task of running text has nothing to answer: it is scored by its loss.
        self.by_loss = self.task.principal == "loss"
        if (self.task.head != "lm" or self.by_loss) and experiment.evaluation.base_shots:
            raise UserError("evaluation.base_shots needs a task with prompts and answers")
        t = experiment.training
        for name, asked in (("keep='best'", t.keep == "best"), ("patience", t.patience)):
            if asked and not t.eval_every:
                raise UserError(f"training.{name} needs training.eval_every above 0")

    # Model.

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model, parameters cut as the method needs them)."""
        model, params = self._load()
        if (reads := family_of(model).reads) != self.task.reads:
            raise UserError(
                f"the task gives {self.task.reads} and a {type(model).__name__} reads {reads}: "
                "change data.task, or the model"
            )
        self._uncut = jax.eval_shape(lambda: params)  # shapes alone: see `serves`
        return model, self.experiment.method.arrange(params)

    def serves(self, method: Method) -> bool:
        """Whether the base is cut as this method needs it, and prompts are as long."""
        here, own = self.params, self.experiment.method
        cut = jax.eval_shape(method.arrange, self._uncut)
        return list(partition.flatten(here)) == list(partition.flatten(cut)) and (
            own.placeholders(here) == method.placeholders(here)
        )

    def _load(self) -> tuple[Any, Any]:
        """(model, parameters) as the experiment's `model` says."""
        return bases.load(self.experiment.model, self.task, self.mesh, self.sharding_rules)

    @property
    def sharding_rules(self) -> Any:
        """Ordered (regex, axes) of the experiment's mesh."""
        return self.experiment.mesh.sharding_rules

    @property
    def model(self) -> Any:
        return self.loaded[0]

    @property
    def params(self) -> Any:
        return self.loaded[1]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """None where the task reads no tokens."""
        if self.task.reads != "tokens":
            return None
        if self.experiment.model.shape is not None:
            raise UserError("model.shape has no tokenizer: for texts set model.source instead")
        return pretrained.load_tokenizer(self.experiment.model.source)

    @property
    def pad_id(self) -> int:
        """0 where the task reads no tokens."""
        return 0 if self.tokenizer is None else int(self.tokenizer.pad_id)

    # Data.

    @functools.cached_property
    def train_records(self) -> Sequence[Any]:
        return self.experiment.data.source.open()

    @functools.cached_property
    def validation_records(self) -> list[Any]:
        return list(self.task.evaluation_records(self.experiment.data.validating.open()))

    @functools.cached_property
    def placeholders(self) -> tuple[int, ...]:
        """Ids that the method wants behind every prompt."""
        ids = self.experiment.method.placeholders(self.params)
        if ids and (self.task.head != "lm" or self.by_loss):
            raise UserError(
                f"{self.experiment.method.name} puts tokens between prompt and completion: it "
                "needs a language model's task that has both; leave out infix"
            )
        if ids and self.experiment.data.loss != "completion":
            raise UserError(
                "tokens between prompt and completion have no target of their own: set "
                "data.loss='completion', or leave out infix"
            )
        return ids

    @functools.cached_property
    def train_examples(self) -> Any:
        examples = self.task.examples(self.train_records, self.tokenizer)
        return behind_prompts(examples, self.placeholders) if self.placeholders else examples

    def batches(self, seed: int) -> Any:
        """Endless training batches in the order of `seed`; its place can be saved."""
        d = self.experiment.data
        common: dict[str, Any] = dict(
            batch_size=d.batch_size, length=d.length, seed=seed, pad_id=self.pad_id,
            too_long=d.too_long,
        )  # fmt: skip
        if self.task.head == "lm":
            return loader.batches(self.train_examples, packing=d.packing, loss=d.loss, **common)
        return loader.batches(self.train_examples, packing=False, buckets=d.buckets, **common)

    # Method.

    def prepared(self, experiment: Experiment) -> Any:
        """The method of one of the runs here, after its look at the data; at each data once."""
        key = self._key(experiment)
        if key not in self._prepared:
            batches = endless(lambda: self.batches(experiment.data.seed))
            method = experiment.method.scheduled(experiment.training.steps)
            self._prepared[key] = method.prepare(adapt(self.model.apply), self.params, batches)
        return self._prepared[key]

    def shapes(self, experiment: Experiment) -> tuple[Any, Any]:
        """(trainable tree, numbers) of one of the runs here, of ShapeDtypeStructs; asked once for
        each method, since many runs of a sweep differ in other things."""
        key = self._key(experiment)
        if key not in self._shapes:
            method = self.prepared(experiment)
            start = jax.eval_shape(lambda: method.init(jax.random.key(0), self.params))
            numbers = method.numbers(self.params)
            self._shapes[key] = start, jax.eval_shape(lambda: numbers)
        return self._shapes[key]

    @staticmethod
    def _key(experiment: Experiment) -> str:
        """What `prepared` depends on."""
        looks = type(experiment.method).prepare is not Method.prepare
        seed = experiment.data.seed if looks else None
        return json.dumps([to_dict(experiment)["method"], seed], sort_keys=True)

    # Loss.

    def loss(
        self, variables: Any, batch: Batch, axis_name: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(sum of weighted losses, sum of weights) of the task's kind of loss.

        `axis_name` is that of a `vmap` over members, if there is one.
        """
        t = self.experiment.training
        smooth: dict[str, Any] = {"label_smoothing": t.label_smoothing}
        if self.task.head == "lm":
            return loss.chunked_loss(
                self.model, variables, batch, chunk=t.chunk, axis_name=axis_name, **smooth
            )
        if self.task.head == "classification":
            return loss.classification_loss(self.model, variables, batch, **smooth)
        return loss.regression_loss(self.model, variables, batch)

    # Evaluation. `output` is pure, so that packs can map it over their members.

    def check_evaluation(self) -> None:
        """Opens what only evaluations read and scores made-up answers, so that a mistake in that
        half of a config is told before training."""
        if not self.evaluation_batches:
            raise UserError(
                f"data.validation={self.experiment.data.validation!r} has no records to evaluate on"
            )
        _ = self.general_batches
        if self.by_loss:
            return
        records = self.validation_records
        if self.task.head == "lm":
            few = records[:4]
            self.task.metrics([self.task.references(r)[0] for r in few], few)
        else:
            shape = len(records), max(self.task.num_labels, 1)
            self.task.metrics(np.random.default_rng(0).normal(size=shape), records)

    @functools.cached_property
    def evaluation_batches(self) -> list[Batch]:
        """The validation records as inputs of `output`, with the record of each row (`rows`)."""
        e = self.experiment.evaluation
        if self.by_loss:
            opened = self.experiment.data.validating.open()
            return self._loss_batches(self.task.examples(opened, self.tokenizer))
        records = self.validation_records
        if self.task.head == "lm":
            ids = [[*self.task.prompt_ids(r, self.tokenizer), *self.placeholders] for r in records]
            return prompts.prompt_batches(ids, self.pad_id, batch_size=e.batch_size)
        d = self.experiment.data
        examples = self.task.examples(records, self.tokenizer)
        return list(
            loader.eval_batches(
                examples, batch_size=e.batch_size, length=d.length, pad_id=self.pad_id,
                buckets=d.buckets, too_long="truncate",
            )
        )  # fmt: skip

    @functools.cached_property
    def output(self) -> Callable[[Any, Batch], Any]:
        """(variables, evaluation batch) -> new tokens int32 [B, N], logits float32 [B, C], or for
        running text (sum of losses, tokens)."""
        if self.by_loss:
            return self.loss_sums
        if self.task.head != "lm":
            return functools.partial(loss.outputs, self.model)
        return self._decode

    @property
    def _ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)

    def _decode(self, variables: Any, batch: Batch) -> jax.Array:
        e = self.experiment.evaluation
        return decoding.decode(
            self.model, variables, batch["tokens"], batch["padding"],
            max_new_tokens=e.max_new_tokens, ends=self._ends, pad_id=self.pad_id,
            num_beams=e.num_beams, length_penalty=e.length_penalty,
            no_repeat_ngram_size=e.no_repeat_ngram_size,
        )  # fmt: skip

    def predictions(self, outputs: Sequence[np.ndarray]) -> Any:
        """Answers list[str], or logits float32 [N, C], in the order of the validation records;
        what `output` gave, for running text."""
        if self.by_loss:
            return list(outputs)
        if self.task.head == "lm":
            return self._texts(prompts.collect(self.evaluation_batches, outputs, self._ends))
        return evaluation.real_rows(self.evaluation_batches, outputs)

    def _texts(self, answers: Iterable[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def score(self, predictions: Any) -> dict[str, float]:
        """The task's metrics, the principal one first."""
        if self.by_loss:
            return {"loss": loss.mean_of(predictions)}
        found = self.task.metrics(predictions, self.validation_records)
        return {name: float(value) for name, value in found.items()}

    def evaluate(self, variables: Any) -> tuple[dict[str, float], Any]:
        """(metrics, predictions) of one model on the validation records."""
        outputs = self._outputs(self._run_output, variables, self.evaluation_batches)
        predictions = self.predictions(outputs)
        return self.score(predictions), predictions

    def _outputs(
        self, run: Callable[..., Any], variables: Any, batches: Sequence[Batch]
    ) -> list[Any]:
        places = (evaluation.placed(batch, self.mesh) for batch in batches)
        return [jax.device_get(run(variables, inputs)) for inputs in places]

    @functools.cached_property
    def _run_output(self) -> Callable[..., Any]:
        return evaluation.compiled(self.output, self.mesh)

    @functools.cached_property
    def _run_loss_sums(self) -> Callable[..., Any]:
        return evaluation.compiled(self.loss_sums, self.mesh)

    def answers(self, variables: Any, prompts: Sequence[str]) -> list[str]:
        """Continuations of some prompts."""
        if self.task.head != "lm":
            raise UserError("the run's model classifies: it has no continuations to generate")
        e = self.experiment.evaluation
        # As in training. A chat's template writes it itself.
        start = [] if isinstance(self.task, Chat) else opening(self.tokenizer)
        ids = training.generate(
            self.model, variables,
            [[*start, *self.tokenizer.encode(p), *self.placeholders] for p in prompts],
            max_new_tokens=e.max_new_tokens, eos_id=self.tokenizer.eos_id, pad_id=self.pad_id,
            num_beams=e.num_beams, length_penalty=e.length_penalty,
            no_repeat_ngram_size=e.no_repeat_ngram_size, batch_size=e.batch_size,
        )  # fmt: skip
        return self._texts(ids)

    def evaluate_base(self, seed: int) -> tuple[dict[str, float], Any]:
        """The base model with k examples in its prompt, on the same records; best k kept.

        Metrics `base_*` and `base_shots`. The examples stand before every prompt in the training
        format; an answer ends with its line, or where the model ends it.

        Args:
          seed: that draws the examples, a run's `data.seed`.
        """
        e = self.experiment.evaluation
        if not e.base_shots:
            return {}, []
        picked = np.random.default_rng(seed).permutation(len(self.train_records))
        newline, start = self.tokenizer.encode("\n")[-1], opening(self.tokenizer)
        ends = (newline, *self._ends)
        records = self.validation_records
        asked = [self.task.prompt_ids(r, self.tokenizer) for r in records]
        best: tuple[float, dict[str, float], Any] | None = None
        for k in e.base_shots:
            shots = [self.train_records[int(i)] for i in picked[:k]]
            text = "".join(self._solved(r) + "\n" for r in shots)
            # What opens a text stands before the examples, once.
            opened = bool(text) and all(ids[: len(start)] == start for ids in asked)
            ids = training.generate(
                self.model, {"params": self.params},
                [ids[len(start) :] for ids in asked] if opened else asked,
                prefix=[*(start if opened else ()), *self.tokenizer.encode(text)] if text else (),
                max_new_tokens=e.max_new_tokens, eos_id=ends, pad_id=self.pad_id,
                batch_size=e.batch_size,
            )  # fmt: skip
            answers = self._texts(ids)
            found = self.score(answers)
            value = found[self.task.principal]
            print(f"base model, {k} examples in the prompt: {self.task.principal} {value:.3f}")
            cost = -value if self.task.higher_is_better else value
            if best is None or cost < best[0]:
                named = {f"base_{n}": v for n, v in found.items()}
                best = cost, {**named, "base_shots": float(k)}, answers
        assert best is not None
        return best[1], best[2]

    def _solved(self, record: Any) -> str:
        t = self.tokenizer
        return self.task.prompt(record, t) + self.task.completion(record, t)

    # Forgetting.

    @functools.cached_property
    def general_batches(self) -> list[Batch]:
        """Blocks of general text, every token a target; empty where none was asked for."""
        e, d = self.experiment.evaluation, self.experiment.data
        if e.forgetting is None:
            return []
        if self.task.head != "lm":
            raise UserError("evaluation.forgetting needs a language model: its task classifies")
        examples = Text(length=d.length).examples(e.forgetting.open(), self.tokenizer)
        return self._loss_batches(examples[: e.forgetting_blocks])

    def _loss_batches(self, examples: Any) -> list[Batch]:
        d = self.experiment.data
        options: dict[str, Any] = {"length": d.length, "pad_id": self.pad_id, "loss": "all"}
        return list(loader.eval_batches(examples, batch_size=d.batch_size, **options))

    def loss_sums(self, variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of losses, tokens) of one batch, every token a target; pure, like `output`."""
        chunk = self.experiment.training.chunk
        return loss.chunked_loss(self.model, variables, batch, chunk=chunk)

    def general_loss(self, variables: Any) -> dict[str, float]:
        """{"general_loss": nats a token} of one model, or nothing where no text was asked for."""
        if not self.general_batches:
            return {}
        sums = self._outputs(self._run_loss_sums, variables, self.general_batches)
        return {"general_loss": loss.mean_of(sums)}


def endless(batches: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """Opens the batches when the first is asked for."""
    yield from batches()
