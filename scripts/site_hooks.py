"""For MkDocs: the version in the header and footer of each page; names in tables end a line where one reads a pause."""

import re

from mkdocs.config.defaults import MkDocsConfig

from maxtext_ling2 import __version__

_CELL = re.compile(r"<td\b[^>]*>.*?</td>", re.DOTALL)
_CODE = re.compile(r"<code>([^<]+)</code>")
_BREAK_AFTER = re.compile(r"(?<=\w)([/_.=,])(?=\w)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """The configuration with the version in it, whose only home is the package."""
  config.site_name = f"{config.site_name} {__version__}"
  config.copyright = f"maxtext-ling2 {__version__}, Apache-2.0"
  return config


def on_page_content(html: str, **_: object) -> str:
  """A page whose tables fit: in their cells `a_long/name.py` may end a line after its marks, not within its words."""
  return _CELL.sub(lambda cell: _CODE.sub(_breakable, cell[0]), html)


def _breakable(code: re.Match[str]) -> str:
  return f"<code>{_BREAK_AFTER.sub(r'\1<wbr>', code[1])}</code>"
