"""The compiler of the backend, which nothing calls where `TRITON_INTERPRET` is set."""

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    """Has no target, so that a kernel which is not interpreted fails."""

    @staticmethod
    def supports_target(target):
        return False

    def hash(self):
        raise RuntimeError("kernels are interpreted, and something asked to compile one")

    parse_options = add_stages = load_dialects = get_module_map = hash
