"""What the benchmarks in `tools/` share: memory and time measurement, models, worlds of processes, printing."""

import os
import warnings

# A benchmark prints its table; what Megatron lacks on this machine is said by `python -m mtp_megatron.compat`.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler that measures memory announces itself otherwise
