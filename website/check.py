"""Checks the built site: every link and anchor, every public name, no file of another host.

    mkdocs build --strict --site-dir DIRECTORY && python -m website.check DIRECTORY

Reads the HTML itself, and the public names from the packages.
"""

import html.parser
import importlib
import pathlib
import pkgutil
import sys
import urllib.parse

import goose_jax

MODULES = (
    "goose_jax.config",
    "goose_jax.state",
    *(
        f"pallas_kernels.{name}"
        for name in ("types", "packing", "validation", "dispatch", "sharding")
    ),
)


class Page(html.parser.HTMLParser):
    """The ids, links and loaded files of a page."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.formulas = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes what an element names and what it points to."""
        named = {name: value or "" for name, value in attrs}
        self.ids.add(named.get("id", ""))
        self.formulas += tag == "math"
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if tag in ("script", "img", "iframe", "source") and named.get("src"):
            self.loaded.append(named["src"])
        if tag == "link" and named.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(named["href"])


def faults(site: pathlib.Path) -> list[str]:
    """Returns a line for each fault."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        if where.name == "404.html":  # its links are those of the site's address
            continue
        for target in (*page.links, *page.loaded):
            url = urllib.parse.urlsplit(target)
            if url.scheme or url.netloc:
                if target in page.loaded:
                    found.append(f"{where} loads {target}")
                continue
            file = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                found.append(f"{where} links to {target}, which does not exist")
            elif url.fragment and file in pages and url.fragment not in pages[file].ids:
                found.append(f"{where} links to {target}, which has no such place")
    found += [f"{name} is not in the reference" for name in public_names() - documented(pages)]
    formulas = sum(page.formulas for page in pages.values())
    if formulas < 200:
        found.append(f"the site has {formulas} formulas, where the derivation has more than 200")
    return found


def documented(pages: dict[pathlib.Path, Page]) -> set[str]:
    """Returns the full names that the reference describes, which are ids of its pages."""
    reference = [page for path, page in pages.items() if "api" in path.parts]
    return {name for page in reference for name in page.ids if "." in name}


def public_names() -> set[str]:
    """Returns the public names of both packages, by the packages that export them."""
    packages = [
        "goose_jax",
        "pallas_kernels",
        *(
            f"goose_jax.{module.name}"
            for module in pkgutil.iter_modules(goose_jax.__path__)
            if module.ispkg and module.name != "cli"
        ),
    ]
    names = {
        f"{package}.{name}"
        for package in packages
        for name in importlib.import_module(package).__all__
        if not name.startswith("__")
    }
    for module in MODULES:
        content = vars(importlib.import_module(module))
        names |= {
            f"{module}.{name}"
            for name, value in content.items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module
        }
    return names


def main() -> None:
    """Prints all faults, and ends with status 1 if there are any."""
    found = faults(pathlib.Path(sys.argv[1]))
    print("\n".join(found) or "All links lead somewhere, all public names are in the reference.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
