"""A measuring process that measures nothing: it crashes, hangs or answers, as the case's geometry says.

In a module of its own, since a fresh process has to import it.
"""

import os
import time


def serve(pipe, options):
    pipe.send(("done", options))
    while True:
        try:
            name, exclude = pipe.recv()
        except EOFError:
            return
        _, geometry, *_ = name.split("/")
        pipe.send(("side", "fast"))
        if geometry == "readme" and "fast" not in exclude:  # our kernel takes the process down
            os._exit(7)
        if geometry == "video":
            time.sleep(60)
        if geometry == "flow" and "fast" not in exclude:
            pipe.send(("lost", "the device was lost: by the stub"))
            return
        pipe.send(("done", {"case": name, "sides": {}, "notes": [], "excluded": exclude, "process": os.getpid()}))
