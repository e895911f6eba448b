"""The PEFT arms of the benchmarks: the same weights and batches on torch, as PEFT's users write it.

    python experiments/torch_peer.py SETTINGS BATCH

is an arm of benchmark_step, in a process of its own: settings of `Trainer` and a batch as npz.

Attention is transformers' `sdpa`, threads and allocator are torch's defaults. Imported only where
torch, transformers and peft are installed; `reason` says what is missing. Needs no JAX.

Axes: B rows, T positions.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TORCH_NAMES = {"lm": ["q_proj", "v_proj"], "classification": ["query", "value"]}
IGNORED = -100  # a label without loss
# Both arms of a comparison compute the same function: ours has no dropout in these models.
NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


def reason() -> str | None:
    """Why this arm cannot run; None if it can."""
    missing = [n for n in ("torch", "transformers", "peft") if importlib.util.find_spec(n) is None]
    return (
        f"{', '.join(missing)} not installed (pip install 'lora-jax[parity]')" if missing else None
    )


class Trainer:
    """A PEFT model and its AdamW: `update(batch)` is one step and gives the loss.

    Args:
      folder: of the base, as transformers reads it.
      head: "lm", or "classification" with the labels that the folder's config has.
      adapter: folder of a LoRA adapter to start from; None: PEFT's own start, B = 0.
      device: torch's name, "cpu" or "cuda".
      compiled: whether the model goes through torch.compile.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        head: str = "lm",
        adapter: str | Path | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        learning_rate: float = 1e-3,
        dtype: str = "float32",
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        import peft
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        auto: Any = transformers.AutoModelForCausalLM
        if head == "classification":
            auto = transformers.AutoModelForSequenceClassification
        config = transformers.AutoConfig.from_pretrained(folder)
        for name in NO_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        base: Any = auto.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).to(device)
        if adapter is not None:
            model: Any = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
        else:
            lora = peft.LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=TORCH_NAMES[head],
                task_type="CAUSAL_LM" if head == "lm" else "SEQ_CLS",
            )  # fmt: skip
            model = peft.get_peft_model(base, lora)
        model.train()
        self._extra = {"use_cache": False} if head == "lm" else {}
        self._torch, self._device, self.model = torch, device, model
        self._forward = torch.compile(model) if compiled else model
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)

    def update(self, batch: Mapping[str, np.ndarray]) -> Any:
        """One AdamW step on arguments of the model's forward; the loss, still on the device."""
        inputs = {name: self._tensor(value) for name, value in batch.items()}
        loss = self._forward(**inputs, **self._extra).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def train(self, batches: Iterator[Mapping[str, np.ndarray]], steps: int) -> list[float]:
        """That many updates, and the losses once the last is done."""
        losses = [self.update(next(batches)) for _ in range(steps)]
        return [float(loss) for loss in losses]

    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def save_adapter(self, folder: str | Path) -> None:
        """As PEFT saves it."""
        self.model.save_pretrained(str(folder))

    def _tensor(self, array: np.ndarray) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def make_update(folder: str, tokens: np.ndarray, **settings: Any) -> Callable[[], float]:
    """A function that makes one update of a language model on one batch and returns the loss.

    tokens: int [B, T], with loss on all of them; settings: of `Trainer`.
    """
    trainer, batch = Trainer(folder, **settings), all_tokens(tokens)
    return lambda: float(trainer.update(batch))


def answer(settings: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> None:
    """Answers a `benchmarking.Process`: updates on one batch, and the number of parameters."""
    import benchmarking

    trainer = Trainer(**settings)

    def update() -> float:
        return float(trainer.update(batch))

    benchmarking.serve({"update": update, "parameters": trainer.trainable_parameters})


def all_tokens(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens int [B, T] as a batch with loss on all of them."""
    wide = tokens.astype(np.int64)
    return {"input_ids": wide, "labels": wide}


def padded(
    examples: Sequence[Mapping[str, np.ndarray]], batch_size: int, *, seed: int, pad_id: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches [B, T], shuffled each epoch, each padded to its longest example.

    examples: {tokens int [T], loss_mask float [T]}.
    """
    draw = np.random.default_rng(seed)
    while True:
        order = draw.permutation(len(examples))
        for start in range(0, len(order), batch_size):
            yield collate([examples[i] for i in order[start : start + batch_size]], pad_id)


def collate(chosen: Sequence[Mapping[str, np.ndarray]], pad_id: int) -> dict[str, np.ndarray]:
    """Examples as {input_ids, attention_mask, labels}, int64 [B, T], padded on the right."""
    shape = (len(chosen), max(len(e["tokens"]) for e in chosen))
    batch = {
        "input_ids": np.full(shape, pad_id, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "labels": np.full(shape, IGNORED, np.int64),
    }
    for row, example in enumerate(chosen):
        tokens, size = example["tokens"], len(example["tokens"])
        batch["input_ids"][row, :size] = tokens
        batch["attention_mask"][row, :size] = 1
        batch["labels"][row, :size] = np.where(example["loss_mask"] > 0, tokens, IGNORED)
    return batch


def packed(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A packed batch of lora_jax for transformers: position ids and a block-diagonal causal mask.

    batch: tokens, loss_mask, positions, segment_ids, [B, T]. The mask is bool [B, 1, T, T]: a
    token sees those before it in its own segment.
    """
    tokens, segments = batch["tokens"].astype(np.int64), batch["segment_ids"]
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return {
        "input_ids": tokens,
        "position_ids": batch["positions"].astype(np.int64),
        "attention_mask": same & np.tril(np.ones((tokens.shape[1],) * 2, bool)),
        "labels": np.where(batch["loss_mask"] > 0, tokens, IGNORED),
    }


if __name__ == "__main__":
    with np.load(sys.argv[2]) as file:
        stored = {name: file[name] for name in file.files}
    answer(json.loads(sys.argv[1]), stored)
