"""On PYTHONPATH with TRITON_INTERPRET=1, this lets vLLM's V2 model runner start on a CPU: a Triton backend that is
there and does nothing, for the interpreter runs the kernels. For tests alone."""

import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _Driver
    compiler = None


triton.backends.backends["cpu"] = _Backend
