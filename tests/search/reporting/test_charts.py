import math
import re
from xml.etree import ElementTree

import pytest

from search.reporting.charts import SERIES, heat_map, line_chart, scatter_chart


def drawing(html):
    """The SVG of a chart, which must be well-formed."""
    return ElementTree.fromstring(html.partition("</svg>")[0] + "</svg>")


def points(path):
    """(x, y) of a path's points, in drawing units."""
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path) if pair.strip()]


def strokes(svg):
    return [path.get("d") for path in svg.iter("path") if path.get("class") != "grid"]


def test_a_line_keeps_the_proportions_of_its_numbers():
    [path] = strokes(drawing(line_chart({"a": [(0, 1.0), (10, 2.0), (30, 4.0)]}, "x", "y")))
    (x0, y0), (x1, y1), (x2, y2) = points(path.replace("L", " L").replace("M", " M"))
    assert (x2 - x0) / (x1 - x0) == pytest.approx(3, abs=0.02)
    assert (y0 - y2) / (y0 - y1) == pytest.approx(3, abs=0.02)
    assert y2 < y0  # up is more


def test_what_is_not_finite_breaks_a_line_and_leaves_no_mark():
    html = line_chart({"a": [(0, 1.0), (1, math.nan), (2, 2.0), (3, math.inf), (4, 1.0)]}, "x", "y")
    assert strokes(drawing(html))[0].count("M") == 3
    assert "nan" not in html
    html = scatter_chart({"a": {"one": (1, 1), "none": (2, math.nan)}}, "x", "y")
    assert len(list(drawing(html).iter("circle"))) == 1


@pytest.mark.parametrize("values", [[(3, 7)], [], [(0, 0), (1, 0)], [(1e9, 1e-9), (2e9, 3e-9)], [(-5, -2), (5, 2)]])
def test_every_point_lies_inside_its_frame(values):
    svg = drawing(scatter_chart({"a": {str(number): pair for number, pair in enumerate(values)}}, "x", "y"))
    _, _, wide, high = map(float, svg.get("viewBox").split())
    circles = list(svg.iter("circle"))
    assert len(circles) == len(values)
    assert all(0 < float(c.get("cx")) < wide and 0 < float(c.get("cy")) < high for c in circles)


def test_several_series_have_a_legend_and_colours_repeat():
    names = [f"agent {number}" for number in range(SERIES + 1)]
    html = line_chart({name: [(0, 0), (1, 1)] for name in names}, "x", "y")
    assert re.findall(r"</span>(agent \d)", html) == names
    assert html.count("var(--series-0)") == 4
    assert "legend" not in line_chart({"one": [(0, 0)]}, "x", "y")


def test_a_stronger_cell_is_darker_and_one_without_figure_is_empty():
    cells = {("0", "q"): 0.1, ("0", "k"): 0.9, ("1", "q"): 7.0, ("1", "k"): math.nan}
    svg = drawing(heat_map(["0", "1"], ["q", "k"], cells, {("0", "q"): "12"}))
    faint, dark, most = (float(rect.get("fill-opacity")) for rect in svg.iter("rect"))
    assert faint < dark < most <= 1
    assert "12" in [text.text for text in svg.iter("text")]


def test_names_are_text_and_never_markup():
    hostile = '<script>alert("x")</script>'
    for html in (
        line_chart({hostile: [(0, 0)], "b": [(1, 1)]}, hostile, hostile),
        scatter_chart({hostile: {hostile: (0, 0)}}, hostile, hostile),
        heat_map([hostile], [hostile], {(hostile, hostile): 0.5}, {(hostile, hostile): hostile}),
    ):
        assert "<script" not in html
        drawing(html)
