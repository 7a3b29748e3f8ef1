"""Curves as SVG: text that any browser and GitHub show, from nothing but the numbers."""

import math
from html import escape

COLOURS = ("#4a90d9", "#d9534f", "#3c9d5d", "#b77bd1", "#e0912f", "#5bb8b8", "#8c6d46", "#d972a8", "#7f8c8d", "#35476b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 60, 20, 16, 44
DASHES = ("", "6 3", "2 3")  # of the second and third ten curves

Points = list[tuple[float, float]]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, some `most` of them."""
    rough = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def bounds(values: list[float]) -> tuple[float, float]:
    """Return the least and the largest, or something around them where they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)


def curves(series: dict[str, Points], x_label: str, y_label: str) -> str:
    """Draw curves, each under its name in a legend; points that are not finite are left out."""
    series = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    legend = 18 * len(series)
    height = HEIGHT + legend + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    if not series:
        return "\n".join([*out, f'<text x="{LEFT}" y="{TOP + 20}">no numbers yet</text>', "</svg>"])
    (x0, x1), (y0, y1) = (bounds([p[k] for points in series.values() for p in points]) for k in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        right, down = (x - x0) / (x1 - x0), (y1 - y) / (y1 - y0)
        return LEFT + right * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, anchor: str, more: str = "") -> None:
        out.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#1f2328"{more}>{escape(words)}</text>')

    for x in ticks(x0, x1):
        at, _ = place(x, y0)
        out.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eaeef2"/>')
        text(at, HEIGHT - BOTTOM + 16, f"{x:g}", "middle")
    for y in ticks(y0, y1):
        _, at = place(x0, y)
        out.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#eaeef2"/>')
        text(LEFT - 6, at + 4, f"{y:g}", "end")
    text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 34, x_label, "middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    text(14, middle, y_label, "middle", f' transform="rotate(-90 14 {middle:.1f})"')
    for k, (name, points) in enumerate(series.items()):
        style = f'stroke="{COLOURS[k % 10]}" stroke-width="1.8" stroke-dasharray="{DASHES[k // 10 % 3]}"'
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points))
        out.append(f'<polyline points="{line}" fill="none" stroke-linejoin="round" {style}/>')
        if len(points) == 1:
            x, y = place(*points[0])
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[k % 10]}"/>')
        y = HEIGHT + 18 * k + 12
        out.append(f'<path d="M{LEFT} {y - 4}h26" {style}/>')
        text(LEFT + 34, y, name, "start")
    return "\n".join([*out, "</svg>"])
