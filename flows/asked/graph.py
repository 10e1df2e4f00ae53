"""The pipeline as a graph: what depends on what, and what people call its nodes."""

from stages.contracts.specs import SOURCES, SPECS

WHOLE, SINGLE = "finetune-llama2", "stage"  # our flows, by their names in Prefect: the pipeline, and one stage of it


def nodes_of(name: str) -> list[str]:
    """The nodes that a person means: a node's name, or a stage's (`download` is two nodes).

    Raises:
        ValueError: there is neither.
    """
    if name in SPECS:
        return [name]
    if nodes := [node for node, spec in SPECS.items() if name == spec.STAGE]:
        return nodes
    names = sorted({spec.STAGE for spec in SPECS.values()} | set(SPECS), key=str)
    raise ValueError(f"there is no stage {name}. Legal here: {', '.join(names)}")


def with_dependents(nodes: list[str]) -> list[str]:
    """These nodes and all that use their results, directly or not, in the pipeline's order."""
    found = set(nodes)
    for node in SPECS:
        if found & set(SOURCES[node].values()):
            found.add(node)
    return [node for node in SPECS if node in found]
