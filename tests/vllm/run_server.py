"""`python -m tests.vllm.run_server MODEL DIRECTIONS [vLLM options]`: what `steer serve --backend vllm` runs."""

from __future__ import annotations

import sys
from pathlib import Path

from steer.vllm.plugin import serve
from steer.vllm.settings import EngineSettings
from tests.vllm import device

if __name__ == "__main__":
    serve(
        sys.argv[1], EngineSettings(directions=Path(sys.argv[2]), rank=2, readout=2), [*device.ARGUMENTS, *sys.argv[3:]]
    )
