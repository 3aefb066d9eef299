"""The selection kernels compile for a GPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the triton package is not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
def test_every_kernel_compiles_without_a_gpu(tmp_path):

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).parent / "compile_for_gpu.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
