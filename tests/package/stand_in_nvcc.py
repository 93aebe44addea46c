"""g++ that answers CMake as nvcc of a version does: `stand_in_nvcc.py TOOLKIT VERSION ARGUMENT...`"""

from __future__ import annotations

import subprocess
import sys

TAKES_ANOTHER = ("--keep-dir", "-Xcompiler", "-x")
ITS_OWN = ("-v", "-forward-unknown-to-host-compiler")


def main(toolkit: str, version: str, *arguments: str) -> int:
    major, minor, build = version.split(".")
    if "--version" in arguments:
        print(f"Cuda compilation tools, release {major}.{minor}, V{version}")
        return 0
    if "__cmake_determine_cuda" in arguments:
        print(f"#$ TOP={toolkit}", file=sys.stderr)
        return 1
    if "-v" in arguments:
        libraries = f'"-L{toolkit}/lib64"'
        for line in ("cicc -arch compute_75", f"LIBRARIES=  {libraries}", f"g++ a.o {libraries} -lcudart_static"):
            print(f"#$ {line}", file=sys.stderr)
    parts = {"MAJOR": major, "MINOR": minor, "BUILD": build}
    command = ["g++", "-D__CUDACC__", "-D__NVCC__", *(f"-D__CUDACC_VER_{k}__={v}" for k, v in parts.items())]
    words = iter(arguments)
    for word in words:
        if word in TAKES_ANOTHER:
            next(words)
        elif word.endswith(".cu"):
            command += ["-x", "c++", word, "-x", "none"]
        elif word not in ITS_OWN and not word.startswith(("--keep", "--generate-code", "-Xcompiler=")):
            command.append(word)
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
