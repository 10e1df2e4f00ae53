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
    is_all_there = asked.stage is None and not asked.refresh and all(node.state == "cached" for node in plan(asked.config))
    if not is_all_there and (told := in_the_way(asked.config)):
        raise BadConfig([f"launch: {told}"])
