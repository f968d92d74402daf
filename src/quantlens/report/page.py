"""The frame of a page that stands alone: one self-contained HTML file in the report's style, without a script."""

from __future__ import annotations

from quantlens._version import __version__
from quantlens.plots.svg import esc

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · quantlens</title>
<style>{style}</style>
</head>
<body>
<main>
<section>
<p class="kicker">quantlens · {kicker}</p>
<h1>{title}</h1>
<p class="lead">{lead}</p>
{body}
</section>
</main>
<footer>Written by quantlens {version}.</footer>
</body>
</html>
"""


def page(title: str, kicker: str, lead: str, body: str) -> str:
    """The HTML text. ``title``, ``kicker`` and ``lead`` are plain text; ``body`` is HTML whose texts are escaped."""
    from quantlens.report.build import content_policy, page_style

    style = page_style()
    return PAGE.format(
        policy=content_policy(style, ""),
        style=style,
        title=esc(title),
        kicker=esc(kicker),
        lead=esc(lead),
        body=body,
        version=__version__,
    )
