"""The figures of the docs: `python -m bench.figures` draws them all again.

sees            what one pixel's conditional depends on, in each architecture: from the definitions of `tests/cases.py`,
                which the tests hold the models to
row             how the cached sampler computes a row
models/NAME     what one layer of an architecture reads at a pixel
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tests.cases import ARCHITECTURES

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCALE = 2  # pixels of the file for one of the drawing: sharp on fine screens
WHITE, INK, GREY, LINE = "#ffffff", "#1f2328", "#6e7781", "#d0d7de"
SEEN, UNSEEN, LATER, HERE = "#4a90d9", "#f2b56b", "#f3f4f6", "#1f2328"
NAMES = {
    "pixel_cnn": "PixelCNN",
    "gated_pixel_cnn": "Gated PixelCNN",
    "row_lstm": "Row LSTM",
    "diag_bilstm": "Diagonal BiLSTM",
}

# What a layer reads at the pixel @, a panel a part of the layer: its title, what is said below it, rows of cells.
LAYERS = {
    "pixel_cnn": [("the block's 3 by 3", "mask B", ("d d d", "d @ .", ". . ."))],
    "gated_pixel_cnn": [
        ("the vertical stack", "it has not seen this row", ("v v v", "v v v", ". . .")),
        ("the horizontal stack", "reads v of this pixel too", (". . .", "u @ .", ". . .")),
    ],
    "row_lstm": [("the LSTM", "a row at a time", ("h c h", "u @ .", ". . ."))],
    "diag_bilstm": [
        ("from the left", "a diagonal at a time", (". h .", "c @ .", ". . .")),
        ("from the right", "then moved down a row", (". h .", ". @ c", ". . .")),
    ],
    "multi_scale": [
        ("the small image", "drawn first", ("s s", "s s")),
        ("the large one", "drawn in this order", ("s 1 s 2", "3 4 5 6", "s 7 s 8", "9 10 11 12")),
    ],
}
CELLS = {  # what a cell says: its colour, the words for it; all others are numbers
    "@": (HERE, "this pixel: its own features"),
    "d": (SEEN, "d: what the block makes of the stream"),
    "u": (SEEN, "u: the stream"),
    "v": (SEEN, "v: the vertical stack"),
    "h": ("#9cc5ec", "h: a hidden state"),
    "c": ("#7fc8a9", "c: a hidden state and its cell"),
    "s": ("#7fc8a9", "s: of the small image, known in the large one"),
    ".": (LATER, ""),
}


class Drawing:
    """A picture in units that SCALE enlarges."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), WHITE)
        self.pen = ImageDraw.Draw(self.image)

    def box(self, x: float, y: float, width: float, height: float, fill: str, outline: str = WHITE) -> None:
        corners = [x * SCALE, y * SCALE, (x + width) * SCALE, (y + height) * SCALE]
        self.pen.rectangle(corners, fill=fill, outline=outline, width=SCALE)

    def text(self, x: float, y: float, text: str, size: float = 13, fill: str = INK, anchor: str = "mm") -> None:
        font = ImageFont.load_default(size * SCALE)
        self.pen.text((x * SCALE, y * SCALE), text, fill=fill, font=font, anchor=anchor)

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Along an axis, with its head at the second point."""
        self.pen.line([x0 * SCALE, y0 * SCALE, x1 * SCALE, y1 * SCALE], fill=INK, width=2 * SCALE)
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        back, side = 7, 4
        head = [(x1, y1), (x1 - back * dx - side * dy, y1 - back * dy - side * dx)]
        head.append((x1 - back * dx + side * dy, y1 - back * dy + side * dx))
        self.pen.polygon([(x * SCALE, y * SCALE) for x, y in head], fill=INK)

    def save(self, path: Path) -> None:
        self.image.quantize(64).save(path, optimize=True)


def sees(path: Path, height: int = 11, width: int = 15, layers: int = 3, at: tuple[int, int] = (7, 7)) -> None:
    """Draw a panel an architecture: the pixel, what its conditional depends on, and what is before it but unseen."""
    cell, gap, top, bottom = 14, 26, 30, 34
    panel = width * cell
    drawing = Drawing(len(NAMES) * panel + (len(NAMES) + 1) * gap, top + height * cell + bottom)
    here = at[0] * width + at[1]
    for k, (name, title) in enumerate(NAMES.items()):
        seen, left = ARCHITECTURES[name][1](height, width, 1, layers)[here], gap + k * (panel + gap)
        drawing.text(left + panel / 2, top / 2, title, 14)
        for n in range(height * width):
            fill = HERE if n == here else LATER if n > here else SEEN if seen[n] else UNSEEN
            drawing.box(left + n % width * cell, top + n // width * cell, cell, cell, fill)
    legend = {"the pixel": HERE, "seen": SEEN, "before it, but not seen": UNSEEN, "later": LATER}
    x, y = gap, top + height * cell + bottom / 2
    for text, fill in legend.items():
        drawing.box(x, y - 6, 12, 12, fill, LINE)
        drawing.text(x + 18, y, text, 12, GREY, "lm")
        x += 36 + 7 * len(text)
    drawing.text(drawing.image.width / SCALE - gap, y, f"a stem of 7 by 7 and {layers} layers", 12, GREY, "rm")
    drawing.save(path)


def row(path: Path) -> None:
    """Draw the rows above, the row's cached left part, the pixel and what is to come, and what each costs."""
    cell, width, above, at, left, top = 34, 12, 3, 5, 24, 46
    drawing = Drawing(790, top + (above + 2) * cell + 50)
    for i in range(above + 2):
        for j in range(width):
            here = (i, j) == (above, at)
            done = i < above or (i == above and j < at)
            fill = HERE if here else LATER if not done else SEEN if i < above else "#9cc5ec"
            drawing.box(left + j * cell, top + i * cell, cell, cell, fill)
    right, middle = left + width * cell, top + (above + 0.5) * cell
    drawing.text(left + width * cell / 2, top - 20, "an image, drawn row by row", 14)
    drawing.text(right + 24, top + above * cell / 2 - 10, "rows above: finished", 14, anchor="lm")
    said = "one product a layer for the whole row, once a row"
    drawing.text(right + 24, top + above * cell / 2 + 12, said, 12, GREY, "lm")
    drawing.text(right + 24, middle - 10, "this row: a short step a sub-pixel", 14, anchor="lm")
    said = "gates = above + weights · [left, here]"
    drawing.text(right + 24, middle + 12, said, 12, GREY, "lm")
    x = left + (at + 0.5) * cell
    drawing.arrow(x, top + (above - 0.5) * cell, x, top + above * cell - 1)
    drawing.arrow(x - cell, middle, x - cell / 2 - 1, middle)
    y = top + (above + 2) * cell + 30
    for text, fill, where in (
        ("left: every activation is kept", "#9cc5ec", left),
        ("here: red, then green, then blue", HERE, left + 240),
        ("not drawn yet", LATER, left + 500),
    ):
        drawing.box(where, y - 6, 12, 12, fill, LINE)
        drawing.text(where + 18, y, text, 12, GREY, "lm")
    drawing.save(path)


