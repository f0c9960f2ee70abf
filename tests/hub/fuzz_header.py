"""Coverage-guided fuzzing of safetensors headers and YAML: `python -m tests.hub.fuzz_header CORPUS -runs=20000`.

Needs atheris (`pip install atheris`). Any exception but LoadError and ConfigError is a crash. The package is imported
without its __init__, which would bring torch: nothing here needs it.
"""

import sys
import tempfile
import types
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent.parent
for name in ("molora", "molora.hub"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(ROOT.joinpath(*name.split(".")))]

with atheris.instrument_imports(include=["molora"]):
    from molora import headers
    from molora.errors import ConfigError, LoadError
    from molora.hub.plain_yaml import read_yaml, write_yaml

FILE = Path(tempfile.mkdtemp(), "adapter_model.safetensors")


def one(data):
    """The first byte says what the rest is: a whole file, the text of a header before 64 bytes of data, or YAML."""
    kind, rest = (data[0] % 3, data[1:]) if data else (0, b"")
    try:
        if kind == 2:
            write_yaml(read_yaml(rest.decode("utf-8", "replace"), "card.yaml"))
            return
        FILE.write_bytes(rest if kind == 0 else len(rest).to_bytes(8, "little") + rest + bytes(64))
        for info in headers.read_header(FILE, max_bytes=100_000, max_tensors=100).values():
            assert info.dtype in headers.DTYPE_BYTES and all(0 <= number < 2**63 for number in info.shape)
    except (LoadError, ConfigError):
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
