"""Draws docs/images/*.svg from the definition of the mask. usage: draw_masks.py [--check]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from masks import CELL, GAP, LEFT, draw, kinds, place, square, words  # noqa: E402
from pictures import main  # noqa: E402
from style import svg  # noqa: E402

WINDOW_KEPT = {"causal": True, "window_size": (2, 0), "keep_first": 2}
# name -> (what the picture shows, sizes, options)
SINGLE = {
    "full": ("full attention", (8, 8), {}),
    "causal": ("causal attention", (8, 8), {"causal": True}),
    "window": ("a window of 2 keys to the left and 1 to the right", (8, 8), {"window_size": (2, 1)}),
    "causal-window": ("a causal window of 2", (8, 8), {"causal": True, "window_size": (2, 0)}),
    "window-kept": ("a causal window of 2 and 2 kept tokens", (8, 8), WINDOW_KEPT),
    "force-fa-decode": ("one query with force_fa_decode", (1, 8), WINDOW_KEPT | {"force_fa_decode": True}),
    "full-from": ("full attention from row 5 on", (8, 8), WINDOW_KEPT | {"full_from": 5}),
    "fewer-queries": ("3 queries and 8 keys", (3, 8), {"causal": True, "window_size": (4, 0)}),
    "more-queries": ("8 queries and 5 keys", (8, 5), {"causal": True}),
}


def block_diagonal(sizes, options) -> list:
    """A packed batch: each sequence sees its own keys only. sizes: (queries, keys) of each sequence."""
    total = sum(keys for _, keys in sizes)
    rows, before = [], 0
    for queries, keys in sizes:
        for row in kinds(queries, keys, **options):
            rows.append(["empty"] * before + row + ["empty"] * (total - before - keys))
        before += keys
    return rows


def packed() -> str:
    sizes = ((3, 3), (1, 6), (4, 4))
    queries, keys = ([pair[n] for pair in sizes] for n in (0, 1))
    names = [[n for size in group for n in range(size)] for group in (queries, keys)]
    rows = block_diagonal(sizes, WINDOW_KEPT | {"force_fa_decode": True})
    return draw(rows, "three sequences in one packed call", queries, keys, *names, standalone=True)


def left_padding() -> str:
    """Two sequences in one cache of 8: the first 0 and 3 keys are padding. Key 0 is the first one after the padding."""
    rows = []
    for padding in (0, 3):
        rows += [["line"] * padding + row for row in kinds(2, 8 - padding, **WINDOW_KEPT)]
    title = "two sequences, the second with three keys of padding"
    return draw(rows, title, [2, 2], row_names=[0, 1, 0, 1], standalone=True)


def paged() -> str:
    """Keys of two sequences in pages of 4: what a query sees in order, the table, and where the keys lie."""
    page, table, lengths, pool = 4, ((3, 0, 5), (1, 4, -1)), (10, 6), 6
    colours, left = ("full", "decode"), LEFT + 58
    columns = [page] * 3
    body, y = [words(0, 12, "keys of a sequence, in its order", "strong")], 26
    for b, length in enumerate(lengths):
        body.append(words(0, y + 12, f"sequence {b}"))
        for j in range(length):
            x = left + place(j, columns)
            body.append(square(x, y, colours[b]) + f'<text x="{x + CELL / 2:g}" y="{y + 12}" class="cell">{j}</text>')
        y += CELL + 8
    y += 16
    body.append(words(0, y, "block_table", "strong"))
    y += 12
    for b, row in enumerate(table):
        body.append(words(0, y + 12, f"sequence {b}"))
        for n, entry in enumerate(row):
            x, wide = left + place(n * page, columns), page * CELL + (page - 1) * GAP
            kind = colours[b] if entry >= 0 else "line"
            body.append(
                f'<rect x="{x}" y="{y}" width="{wide}" height="{CELL}" rx="3" class="s-{kind}" stroke-width="1.5"/>'
            )
            body.append(words(x + wide / 2, y + 12, entry if entry >= 0 else "-1, unused", "mid"))
        y += CELL + 8
    y += 16
    body.append(words(0, y, "the pages, as they lie in memory", "strong"))
    y += 12
    owner = {entry: (b, n) for b, row in enumerate(table) for n, entry in enumerate(row) if entry >= 0}
    for p in range(pool):
        across, down = p % 3, p // 3
        x0, y0 = left + place(across * page, columns), y + down * (CELL + 24)
        body.append(words(x0, y0 + 10, f"page {p}", "small"))
        for slot in range(page):
            b, n = owner.get(p, (None, 0))
            used = b is not None and n * page + slot < lengths[b]
            x = x0 + slot * (CELL + GAP)
            body.append(square(x, y0 + 15, colours[b] if used else "empty"))
            if used:
                body.append(f'<text x="{x + CELL / 2:g}" y="{y0 + 27}" class="cell">{n * page + slot}</text>')
    cell = "<style>svg text.cell{font-size:9px;text-anchor:middle;fill:var(--paper)}</style>"
    width, height = left + place(3 * page - 1, columns) + CELL + 2, y + 2 * (CELL + 24) + 4
    return svg(width, height, cell + "".join(body), "keys of two sequences in pages of 4", standalone=True)


def pictures() -> dict[str, str]:
    drawn = {
        name: draw(kinds(*sizes, **options), title, standalone=True) for name, (title, sizes, options) in SINGLE.items()
    }
    return drawn | {"packed": packed(), "left-padding": left_padding(), "paged": paged()}


if __name__ == "__main__":
    sys.exit(main({f"mask-{name}.svg": picture for name, picture in pictures().items()}))
