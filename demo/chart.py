"""Line charts and heat maps for the page. Their colours are CSS variables, so that they follow light and dark."""

import base64
import io
import re
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot, ticker  # noqa: E402
from style import PALETTE  # noqa: E402

SIZE = (6.2, 3.4)  # inches
LABEL_GAP = 0.062  # of the axes' height, between the names of two lines
FONTS = {"svg.fonttype": "none", "svg.hashsalt": "strobe", "font.family": "sans-serif", "font.size": 9}


class Series(NamedTuple):
    name: str
    colour: str  # in style.PALETTE
    points: list  # (x, y)
    marker: str = "o"
    width: float = 1.8
    opacity: float = 1.0
    dashed: bool = False


def spread(wanted: list[float], apart: float) -> list[float]:
    """Heights in [0, 1] in the order of the wanted ones and at least `apart` from each other."""
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    placed = list(wanted)
    for below, above in zip(order, order[1:], strict=False):
        placed[above] = max(placed[above], placed[below] + apart)
    over = max(max(placed) - 1, 0)
    return [y - over for y in placed]


def lines(series: list[Series], x_label: str, y_label: str, *, log_x=False, log_y=False, ticks=None, right=0.74) -> str:
    """A chart with each line named at its end. ticks: {x: what is written there}; right: where the names begin."""
    with matplotlib.rc_context(FONTS):
        figure, axes = pyplot.subplots(figsize=SIZE)
        figure.subplots_adjust(left=0.1, right=right, top=0.9, bottom=0.15)
        colour = {name: pair[0] for name, pair in PALETTE.items()}
        for s in series:
            xs, ys = zip(*s.points, strict=True)
            axes.plot(
                xs, ys, color=colour[s.colour], marker=s.marker, markersize=4.5, linewidth=s.width, alpha=s.opacity,
                linestyle="--" if s.dashed else "-", solid_capstyle="round", solid_joinstyle="round",
            )  # fmt: skip
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axes.minorticks_off()
        axes.grid(axis="y", color=colour["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=colour["dim"], pad=6)
        axes.set_xlabel(x_label, color=colour["dim"], labelpad=6)
        axes.set_title(y_label, color=colour["dim"], loc="left", x=-0.12, fontsize=9)
        axes.autoscale_view()  # now, for the ends of the lines are asked for before anything is drawn
        to_axes = axes.transData + axes.transAxes.inverted()
        ends = [to_axes.transform(s.points[-1]) for s in series]
        for s, (x, _), y in zip(series, ends, spread([end[1] for end in ends], LABEL_GAP), strict=True):
            place = {"transform": axes.transAxes, "va": "center", "fontweight": "bold", "color": colour[s.colour]}
            axes.text(x + 0.03, y, s.name, **place)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    picture = stream.getvalue()
    for name, value in colour.items():
        picture = picture.replace(value, f"var(--{name})")
    picture = re.sub(r"font-family:[^;\"]*;", "", picture)  # the page's own
    return picture[picture.index("<svg") :]


def heat(weights) -> str:
    """A matrix of [0, 1] as a data: URL of a PNG whose opacity is the value, to be a CSS mask of any colour."""
    rgba = np.zeros((*weights.shape, 4))
    rgba[..., 3] = weights
    stream = io.BytesIO()
    matplotlib.image.imsave(stream, rgba, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
