"""The mask by its definition, and its picture.

Query i sees key j if j < min(seqlen_k, i + off + right + 1) and (j >= max(0, i + off - left) or j < keep_first), with
off = seqlen_k - seqlen_q; docs/masks.md says the rest.
"""

import torch
from style import escape, svg

CELL, GAP, APART = 16, 2, 9  # of a square, between squares, between groups of squares
LEFT, TOP = 40, 36
# kind of key -> what the legend says
KINDS = {
    "full": "visible",
    "window": "in the window",
    "kept": "kept token",
    "decode": "window lifted",
    "empty": "hidden",
    "line": "not in the sequence",
}


def kinds(
    seqlen_q, seqlen_k, causal=False, window_size=(-1, -1), keep_first=0, force_fa_decode=False, full_from=None
) -> list[list[str]]:
    """For each query and key why it is visible, a name in KINDS; "empty" if it is not."""
    left, right = window_size
    if causal:
        right = 0
    off = seqlen_k - seqlen_q

    def kind(i, j):
        lifted = (force_fa_decode and seqlen_q == 1) or (full_from is not None and i >= full_from)
        if j >= seqlen_k or (right >= 0 and j > i + off + right):
            return "empty"
        if left < 0 or j >= i + off - left:
            return "window" if left >= 0 or right > 0 else "full"
        return "kept" if j < keep_first else "decode" if lifted else "empty"

    return [[kind(i, j) for j in range(seqlen_k)] for i in range(seqlen_q)]


def visible(
    seqlen_q, seqlen_k, causal=False, window_size=(-1, -1), keep_first=0, force_fa_decode=False, full_from=None
) -> torch.Tensor:
    """The same as a dense bool [seqlen_q, seqlen_k], for PyTorch's own attention."""
    left, right = window_size
    if causal:
        right = 0
    i, j = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q, torch.arange(seqlen_k)
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0 and not (force_fa_decode and seqlen_q == 1):
        seen = (j >= i - left) | (j < keep_first)
        if full_from is not None:
            seen[full_from:] = True
    return seen & (j <= i + right) if right >= 0 else seen


def square(x: float, y: float, kind: str, size: float = CELL) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="3" class="f-{kind}"/>'


def words(x: float, y: float, text, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(str(text))}</text>'


def place(n: int, groups) -> float:
    """Where the n-th row or column begins, with room after each group."""
    ends = [sum(groups[: g + 1]) for g in range(len(groups) - 1)]
    return n * (CELL + GAP) + APART * sum(n >= end for end in ends)


def legend(x: float, y: float, used) -> tuple[str, float, float]:
    """(picture, width, height) of the kinds' names, one below the other."""
    body = [
        square(x, y + 18 * n, kind, 11) + words(x + 18, y + 18 * n + 10, KINDS[kind]) for n, kind in enumerate(used)
    ]
    return "".join(body), x + 24 + 6.6 * max(len(KINDS[kind]) for kind in used), 18 * len(used)


def draw(rows, title, row_groups=None, column_groups=None, row_names=None, column_names=None, standalone=False) -> str:
    """The picture of `kinds(...)`: a query per row, a key per column; groups of rows or columns are set apart."""
    row_groups, column_groups = row_groups or [len(rows)], column_groups or [len(rows[0])]
    body = [words(LEFT, 12, "keys", "strong")]
    body.append(f'<text transform="translate(11 {TOP}) rotate(-90)" class="strong end">queries</text>')
    for j in range(len(rows[0])):
        name = column_names[j] if column_names else j
        body.append(words(LEFT + place(j, column_groups) + CELL / 2, TOP - 7, name, "small mid"))
    for i, row in enumerate(rows):
        y = TOP + place(i, row_groups)
        body.append(words(LEFT - 7, y + CELL - 4, row_names[i] if row_names else i, "small end"))
        body += [square(LEFT + place(j, column_groups), y, kind) for j, kind in enumerate(row)]
    bottom = max(TOP + place(len(rows) - 1, row_groups) + CELL, TOP + 48)
    names, width, height = legend(LEFT, bottom + 12, [kind for kind in KINDS if any(kind in row for row in rows)])
    width = max(width, LEFT + place(len(rows[0]) - 1, column_groups) + CELL + 2)
    return svg(width, bottom + 12 + height, "".join(body) + names, title, standalone)
