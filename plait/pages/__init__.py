"""Reports as single pages that need nothing else: their style, light or dark as the reader has it, and their pictures."""

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from plait.design.summary import si
from plait.files import write_text


def write_page(path: Path, package: str, template: str, **values: Any) -> Path:
    """The template of a package, an extension of page.html.j2, as a file. A value that it needs and lacks is an error."""
    write_text(path, render(package, template, **values))
    return path


def render(package: str, template: str, **values: Any) -> str:
    """The page's text. Its pictures take their colours from the page's style sheet."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("plait.pages", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"si": si}
    return environment.get_template(template).render(**values)
