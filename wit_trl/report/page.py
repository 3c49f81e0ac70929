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
    """Returns `text` with line breaks and tabs marked, and all else that a terminal would act on escaped."""

    def show(character: str) -> str:
        if character in "\n\t":
            return {"\n": "↵\n", "\t": "⇥\t"}[character]
        # But for the joiners of emoji and of Persian and Indic words
        acts = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character not in "\u200c\u200d"
        return character.encode("unicode_escape").decode() if acts else character

    return "".join(map(show, text))


def page(name: str, heading: str, console: Console, image: bytes, alt: str) -> str:
    """
    Returns what a recording console printed as HTML, under a heading of any number of lines and above a picture.

    Args:
        name (`str`):
            The title of the window.
        heading (`str`):
            What is above.
        console ([`~rich.console.Console`]):
            The console, with `record=True`.
        image (`bytes`):
            The picture, as PNG.
        alt (`str`):
            What it shows, in words.
    """
    # rich reads braces as its own
    heading = html.escape(heading.strip()).replace("{", "{{").replace("}", "}}").replace("\n", "<br>\n")
    code_format = _HTML.replace("NAME", name).replace("ALT", alt).replace("IMAGE", base64.b64encode(image).decode())
    return console.export_html(code_format=code_format.replace("HEADING", heading))
