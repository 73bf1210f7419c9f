"""Exports a model for serving: one file for PyTorch, one for C++ without Python.

Writes to --out:

    model.pt2         an exported program: `import perceiver_fast; torch.export.load("model.pt2").module()(image)`
    model-aoti.pt2    an AOTInductor package, compiled for this kind of machine: serve.cpp runs it without Python
    model.onnx        standard ONNX operators, for any runtime (with --onnx; needs the packages onnx and onnxscript)
    image.bin, logits.bin   an example input and its output, float32, rows in order

Batch, height and width are free in all of them.
"""

import argparse
from pathlib import Path

import torch
from torch.export import Dim

import perceiver_fast as pf

HEIGHT, WIDTH = 64, 48


def build_model(seed: int) -> torch.nn.Module:
    """A small image classifier; put your own checkpoint here, with model.load_state_dict(torch.load(..))."""
    torch.manual_seed(seed)
    arguments = dict(num_freq_bands=6, depth=2, max_freq=10.0, num_latents=32, latent_dim=64, num_classes=10)
    return pf.Perceiver(**arguments).eval()


# Of images [batch, height, width, 3]; what is not named here is fixed.
FREE = {0: Dim("batch", max=256), 1: Dim("height", min=2, max=2048), 2: Dim("width", min=2, max=2048)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/deploy"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--onnx", action="store_true", help="write model.onnx as well")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the image (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    model = build_model(options.seed)
    image = torch.randn(2, HEIGHT, WIDTH, 3)
    with torch.no_grad():
        logits = model(image)
    image.numpy().tofile(options.out / "image.bin")
    logits.numpy().tofile(options.out / "logits.bin")

    with torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=(FREE,))
    torch.export.save(program, options.out / "model.pt2")
    print(f"{options.out / 'model.pt2'}: an exported program")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(options.out / "model-aoti.pt2"))
    print(f"{package}: an AOTInductor package")
    if options.onnx:
        with torch.no_grad():
            onnx = torch.onnx.export(model, (image,), dynamic_shapes=(FREE,), dynamo=True, verbose=False)
        onnx.save(options.out / "model.onnx")
        print(f"{options.out / 'model.onnx'}: ONNX")
    shape, output = " ".join(map(str, image.shape)), options.out / "output.bin"
    print(f"\nWithout Python, once CMakeLists.txt is built; {output} should then be as {options.out / 'logits.bin'}:")
    print(f"{options.out / 'build/serve'} {package} {options.out / 'image.bin'} {output} {shape}")


if __name__ == "__main__":
    main()
