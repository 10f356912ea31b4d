"""Write schemas.json: the signature of every torch_npu operation that kernels_npu.py calls, in released wheels.

    python tests/npu/extract_schemas.py [VERSION ...]     # downloads about 100 MB per version with pip

libtorch_npu.so contains each schema as the text that registers it with PyTorch, so that no wheel is installed or run.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# the oldest supported; its post-release, the oldest recommended; that of our torch; the newest
VERSIONS = ("2.7.1", "2.7.1.post11", "2.13.0", "2.14.0")


def operations() -> set[str]:
    """Return the names of the operations in kernels_npu.py."""
    return set(re.findall(r"torch_npu\.(npu_\w+)\(", (HERE.parents[1] / "kernels_npu.py").read_text()))


def schemas(version: str, wanted: set[str]) -> dict[str, str]:
    """Return {operation with its overload: schema} in the wheel of a version."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                        "--dest", folder, f"torch_npu=={version}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            library = archive.read("torch_npu/lib/libtorch_npu.so")
    found = {}
    for name, overload, rest in re.findall(rb"\0(?:npu::)?(npu_\w+)(\.\w+)?(\([^\0]*\) -> [^\0]+)(?=\0)", library):
        if name.decode() in wanted:
            name = (name + overload).decode()
            found[name] = name + rest.decode()
    return dict(sorted(found.items()))


if __name__ == "__main__":
    extracted = {version: schemas(version, operations()) for version in sys.argv[1:] or VERSIONS}
    (HERE / "schemas.json").write_text(json.dumps(extracted, indent=1) + "\n")
