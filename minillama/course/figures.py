"""Matplotlib's notebook backend, with an eye on every figure: one without a title, axis labels or a needed legend stops the cell that shows it.

    MPLBACKEND=module://minillama.course.figures pytest --nbval ...      # what `minillama course check --run` does

It draws exactly as the usual backend does, so the outputs are the same.
"""
from __future__ import annotations

from functools import wraps

import matplotlib
from IPython.core.getipython import get_ipython
from matplotlib._pylab_helpers import Gcf
from matplotlib_inline import backend_inline
from matplotlib_inline.backend_inline import FigureCanvas, new_figure_manager, new_figure_manager_given_figure  # noqa: F401 (a backend's interface)


def faults(figure) -> list[str]:
    """What a reader of the figure misses, in words."""
    found = []
    shown = [a for a in figure.axes if a.get_visible() and a.get_label() != "<colorbar>"]
    for i, ax in enumerate(shown, 1):
        where = f"axes {i} of {len(shown)}"
        twins = [other for other in shown if other.bbox.bounds == ax.bbox.bounds]
        if not figure.get_suptitle() and not any(a.get_title(loc) for a in twins for loc in ("left", "center", "right")):
            found.append(f"{where}: no title")
        if not ax.axison:  # a drawing
            continue
        if not any(a.get_xlabel() for a in ax.get_shared_x_axes().get_siblings(ax)) and not figure.get_supxlabel():
            found.append(f"{where}: no x label")
        if not any(a.get_ylabel() for a in ax.get_shared_y_axes().get_siblings(ax)) and not figure.get_supylabel():
            found.append(f"{where}: no y label")
        if len(ax.get_legend_handles_labels()[1]) > 1 and not figure.legends and not any(a.get_legend() for a in shown):
            found.append(f"{where}: labelled curves and no legend")
    return found


_draw = backend_inline.show


@wraps(_draw)
def show(*args, **kwargs):
    figures = [manager.canvas.figure for manager in Gcf.get_all_fig_managers()]
    _draw(*args, **kwargs)
    found = [f"figure {i}, {fault}" for i, figure in enumerate(figures, 1) for fault in faults(figure)]
    if found:
        raise ValueError("; ".join(found))


backend_inline.show = show  # the one that shows what is left open at the end of a cell
if get_ipython():
    matplotlib.interactive(True)
    backend_inline.configure_inline_support(get_ipython(), "module://matplotlib_inline.backend_inline")
