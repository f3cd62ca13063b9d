"""HTML of notebooks and texts with everything taken out that a browser would run or load: pages show it, and that is all."""

from __future__ import annotations

import re
from html import unescape

import bleach
from bleach.css_sanitizer import CSSSanitizer
from bs4 import BeautifulSoup

# What a page may do besides: run the scripts and styles that lie beside it. Charts set the style of what they draw.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
)
GONE = ("script", "style", "iframe", "object", "embed", "template", "noscript", "textarea", "select", "button", "svg", "math")
TEXT = ("h1", "h2", "h3", "h4", "h5", "h6", "p", "br", "hr", "pre", "code", "kbd", "samp", "blockquote", "a", "img", "details")
MARKED = ("em", "strong", "b", "i", "u", "s", "del", "sub", "sup", "small", "span", "div", "section", "figure", "figcaption")
LISTED = ("summary", "ul", "ol", "li", "dl", "dt", "dd", "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td")
EVERYWHERE = ("class", "id", "title", "style", "align", "colspan", "rowspan", "halign", "valign", "border", "start", "open")
SIZES = ("width", "height", "alt")
IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp|svg\+xml);base64,[a-z0-9+/=]+")  # which runs nothing in an image
PROTOCOLS = ("http", "https", "mailto", "data")  # the last for images alone
STYLES = ("text-align", "vertical-align", "font-weight", "font-style")


def harmless(html: str) -> str:
    """``html`` without scripts, frames, forms, event handlers, foreign addresses of images and links that run something.

    Elements of GONE go with all that is in them; of other unknown elements the text stays.
    """
    soup = BeautifulSoup(html, "html.parser")
    for element in soup.find_all(GONE):
        element.extract()
    return bleach.clean(
        str(soup),
        tags={*TEXT, *MARKED, *LISTED},
        attributes=_allowed,
        protocols=PROTOCOLS,
        css_sanitizer=CSSSanitizer(allowed_css_properties=STYLES),
        strip=True,
    )


def _allowed(tag: str, name: str, value: str) -> bool:
    """Whether an attribute may stay. Of addresses that do, bleach takes out those of other PROTOCOLS."""
    address = re.sub(r"[\x00-\x20]", "", unescape(value)).lower()  # as browsers read it
    if tag == "a" and name == "href":
        return not address.startswith("data:")
    if tag == "img" and name == "src":
        return bool(IMAGE.fullmatch(address)) or not re.search(r":|^[/\\]{2}", address)
    return name in EVERYWHERE or tag == "img" and name in SIZES
