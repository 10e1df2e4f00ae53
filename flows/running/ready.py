"""What is known to be wrong with a run before any of its stages starts: its configuration, and what is to start the stages."""

from flows.asked.load_config import BadConfig, check_push, check_ready
from flows.asked.parameters import Asked
from flows.asked.plan import plan
from flows.launch.choose import in_the_way


def refuse_what_cannot_run(asked: Asked, where: str = "config") -> None:
    """Refuse what would fail later.

    Args:
        where: the configuration's name.

    Raises:
        BadConfig: what is wrong, as lines for people.
    """
    if asked.stage is None:
        check_ready(asked.config, where)
    elif asked.stage == "push":  # the sources of the downloads are no business of a single stage
        check_push(asked.config, where)
    stages = nodes_to_do(asked)
    if stages and (problems := in_the_way(asked.config, stages)):
        raise BadConfig([f"launch: {problem}" for problem in problems])


def nodes_to_do(asked: Asked) -> frozenset[str]:
    """The nodes that would be launched, as far as it is seen now."""
    if asked.stage is not None:
        return frozenset([asked.stage])
    to_come = {node.node for node in plan(asked.config, asked.given) if node.state == "run"}
    return asked.refresh | to_come
