"""What the site needs beside its plugins: notebooks as pages of each language, and anchors in Chinese."""

from pathlib import PurePosixPath
from typing import Any

from mkdocs import utils
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

NOTEBOOKS = {"en": "", "zh-TW": "zh-TW/"}
"""By the folder of a language's notebooks: where the site of that language begins."""

UNTRANSLATED = '!!! note "這一頁還沒有中文版"\n'

# The i18n plugin goes by what MkDocs calls a page. It would copy notebooks as they are.
utils.markdown_extensions += (".ipynb",)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The anchor of a heading has its words in any language, as on GitHub."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page in English on the site in Chinese says so below its title. Those of the guide are in both languages."""
    file = page.file
    if file.locale_alternate_of == file.locale or file.src_uri.startswith("guide/"):
        return markdown
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n{UNTRANSLATED}\n{rest}"


@event_priority(-200)  # after the i18n plugin
def on_page_context(context: dict[str, Any], page: Page, config: MkDocsConfig, nav: Navigation) -> dict[str, Any]:
    """The language switch of a notebook leads to the same chapter in the other language."""
    path = PurePosixPath(page.file.src_uri)
    if path.suffix == ".ipynb":
        for alternate in config.extra.alternate:
            language = alternate["lang"]
            alternate["link"] = f"{NOTEBOOKS[language]}{path.parent.with_name(language) / path.stem}.html"
    return context
