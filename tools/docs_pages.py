"""A hook of mkdocs that makes pages of the documents at the top of the repository, and adapts their links.

It also makes a script of the search index; docs/site.js tells why.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for document, page in PAGES.items():
        text = Path(document).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, its_page in PAGES.items():
            text = text.replace(f"]({other}", f"]({its_page}")
        files.append(File.generated(config, page, content=text))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    index = Path(config.site_dir, "search", "search_index.json")
    index.with_suffix(".js").write_text(f"window.search_index = {index.read_text(encoding='utf-8')}", encoding="utf-8")
