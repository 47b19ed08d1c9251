"""Draws docs/images/hopper-timeline.svg: who does what in the Hopper forward kernel, from one work item to the next.

Durations are those of head_dim 128, tiles of 128 queries and 128 keys (docs/hopper-forward.md, E to G), rounded; what
waits for what is the kernel's protocol. usage: draw_timeline.py [--check]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from masks import square, words  # noqa: E402
from pictures import main  # noqa: E402
from style import svg  # noqa: E402

MULTIPLY, EXPONENTIALS, FIRST_EXPONENTIALS, ROWS = 512, 900, 1300, 350  # cycles; the first tile has a mask, too
COPY, ISSUE, FIND = 700, 60, 4300
STAGES, CONSUMERS = 2, 2
ITEMS = (("n", (3, 2, 1, 0)), ("n+1", (6, 5, 4)))  # tiles, from the last to the first; the second item is cut off
PER_PIXEL, LEFT, LANE, BOX = 13, 100, 30, 20
LANES = ("scout", "copies of K", "copies of V", "consumer 0", "consumer 1", "tensor cores")


class Timeline:
    """Consumers in their turns; a copy begins when its stage is free, a multiplication when its operands are there."""

    def __init__(self):
        self.boxes = []  # (lane, begin, end, colour, text)
        first = ITEMS[0][0], ITEMS[0][1][0]
        self.landed, self.released = {("K", first): 0}, {}  # the picture begins when the first tile is there
        self.free = {"K": [0] * (STAGES - 1), "V": [0] * STAGES}  # when the copies' stages are free, oldest first
        self.known = {ITEMS[0][0]: 0}  # since when the producer knows of an item
        self.issued = self.tensor = 0
        self.ready = [0] * CONSUMERS

    def copy(self, what, tile):
        """When a tile lands. Its stage is free again once no consumer needs it."""
        if (what, tile) not in self.landed:
            begin = max(self.issued + ISSUE, self.free[what].pop(0), self.known[tile[0]])
            self.issued, self.landed[what, tile] = begin, begin + COPY
            self.boxes.append((f"copies of {what}", begin, begin + COPY, "line", f"{what}{tile[1]}"))
        return self.landed[what, tile]

    def release(self, what, tile, end):
        self.released[what, tile] = self.released.get((what, tile), 0) + 1
        if self.released[what, tile] == CONSUMERS:
            self.free[what].append(end)

    def multiply(self, consumer, begin, what, tile, colour):
        operand = what[1]  # K, or V
        begin = max(begin, self.tensor, self.copy(operand, tile))
        self.tensor = end = begin + MULTIPLY
        self.boxes.append(("tensor cores", begin, end, colour, f"{consumer}: {what}{tile[1]}"))
        return end

    def output(self, consumer, tile):
        """The product by V of a tile whose exponentials are there."""
        end = self.multiply(consumer, self.ready[consumer], "PV", tile, "window")
        self.release("V", tile, end)
        return end

    def work(self, consumer, begin, cycles, colour, text):
        self.boxes.append((f"consumer {consumer}", begin, begin + cycles, colour, text))
        return begin + cycles

    def run(self):
        for item, tiles in ITEMS:
            places = [(item, tile) for tile in tiles]
            for n, tile in enumerate(places):
                for c in range(CONSUMERS):
                    begin = self.output(c, places[n - 1]) if n else self.ready[c]
                    scores = self.multiply(c, begin, "QK", tile, "full")
                    cycles = EXPONENTIALS if n else FIRST_EXPONENTIALS
                    self.ready[c] = self.work(c, scores, cycles, "kept", f"exp {tile[1]}")
                    self.release("K", tile, self.ready[c] if n else scores)  # kept until its exponentials are good
                self.copy("V", tile)  # in the order in which the consumers need them
                if n + 1 < len(places):
                    self.copy("K", places[n + 1])
                if n == len(places) - 2 and item == ITEMS[0][0]:
                    self.find(places[2])
            if tiles[-1] == 0:
                for c in range(CONSUMERS):
                    self.ready[c] = self.work(c, self.output(c, places[-1]), ROWS, "decode", "")
        return self.boxes

    def find(self, tile):
        begin = self.landed["K", tile]
        self.known[ITEMS[1][0]] = begin + FIND
        text = f"takes item {ITEMS[1][0]} and finds its tiles"
        self.boxes.append(("scout", begin, begin + FIND, "peer", text))
        self.boxes.append(("scout", begin + FIND, begin + FIND + COPY, "line", "Q"))


def picture():
    boxes = Timeline().run()
    end = max(box[2] for box in boxes)
    body = []
    for row, lane in enumerate(LANES):
        y = 8 + row * LANE
        body.append(words(0, y + 14, lane, "strong"))
        body.append(f'<rect x="{LEFT}" y="{y + BOX + 4}" width="{end / PER_PIXEL:g}" height="1" class="f-line"/>')
    for lane, begin, stop, colour, text in boxes:
        x, wide, y = LEFT + begin / PER_PIXEL, (stop - begin) / PER_PIXEL, 8 + LANES.index(lane) * LANE
        body.append(f'<rect x="{x:.1f}" y="{y}" width="{wide - 1:.1f}" height="{BOX}" rx="3" class="f-{colour}"/>')
        kind = "box dark" if colour == "line" else "box"
        body.append(f'<text x="{x + wide / 2:.1f}" y="{y + 14}" class="{kind}">{text}</text>')
    y = 8 + len(LANES) * LANE + 16
    x = LEFT
    for colour, text in (
        ("full", "scores, Q by K"),
        ("window", "probabilities by V"),
        ("kept", "mask and exponentials"),
        ("decode", "LSE, rows leave"),
        ("line", "tensor copies"),
    ):
        body.append(square(x, y - 10, colour, 12) + words(x + 18, y, text))
        x += 36 + 7 * len(text)
    style = (
        "<style>svg text.box{font-size:9px;text-anchor:middle;fill:var(--paper)}svg text.dark{fill:var(--ink)}</style>"
    )
    title = "scout, producer and two consumers of the Hopper forward kernel over time"
    return svg(LEFT + end / PER_PIXEL + 4, y + 10, style + "".join(body), title, standalone=True)


if __name__ == "__main__":
    sys.exit(main({"hopper-timeline.svg": picture()}))
