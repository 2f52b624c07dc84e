"""HTML pages: one file each, no scripts, nothing fetched."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape


def render(package: str, template: str, **values: Any) -> str:
    """Render `template` of `package`; it may extend the frame of all pages, ``page.html``."""
    loaders = [PackageLoader(name, ".") for name in dict.fromkeys((package, "fedvpa.evaluation"))]
    environment = Environment(loader=ChoiceLoader(loaders), autoescape=select_autoescape())
    return environment.get_template(template).render(**values)