def layer(path: Path, name: str) -> None:
    """Draw what one layer of an architecture reads at a pixel."""
    cell, gap, top, panels = 32, 190, 34, LAYERS[name]
    height = max(len(rows) for *_, rows in panels) * cell
    drawing, used = Drawing(gap * len(panels) + 320, top + height + 36), set()
    for k, (title, below, rows) in enumerate(panels):
        cells = [row.split() for row in rows]
        middle = 20 + k * gap + (gap - 20) / 2
        drawing.text(middle, top / 2, title, 14)
        drawing.text(middle, top + height + 16, below, 12, GREY)
        for i, row in enumerate(cells):
            for j, said in enumerate(row):
                x, y, fill = middle + (j - len(row) / 2) * cell, top + i * cell, CELLS.get(said, (LATER,))[0]
                drawing.box(x, y, cell, cell, fill)
                drawing.text(x + cell / 2, y + cell / 2, said.strip("@."), 14, WHITE if fill == SEEN else INK)
                used.add(said)
    for k, (fill, words) in enumerate(CELLS[said] for said in CELLS if said in used and said != "."):
        x, y = 20 + len(panels) * gap, top + 16 + 26 * k
        drawing.box(x, y - 6, 12, 12, fill, LINE)
        drawing.text(x + 20, y, words, 12, GREY, "lm")
    drawing.save(path)


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.figures", description="Draw the figures of the docs.")
    options.add_argument("--out", type=Path, default=DOCS, help="the folder for them (docs)")
    out = options.parse_args(argv).out
    (out / "models").mkdir(parents=True, exist_ok=True)
    sees(out / "sees.png")
    row(out / "row.png")
    for name in LAYERS:
        layer(out / f"models/{name}.png", name)
    print(f"{out}: sees.png, row.png, {', '.join(f'models/{name}.png' for name in LAYERS)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
