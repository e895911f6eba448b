"""MiniLM-L6 (extra `minilm`) on a task of GLUE: what the small scales of several papers share.

By default 1,000 sentences of SST-2, four epochs, a method's best learning rate of its grid on seed
0: full fine-tuning has 0.80 there after six epochs and the head alone 0.70 (aghajanyan_table1.py).
As many updates on 4,000 sentences of CoLA, the protocol before, learn the majority class alone.
`GLUE_DIR` names a folder with TFDS's glue, if it is not in the usual place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from given_folders import CONFIGS, glue

from lora_jax.tables import Claim, Published, Row, Trained

CONFIG = CONFIGS / "glue.py"
# Its config.json, for what is asked of the shape alone, where the package is not installed.
SHAPE = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": 384,
    "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
    "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
HEAD = ("^head/",)  # the new head trains whole, beside any method
LORA_RATES = (1e-3, 4e-3)
FULL_RATES = (5e-5, 2e-4)
# Methods with rates far above what a head can stand: beside them it keeps to its own.
VERA_RATES, ADALORA_RATES = (1e-2, 3e-2), (1.5e-2, 5e-2)
HEAD_RATE = 1e-3
APART = ("prefix_tuning", "prompt_tuning", "p_tuning_v2", "vera", "adalora")
NOTE = "MiniLM-L6 on 1,000 sentences of SST-2, four epochs: not the paper's model, nor its numbers"
EXAMPLES, EPOCHS, BATCH = 1000, 4, 32
Method = tuple[str, Mapping[str, Any], Sequence[float]]
"""(kind, fields, learning rates)."""
Grid = Sequence[Mapping[str, Any]]
COLUMN = "SST-2"


def trained(
    method: Method,
    scale: str,
    *,
    metric: str | None = None,
    chosen_by: str | None = None,
    grid: Grid = (),
    more: Mapping[str, Any] = MappingProxyType({}),
    **arg: Any,
) -> Trained:
    """Runs of a method.

    Args:
      metric: None: the task's principal one.
      chosen_by: of the grid, if another than that.
      grid: in place of the method's rates; `smoke` takes the first.
      more: further overrides.
      arg: of configs/glue.py. `smoke` takes two steps of the first rate.
    """
    kind, fields, rates = method
    spec = {"task": "sst2", "epochs": EPOCHS, "examples": EXAMPLES, **arg}
    fields = fields if kind == "full" else {"train": HEAD, **fields}
    overrides = {"method.kind": kind, **{f"method.{k}": v for k, v in fields.items()}, **more}
    if scale == "smoke":
        spec["examples"], rates, grid = 64, rates[:1], grid[:1]
        overrides |= {"training.steps": 2, "training.eval_every": 2,
                      "data.validation": "validation[:16]"}  # fmt: skip
    tried = grid or [_rate(kind, rate) for rate in rates]
    return Trained(glue(**spec), metric, overrides, tried, chosen_by)


def _rate(kind: str, rate: float) -> Mapping[str, Any]:
    """The learning rate, and the head's as a share of it where it is another."""
    found: dict[str, Any] = {"optimizer.learning_rate": rate}
    if kind in APART:
        found["optimizer.groups"] = tuple((pattern, HEAD_RATE / rate) for pattern in HEAD)
    return found


def rows(
    methods: Mapping[str, Method], scale: str, published: Mapping[str, Published] | None = None
) -> tuple[Row, ...]:
    """A row a method, on SST-2; `smoke` has the first alone."""
    cited = published or {}
    chosen = dict(list(methods.items())[:1]) if scale == "smoke" else methods
    return tuple(
        Row(f"MiniLM-L6 {name}", COLUMN, trained(method, scale), cited.get(name))
        for name, method in chosen.items()
    )


def claims(scale: str, *pairs: tuple[str, str], column: str = COLUMN) -> tuple[Claim, ...]:
    """ "better beats worse" of rows by the names of their methods; none in a smoke test."""
    if scale == "smoke":
        return ()
    return tuple(Claim(f"MiniLM-L6 {a}", f"MiniLM-L6 {b}", column) for a, b in pairs)


def seeds(scale: str) -> int:
    return 1 if scale == "smoke" else 3


def cost(methods: Mapping[str, Method]) -> str:
    """By some 30 s for the 125 updates: a run a rate, and two more seeds of the best."""
    runs = sum(len(rates) + 2 for _, _, rates in methods.values())
    return f"about {runs / 2:.0f} minutes on 2 CPU cores"
