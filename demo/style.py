"""One palette for every picture of the project, light and dark. A colour means the same thing everywhere."""

# class -> (light, dark). full, window, kept and decode are kinds of keys and the evaluations named after them.
PALETTE = {
    "ink": ("#1d2330", "#e8eaf0"),
    "dim": ("#667085", "#98a1b3"),
    "line": ("#d5d9e2", "#363d4d"),
    "empty": ("#eef0f4", "#232936"),
    "paper": ("#ffffff", "#151922"),
    "full": ("#2f6bd8", "#7aa8ff"),
    "window": ("#e08a1e", "#f2b04f"),
    "kept": ("#1f9d6b", "#4fd09b"),
    "decode": ("#8b4fd6", "#bd93f9"),
    "peer": ("#8b93a5", "#8b93a5"),
    "peer2": ("#c2557a", "#e58bab"),
}
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def _variables(side: int) -> str:
    return "".join(f"--{name}:{pair[side]};" for name, pair in PALETTE.items())


CSS = (
    f":root{{{_variables(0)}}}"
    f"@media (prefers-color-scheme: dark){{:root{{{_variables(1)}}}}}"
    + "".join(f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name});fill:none}}" for name in PALETTE)
    + f"svg text{{font-family:{FONT};font-size:12px;fill:var(--dim)}}"
    + "svg text.strong{fill:var(--ink);font-weight:600}svg text.small{font-size:10px}"
    + "svg text.end{text-anchor:end}svg text.mid{text-anchor:middle}"
)


def svg(width: float, height: float, body: str, label: str, standalone: bool = False) -> str:
    """A picture that follows the reader's light or dark setting; a standalone file carries the palette itself."""
    own = f"<style>{CSS}</style>" if standalone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}">{own}{body}</svg>'
    )


def escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
