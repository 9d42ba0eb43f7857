"""HTML of reports: the parts that sections are made of, and the style sheet. What is not `Markup` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from mpc_fl.apps.report.figures import svg_uri

_LONG_TABLE = 60


STYLE_SHEET = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--line:#d5d9df;--paper:#fff;--tint:#f4f6f8;--warn:#8a3b00}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa4af;--line:#3a424b;--paper:#14181d;
--tint:#1d232a;--warn:#ffb86b}img.plot{filter:invert(1) hue-rotate(180deg)}}*{box-sizing:border-box}
body{margin:0 auto;max-width:56rem;padding:2rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.8rem;line-height:1.2;margin:0 0 .25rem}a{color:inherit}summary{cursor:pointer}
h2{font-size:1.25rem;margin:2.75rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--line);break-after:avoid}
.soft,figcaption,caption,footer,dt,small{color:var(--soft);font-size:.88rem}nav ol{columns:2 16rem;padding-left:1.3rem}
p,figcaption{max-width:46rem}.missing,.warning{border-left:4px solid var(--warn);padding:.3rem .8rem}
.banner{border:2px solid;color:var(--warn);font-weight:700;max-width:none;padding:.6rem .9rem;margin:0 0 1.25rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr));gap:.75rem}
.tiles div{background:var(--tint);padding:.7rem .9rem;border-radius:.4rem;break-inside:avoid}
.tiles dd{margin:0;font-size:1.35rem;font-weight:650;line-height:1.3}small{display:block;font-weight:400}.key{font-weight:600}
figure{margin:1.5rem 0;break-inside:avoid}img.plot{max-width:100%;height:auto;display:block}
.scroll{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;width:100%;font-size:.88rem}tr{break-inside:avoid}
caption{text-align:left;padding-bottom:.4rem}thead{display:table-header-group}th,td{text-align:left;vertical-align:top;
padding:.32rem .7rem .32rem 0;border-bottom:1px solid var(--line);min-width:4rem}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:normal}
pre{background:var(--tint);padding:.9rem;font-size:.8rem;line-height:1.45;white-space:pre-wrap}
.card{display:grid;grid-template-columns:10rem 1fr;gap:.4rem 1.25rem;padding:1rem 0;border-bottom:1px solid var(--line)}
.scan{width:10rem;height:auto;image-rendering:pixelated}.card figcaption{grid-column:1/-1}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:1rem}
@media (max-width:34rem){.card{grid-template-columns:1fr}}
@media print{@page{margin:16mm}body{max-width:none;padding:0;font-size:10pt}.tiles div{print-color-adjust:exact}
details::details-content{content-visibility:visible;block-size:auto}}
"""


class Markup(str):
    """HTML made here. `escape` leaves it alone; everything else is escaped before it enters the page."""


def escape(value: object) -> str:
    """Text as HTML; `Markup` unchanged. Halves of surrogate pairs, which no file can hold, become question marks."""
    return value if isinstance(value, Markup) else html.escape(str(value).encode("utf-8", "replace").decode())


def paragraph(text: str, kind: str = "plain") -> Markup:
    """A paragraph of the CSS class `kind`."""
    return Markup(f'<p class="{kind}">{escape(text)}</p>')


def plot(figure: Figure, alt: str, caption: str) -> Markup:
    """A figure with its alternative text and caption."""
    image = f'<img class="plot" src="{svg_uri(figure)}" alt="{escape(alt)}">'
    return Markup(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int) -> Markup:
    """A table whose last `numbers` columns are numbers; a long one is folded."""

    def line(tag: str, cells: Sequence[object]) -> str:
        kinds = [' class="n"' if index >= len(cells) - numbers else "" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    body = [line("td", row) for row in rows]
    inner = f"<caption>{escape(caption)}</caption><thead>{line('th', head)}</thead><tbody>{''.join(body)}</tbody>"
    whole = f'<div class="scroll"><table>{inner}</table></div>'
    return Markup(
        f"<details><summary>{len(body)} rows</summary>{whole}</details>" if len(body) > _LONG_TABLE else whole
    )


def tiles(facts: Iterable[tuple[str, object, str]]) -> Markup:
    """Headline numbers: (label, value, remark)."""
    items = [f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in facts]
    return Markup(f'<dl class="tiles">{"".join(items)}</dl>')
