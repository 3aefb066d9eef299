"""Settings of the whole suite."""

import atexit
import gc
import os
import signal
import tempfile

import hypothesis
import torch

from interpreted_kernels import hasten_interpreter

# Some virtual machines announce matrix instructions that they do not run: half precision on the
# CPU would end the process. oneDNN reads this on its first use.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

# The key by which runs are told from those of others: not the user's.
_state = tempfile.TemporaryDirectory()
atexit.register(_state.cleanup)
os.environ["XDG_STATE_HOME"] = _state.name

# Without a GPU the kernels run interpreted; Triton reads this when they are imported.
if not torch.cuda.is_available() and os.environ.setdefault("TRITON_INTERPRET", "1") == "1":
    hasten_interpreter()

# Shells start jobs in the background with Ctrl-C ignored, which processes of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One process per core runs the tests; more threads than cores only wait for each other.
torch.set_num_threads(1)

# What the imports made stays: the collector need not look at it again and again.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("suite")
