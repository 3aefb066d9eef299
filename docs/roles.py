"""Shows the roles of docstrings, such as :class:`BlockPattern`, as plain code on the site."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|attr|data):(<code>)~?")


def on_page_content(html: str, **others: Any) -> str:
    """Called by mkdocs with every page."""
    return _ROLE.sub(r"\1", html)
