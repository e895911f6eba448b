"""Figures of the frames of `lora_jax.inside`; none of them changes matplotlib's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lora_jax import analysis
from lora_jax.inside.frames import layer_map

MAPPED = ("norm", "stable_rank", "effective_rank", "amplification", "similarity_to_w", "intruders")


def maps(frame: pd.DataFrame, columns: Sequence[str] = MAPPED) -> Figure:
    """A layer x module map of each of the columns that the frame has numbers for.

    What is infinite (amplification where W is 0) has no colour.

    Args:
      frame: of `matrices` or `compare`, with layers.
    """
    inside = frame[frame["layer"].notna()]
    inside = inside.replace([np.inf, -np.inf], np.nan)
    columns = [c for c in columns if c in inside and inside[c].notna().any()]
    tables = [layer_map(inside, c) for c in columns]
    height = 0.9 + 0.28 * len(tables[0])
    width = max(4.0, 1.9 + 0.3 * tables[0].shape[1])
    figure = Figure(figsize=(width, height * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), 1, squeeze=False)[:, 0]
    for axes, column, table in zip(panels, columns, tables, strict=True):
        values = table.to_numpy(float)
        low, high = np.nanmin(values), np.nanmax(values)
        high = high if high > low else low + 1.0
        image = axes.imshow(values, vmin=low, vmax=high, aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axes, pad=0.01)
        axes.set_yticks(range(len(table)), table.index, fontsize="small")
        step = -(-table.shape[1] // 16)
        axes.set_xticks(range(0, table.shape[1], step), table.columns[::step], fontsize="small")
        axes.set_title(column.replace("_", " "), fontsize="medium", loc="left")
    panels[-1].set_xlabel("layer")
    return figure


def spectra(frame: pd.DataFrame, value: str = "singular_value") -> Figure:
    """Singular values (or `energy`) over their index: a panel a module, a line a layer."""
    modules = list(dict.fromkeys(frame["module"]))
    figure, panels = _grid(-(-len(modules) // 3), min(3, len(modules)), 3.2, 2.4)
    last = frame["layer"].max()
    for axes, module in zip(panels.flat, modules, strict=False):
        for path, lines in frame[frame["module"] == module].groupby("path", sort=False):
            layer = lines["layer"].iloc[0]
            shade = 0.5 if pd.isna(layer) else int(layer) / max(int(last), 1)
            axes.plot(
                lines["index"], lines[value], color=colormaps["viridis"](shade), lw=1,
                marker="." if len(lines) < 20 else None, label=str(path),
            )  # fmt: skip
        positive = frame[value] > 0
        if value == "singular_value" and positive.any():
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.02)
        axes.set_title(module, fontsize="medium", loc="left")
        axes.set_xlabel("index" if value == "singular_value" else "rank")
        axes.set_ylabel(value.replace("_", " "))
    for axes in panels.flat[len(modules) :]:
        axes.remove()
    figure.suptitle("dark: first layer, light: last", fontsize="small")
    return figure


def similarities(
    frame: pd.DataFrame,
    sizes: Mapping[str, int] | None = None,
    layers: Sequence[int] | None = None,
    *,
    names: tuple[str, str] = ("i of one", "j of the other"),
) -> Figure:
    """Heat maps of φ(i, j): a row a module, a column a layer; a Gaussian baseline at the right.

    Args:
      frame: of `similarity` or `similarity_to_base`.
      sizes: dimension of each module's space, for the baseline; None: no baseline.
      layers: those to show; None: four from the first to the last.
      names: of the two axes.
    """
    chosen: list[int | None] = list(some_layers(frame["layer"]) if layers is None else layers)
    chosen = chosen or [None]
    modules = list(dict.fromkeys(frame["module"]))
    figure, panels = _grid(len(modules), len(chosen) + (sizes is not None), 2.3, 2.0)
    shown = frame if chosen == [None] else frame[frame["layer"].isin(chosen)]
    high = float(shown["phi"].max())  # colours for what there is: φ may be small everywhere
    image: AxesImage | None = None
    for row, module in zip(panels, modules, strict=True):
        rest = frame[frame["module"] == module]
        for axes, layer in zip(row, chosen, strict=False):
            part = rest[rest["layer"] == layer] if layer is not None else rest
            if part.empty:
                axes.set_axis_off()
                continue
            phi = part.pivot(index="i", columns="j", values="phi").to_numpy()
            image = _heat(axes, phi, high)
            axes.set_title(
                module if layer is None else f"{module}, layer {layer}", fontsize="small"
            )
        if sizes is not None:
            shape = int(rest["i"].max()), int(rest["j"].max())
            u, v = (analysis.gaussian_directions(i, sizes[module], n) for i, n in enumerate(shape))
            image = _heat(row[-1], analysis.similarities(u, v), high)
            row[-1].set_title("Gaussian", fontsize="small")
        row[0].set_ylabel(names[0], fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel(names[1], fontsize="small")
    if image is not None:
        figure.colorbar(image, ax=panels, label="φ(i, j)", shrink=0.6)
    return figure


def some_layers(layers: Iterable[int | None], count: int = 4) -> list[int]:
    """At most `count` from the first to the last, as the paper's figures choose theirs."""
    every = sorted({int(x) for x in layers if x is not None and not pd.isna(x)})
    if len(every) <= count:
        return every
    return [every[i] for i in np.linspace(0, len(every) - 1, count).round().astype(int)]


def _heat(axes: Axes, phi: np.ndarray, high: float) -> AxesImage:
    p, q = phi.shape
    axes.tick_params(labelsize="x-small")
    return axes.imshow(
        phi, vmin=0, vmax=high, cmap="magma", origin="lower", aspect="auto",
        extent=(0.5, q + 0.5, 0.5, p + 0.5),
    )  # fmt: skip


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    size = (max(4.0, width * columns + 0.8), height * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
