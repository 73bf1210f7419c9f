"""What a first call on a GPU tries, through Triton's own launch, without a GPU: ``python tests/fake_trials.py --op geglu``.

The driver is that of fake_driver.py, which runs nothing: results are what memory held, and no trial may hold. With --spoil a
kernel gets an argument that it does not take, which Triton raises for at a launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # this package then gives its Triton kernels CPU tensors,
import perceiver_fast.gpu  # noqa: E402, F401

del os.environ["TRITON_INTERPRET"]  # but Triton compiles them
import torch  # noqa: E402
import triton  # noqa: E402
from fake_driver import FakeDriver  # noqa: E402

from perceiver_fast.kernels.launch import Launch  # noqa: E402
from perceiver_fast.ops.declaration import OPS  # noqa: E402
from perceiver_fast.ops.trial import held  # noqa: E402


def main() -> None:
    """Prints every op's outcome as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", required=True, choices=OPS, help="again: and this one")
    parser.add_argument("--spoil", default="", metavar="KERNEL", help="pass it an argument that it does not take")
    args = parser.parse_args()
    triton.runtime.driver.set_active(FakeDriver(90))
    run = Launch.run

    def launched(launch: Launch) -> None:
        if launch.kernel.__name__ == args.spoil:
            launch = dataclasses.replace(launch, arguments=launch.arguments | {"unknown": 1})
        run(launch)

    Launch.run = launched
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN: what is not written is no lucky number
    torch.use_deterministic_algorithms(True)
    found = {name: dataclasses.asdict(held(OPS[name].trial, "triton", torch.device("cpu"))) for name in args.op}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
