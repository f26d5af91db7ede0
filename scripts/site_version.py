"""For MkDocs: the version of the package in the header and the footer of each page."""

from mkdocs.config.defaults import MkDocsConfig

from maxtext_ling2 import __version__


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """The configuration with the version in it, whose only home is the package."""
  config.site_name = f"{config.site_name} {__version__}"
  config.copyright = f"maxtext-ling2 {__version__}, Apache-2.0"
  return config
