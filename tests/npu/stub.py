"""Make the real torch_npu importable on a machine without CANN.

    python tests/npu/stub.py        # prints the environment that a process needs
    env $(python tests/npu/stub.py) python -c "import torch_npu"

The wheel is installed in its own folder under .npu/, because torch_npu in torch's environment would make `import torch`
fail without CANN. gcc builds replacements of CANN's libraries beside it. cann.c holds the functions that must work;
every other function fails, and every kernel of libopapi.so fails to launch. So torch_npu's schemas, shape functions,
argument checks, autograd, allocator and Python API are real. A call that would reach a device raises an error that
names the kernel.
"""
from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ASCEND_LIBRARIES = ("libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")
FAILED, LAUNCH_FAILED = 507899, 561103  # CANN's codes: runtime internal error; inner error of an operation


def version_for_this_torch() -> str:
    """Return torch's version, which is also torch_npu's; the oldest supported version needs a post-release."""
    version = importlib.metadata.version("torch").split("+")[0]
    return {"2.7.1": "2.7.1.post11"}.get(version, version)


def environment(version: str | None = None) -> dict[str, str]:
    """Install and build what is missing. Return the environment variables with which a process can import torch_npu."""
    version = version or version_for_this_torch()
    root = HERE.parents[1] / ".npu" / f"{version}-py{sys.version_info[0]}{sys.version_info[1]}"
    wheel, libraries = root / "site", root / "cann"
    installed, built = root / "installed", libraries / "built"
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:  # several ranks may run this at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not installed.exists():
            shutil.rmtree(wheel, ignore_errors=True)
            flags = os.environ.get("PIP_FLAGS", "").split()
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *flags, "--no-deps", "--target", wheel,
                            f"torch_npu=={version}"], check=True, stdout=sys.stderr)
            installed.touch()
        sources = (installed, HERE / "cann.c", HERE / "stub.py")
        if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
            shutil.rmtree(libraries, ignore_errors=True)
            build(wheel / "torch_npu", libraries)
            built.touch()
    return {
        "PYTHONPATH": str(wheel), "LD_LIBRARY_PATH": str(libraries),
        "TASK_QUEUE_ENABLE": "0",  # raise errors in the call, not later from another thread
        "ASCEND_GLOBAL_LOG_LEVEL": "4", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
    }


def build(package: Path, out: Path) -> None:
    """Build in `out` the libraries that torch_npu in `package` links to or opens."""
    out.mkdir(parents=True)
    (torch_npu,) = package.glob("lib/libtorch_npu.so")
    needed = set()
    for library in (torch_npu, *package.glob("_C*.so"), *package.glob("lib/libnpu_profiler.so")):
        listing = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
        needed.update(re.findall(r"\b(?:acl|rt|Msprof|Hccl)\w+", listing.stdout))
    kernels = {name.decode().removesuffix("GetWorkspaceSize")
               for name in re.findall(rb"\0(aclnn[A-Z]\w+)(?=\0)", torch_npu.read_bytes())}

    # weak, so that the functions of cann.c replace them
    failing = "".join(f"__attribute__((weak)) int {name}(void) {{ return {FAILED}; }}\n" for name in sorted(needed))
    (out / "failing.c").write_text(failing)
    (out / "kernels.c").write_text("".join(
        f"int {name}{step}(void) {{ return {LAUNCH_FAILED}; }}\n"
        for name in sorted(kernels) for step in ("GetWorkspaceSize", "")))
    (out / "empty.c").write_text("")
    link(out, "libascendcl.so", HERE / "cann.c", out / "failing.c")
    link(out, "libopapi.so", out / "kernels.c")
    for name in ASCEND_LIBRARIES:  # each finds its functions in libascendcl.so
        link(out, f"{name}.so", out / "empty.c", "-Wl,--no-as-needed", f"-L{out}", "-lascendcl")


def link(out: Path, name: str, *arguments) -> None:
    command = ["gcc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}", "-o", out / name, *arguments]
    subprocess.run(list(map(str, command)), check=True)


def activate() -> None:
    """Restart this program with torch_npu importable, unless it is: the dynamic loader reads LD_LIBRARY_PATH first."""
    wanted = environment()
    if wanted["LD_LIBRARY_PATH"] not in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
            wanted[name] = ":".join(filter(None, (wanted[name], os.environ.get(name))))
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--version", help="torch_npu version (default: that of the installed torch)")
    print(*(f"{name}={value}" for name, value in environment(parser.parse_args().version).items()))
