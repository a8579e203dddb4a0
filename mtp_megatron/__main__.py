"""``python -m mtp_megatron``: the same as the ``mtp-megatron`` command, for machines where scripts are not on PATH."""

import sys

from mtp_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
