"""Tables: published numbers beside measured ones. See `table.Table` for what a file defines."""

from lora_jax.tables.published import Published
from lora_jax.tables.searched import Baseline, Searched
from lora_jax.tables.table import Claim, Row, Table, again, load, run
from lora_jax.tables.work import Computed, Counted, Measured, NotRun, Trained

__all__ = [
    "Baseline",
    "Claim",
    "Computed",
    "Counted",
    "Measured",
    "NotRun",
    "Published",
    "Row",
    "Searched",
    "Table",
    "Trained",
    "again",
    "load",
    "run",
]
