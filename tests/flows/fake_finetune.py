"""The real `finetune` command with stand-in stages, as a process: `python -m tests.flows.fake_finetune ARGUMENTS`.

The processes that a runner starts for its runs read this file, too: multiprocessing does so.
"""

import sys

from fake_stages import Script

from flows import cli
from flows.launch import choose

choose.launcher_for = lambda config, stages: Script(grace=60.0)

if __name__ == "__main__":
    sys.exit(cli.main())
