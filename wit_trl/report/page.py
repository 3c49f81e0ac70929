"""Pages for a browser: what a terminal shows, and a picture."""

import base64
import html
import unicodedata

from rich.console import Console


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>NAME</title>
<style>
{stylesheet}
body {{ color: {foreground}; background: {background}; margin: 2em; }}
pre {{ font: 14px/1.6 "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<p>HEADING</p>
<pre>{code}</pre>
<img alt="ALT" src="data:image/png;base64,IMAGE">
</body>
</html>
"""


def printable(text: str) -> str:
    """Returns `text` with line breaks and tabs marked. All else that a terminal would act on is escaped."""
    # The joiners are part of emoji, and of Persian and Indic words
    shown = {"\n": "↵\n", "\t": "⇥\t", "\u200c": "\u200c", "\u200d": "\u200d"}
    for character in {*text} - {*shown}:
        if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
            shown[character] = character.encode("unicode_escape").decode()
    return "".join(shown.get(character, character) for character in text)


def page(name: str, heading: str, console: Console, image: bytes, alt: str) -> str:
    """
    Returns HTML: a heading of any number of lines, what a console (with `record=True`) printed, and an image (PNG).
    `name` is the title of the window. `alt` says in words what the image shows.
    """
    # rich reads braces as its own
    heading = html.escape(heading.strip()).replace("{", "{{").replace("}", "}}").replace("\n", "<br>\n")
    code_format = _HTML.replace("NAME", name).replace("ALT", alt).replace("IMAGE", base64.b64encode(image).decode())
    return console.export_html(code_format=code_format.replace("HEADING", heading))
