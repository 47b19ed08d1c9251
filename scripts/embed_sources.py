"""Writes the C++ file that holds the kernels' sources as strings: embed_sources.py SRC_FOLDER OUTPUT."""

import hashlib
import posixpath
import re
import sys
from pathlib import Path

# Compilers limit the length of one string literal; adjacent ones are joined.
MAX_LITERAL = 12000
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


def rooted(text: str, folder: str, known: set[str]) -> str:
    """Includes of neighbours become includes from the root, the only names that NVRTC is given."""

    def replace(match: re.Match) -> str:
        beside = posixpath.normpath(posixpath.join(folder, match[1]))
        name = beside if beside in known else match[1]
        if name not in known:
            raise SystemExit(f"{folder}: #include of {match[1]}, which is not among the embedded sources")
        return f'#include "{name}"'

    return INCLUDE.sub(replace, text)


def digest(name: str, texts: dict[str, str]) -> str:
    """Of a source and of everything that it includes: what cached machine code depends on."""
    reached, left = set(), [name]
    while left:
        at = left.pop()
        if at not in reached:
            reached.add(at)
            left += INCLUDE.findall(texts[at])
    digest = hashlib.sha256()
    for at in sorted(reached):
        digest.update(f"{at}\0{len(texts[at])}\0{texts[at]}".encode())
    return digest.hexdigest()[:32]


def literal(text: str) -> str:
    pieces = [text[at : at + MAX_LITERAL] for at in range(0, len(text), MAX_LITERAL)] or [""]
    return "\n".join(f'R"strobe({piece})strobe"' for piece in pieces)


def main() -> None:
    root, output = Path(sys.argv[1]), Path(sys.argv[2])
    paths = [p for folder in ("core", "cuda") for p in sorted((root / folder).rglob("*")) if p.suffix in (".h", ".cuh")]
    names = {p: p.relative_to(root).as_posix() for p in paths}
    known = set(names.values())
    texts = {names[p]: rooted(p.read_text(), posixpath.dirname(names[p]), known) for p in paths}
    entries = "\n".join(f'    {{"{n}", {literal(text)}, "{digest(n, texts)}"}},' for n, text in texts.items())
    code = f"""#include "host/sources.h"

namespace strobe::host {{

const EmbeddedSource kEmbeddedSources[] = {{
{entries}
}};
const int kEmbeddedSourceCount = {len(texts)};

}}  // namespace strobe::host
"""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(code)


if __name__ == "__main__":
    main()
