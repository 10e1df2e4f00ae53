"""What was made from what, as SVG: the nodes of the pipeline from the first to the last, with what became of each.

Drawn are the edges that no path of others implies; the words of each node name all its inputs.
"""

from collections.abc import Collection
from html import escape

from flows.records.run_record import NodeRecord
from stages.contracts.specs import SOURCES
from stages.contracts.words import seconds

WIDTH, HEIGHT, GAP_X, GAP_Y = 194, 46, 16, 26  # of a node, and between them
PAGE = 2 * WIDTH + GAP_X
GATE = ("verify", "train")  # no result passes here: training waits for the verdict
MARKS = {"ran": "ok", "cached": "cached", "failed": "bad", "stopped": "stopped"}


def lineage_graph(nodes: dict[str, NodeRecord], fingerprints: dict[str, str], targets: Collection[str]) -> str:
    """The graph of a run.

    Args:
        fingerprints: of the results, by node.
        targets: the nodes of which the page tells more, each at #node.
    """
    edges = _edges()
    levels = _levels(edges)
    places = _places(edges, levels)
    height = (max(levels.values()) + 1) * (HEIGHT + GAP_Y) - GAP_Y + 2
    parts = [_edge(places[source], places[target], is_gate=(source, target) == GATE) for source, target in edges]
    for node, state in nodes.items():
        drawn = _node(node, places[node], state, fingerprints.get(node))
        parts.append(f'<a href="#{escape(node)}">{drawn}</a>' if node in targets else drawn)
    return (
        f'<svg viewBox="0 0 {PAGE} {height}" width="{PAGE}" height="{height}" role="img" aria-label="lineage">'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path class="head" d="M0 0L8 4L0 8z"/></marker></defs>{"".join(parts)}</svg>'
    )


def _edges() -> list[tuple[str, str]]:
    """From what to what, without what follows from the others."""
    sources = {node: set(inputs.values()) for node, inputs in SOURCES.items()}
    sources[GATE[1]].add(GATE[0])
    before: dict[str, set[str]] = {}
    for node, direct in sources.items():
        before[node] = direct.union(*(before[source] for source in direct))
    return [
        (source, node)
        for node, direct in sources.items()
        for source in SOURCES
        if source in direct and not any(source in before[other] for other in direct)
    ]


def _levels(edges: list[tuple[str, str]]) -> dict[str, int]:
    levels: dict[str, int] = {}
    for node in SOURCES:
        levels[node] = 1 + max((levels[source] for source, target in edges if target == node), default=-1)
    return levels


def _places(edges: list[tuple[str, str]], levels: dict[str, int]) -> dict[str, tuple[float, float]]:
    """The upper left corner of each node: two beside each other where there are two or an edge goes by, else in the middle."""
    places: dict[str, tuple[float, float]] = {}
    for level in range(max(levels.values()) + 1):
        here = [node for node in SOURCES if levels[node] == level]
        goes_by = any(levels[source] < level < levels[target] for source, target in edges)
        sources = {node: [places[source][0] for source, target in edges if target == node] for node in here}
        columns = sorted(
            here, key=lambda node: sum(sources[node]) / max(1, len(sources[node]))
        )  # below what they are made from
        for place, node in enumerate(columns):
            x = place * (WIDTH + GAP_X) if len(here) > 1 or goes_by else (PAGE - WIDTH) / 2
            places[node] = (x, 1 + level * (HEIGHT + GAP_Y))
    return places


def _edge(source: tuple[float, float], target: tuple[float, float], *, is_gate: bool) -> str:
    (x0, y0), (x1, y1) = (source[0] + WIDTH / 2, source[1] + HEIGHT), (target[0] + WIDTH / 2, target[1] - 1)
    bend = y1 - GAP_Y / 2  # it goes straight down to the level before, and turns there
    path = f"M{x0:g} {y0:g}V{y1 - GAP_Y:g}C{x0:g} {bend:g} {x1:g} {bend:g} {x1:g} {y1:g}"
    return f'<path class="edge{" gate" if is_gate else ""}" marker-end="url(#arrow)" d="{path}"/>'


def _node(node: str, place: tuple[float, float], record: NodeRecord, fingerprint: str | None) -> str:
    x, y = place
    took = seconds(record.wall_seconds) if record.state == "ran" and record.wall_seconds is not None else record.state
    below = fingerprint[:12] if fingerprint else "no result"
    colour = MARKS.get(record.state, "none")
    return (
        f'<rect class="node" x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<rect class="mark {colour}" x="{x:g}" y="{y + 8:g}" width="4" height="{HEIGHT - 16}" rx="2"/>'
        f'<text class="name" x="{x + 14:g}" y="{y + 20:g}">{escape(node)}</text>'
        f'<text x="{x + WIDTH - 10:g}" y="{y + 20:g}" text-anchor="end">{escape(took)}</text>'
        f'<text class="digest" x="{x + 14:g}" y="{y + 37:g}">{escape(below)}</text>'
    )
