#!/usr/bin/env bash
# Runs the wheel for aarch64 on this x86_64 machine, under qemu, beside torch's CPU build of that kind: tools/try_aarch64.sh [WHEEL]
#
# Needs Debian with root and qemu-user (apt-get fetches Python 3.11 of arm64, nothing is installed), and pip. About two
# minutes, of which most is the emulated import of torch. WHEEL: default, the one in dist/.
set -euo pipefail
[ "${1:-}" = "--help" ] && { sed -n '2,5s/^# //p' "$0"; exit 0; }
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheel=$(realpath "${1:-$(ls dist/*aarch64.whl)}")
work=$(mktemp -d)
trap 'dpkg --remove-architecture arm64 || true; rm -rf "$work"' EXIT
mkdir "$work/debs" "$work/root" "$work/site" "$work/wheels"

dpkg --add-architecture arm64
apt-get update -qq
(cd "$work/debs" && apt-get download -q python3.11-minimal:arm64 libpython3.11-minimal:arm64 libpython3.11-stdlib:arm64 \
  libexpat1:arm64 zlib1g:arm64 libssl3:arm64 libffi8:arm64 libbz2-1.0:arm64 liblzma5:arm64 libc6:arm64 libstdc++6:arm64 \
  libgcc-s1:arm64 libgomp1:arm64 libuuid1:arm64 libsqlite3-0:arm64 >/dev/null 2>&1)
for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/root"; done

# 2.10.0 is the oldest torch that wheels are for, and the latest of PyPI's for aarch64 that needs no CUDA.
"$python" -m pip download -q --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
  --python-version 3.11 --implementation cp --abi cp311 --no-deps -d "$work/wheels" torch==2.10.0 markupsafe
"$python" -m pip download -q --only-binary=:all: --no-deps -d "$work/wheels" filelock typing_extensions sympy mpmath \
  networkx jinja2 fsspec rich markdown-it-py mdurl pygments
for file in "$work"/wheels/*.whl "$wheel"; do
  "$python" -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])' "$file" "$work/site"
done

cat >"$work/try.py" <<'PYTHON'
import platform
import torch
import perceiver_fast as pf
from perceiver_fast import extension

def run(model, data, **options):
    model.zero_grad()
    out = model(data, **options)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]

assert platform.machine() == "aarch64" and extension.error is None, extension.error
print("torch", torch.__version__, "instruction set", extension.module.active_isa())
torch.manual_seed(0)
model = pf.Perceiver(num_freq_bands=6, depth=2, max_freq=10.0, num_latents=16, latent_dim=32, num_classes=10)
calls = {"image": (torch.randn(2, 20, 17, 3), {}), "points": (torch.randn(2, 40, 3), {"coords": torch.rand(2, 40, 2)})}
for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    for name, (data, options) in calls.items():
        model, data = model.to(dtype), data.to(dtype)
        ours = run(model, data, **options)
        with pf.use_backend("reference"):
            plain = run(model, data, **options)
        worst = max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(ours, plain))
        print(f"{name}, {dtype}: outputs and gradients differ from plain PyTorch's by {worst:.1e}")
        assert worst < bound
PYTHON
QEMU_LD_PREFIX="$work/root" qemu-aarch64 -E PYTHONPATH="$work/site" "$work/root/usr/bin/python3.11" -W ignore "$work/try.py"
