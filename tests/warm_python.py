"""Python processes that begin with torch imported: forked from one that is, in 0.01 s rather than 3 s each.

For tests of what the package does as it is imported, as it is called from a shell, or in an environment: such a process
has torch and nothing of the package, and ends as any other does. Memory is measured in ordinary ones (support.py):
what is shared with the process that it comes from counts differently.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import gc, json, os, runpy, sys, types
import torch

def asked():
    # Forks for every line of stdin; returns in the child what it is to run.
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)

gc.freeze()  # what is there stays: looking through it again as a child ends takes a second
old = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
wanted = asked()
os.chdir(wanted["folder"])
os.environ.clear()
os.environ.update(wanted["env"])
for number, file in enumerate([os.devnull, *wanted["outputs"]]):
    os.dup2(os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
how, *sys.argv = wanted["arguments"]
script = how not in ("-c", "-m")
first = os.path.dirname(os.path.abspath(how)) if script else os.getcwd()
new = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
sys.path[:] = [first, *new, *(path for path in sys.path if path and path not in old)]
if how == "-c":
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    code, sys.argv[0] = sys.argv[0], "-c"
    exec(compile(code, "<string>", "exec"), vars(main))
elif how == "-m":
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv.insert(0, how)
    runpy.run_path(how, run_name="__main__")
"""
FORKS = sys.platform == "linux"
_server: subprocess.Popen | None = None


def python(*arguments, cwd=None, env=None) -> subprocess.CompletedProcess:
    """What ``python ARGUMENTS`` prints, and how it ends: ``-c CODE``, ``-m MODULE`` or a file, and their arguments.

    Args:
        cwd: where it runs. Default: here.
        env: its environment. Default: ours.
    """
    arguments, cwd = [str(argument) for argument in arguments], str(cwd or os.getcwd())
    env = dict(os.environ if env is None else env)
    if not FORKS:
        return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)
    server = _started()
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        wanted = {"arguments": arguments, "folder": cwd, "env": env, "outputs": [out.name, err.name]}
        server.stdin.write(json.dumps(wanted) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = (Path(file.name).read_text() for file in (out, err))
        return subprocess.CompletedProcess([sys.executable, *arguments], code, *texts)


def _started() -> subprocess.Popen:
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_server.communicate)  # it ends where its stdin does
    return _server
