"""The real `finetune` command with stand-in stages, as a process: `python -m tests.flows.fake_finetune ARGUMENTS`."""

import sys

from fake_stages import Script

from flows import cli
from flows.launch import choose

if __name__ == "__main__":
    choose.launcher_for = lambda config: Script(grace=5.0)
    sys.exit(cli.main())
