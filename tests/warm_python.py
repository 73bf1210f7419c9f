"""Python processes that begin with torch imported: forked from one that is, in 0.01 s rather than 3 s each.

For tests of what the package does as it is imported, as it is called from a shell, or in an environment: such a process
has torch (and what else is asked for) and nothing of the package, and ends as any other does. Memory is measured in ordinary ones (support.py):
what is shared with the process that it comes from counts differently.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading

SERVER = """
import faulthandler, gc, importlib, json, os, runpy, signal, sys, types
for name in ["torch", *sys.argv[1:]]:
    importlib.import_module(name)

def asked():
    # Forks for every line of stdin; returns in the child what it is to run. A fork in between waits for it, and tells.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            wanted = json.loads(line)
            told = os.open(wanted["told"], os.O_WRONLY)
            try:
                ways = os.O_RDONLY, *[os.O_WRONLY | os.O_APPEND] * 2
                files = [os.open(path, way) for path, way in zip(wanted["files"], ways)]
                child = os.fork()
            except OSError as error:
                os.write(told, ("%s\\n" % error).encode())
                os._exit(1)
            if child == 0:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                for file in (told, *files):
                    os.close(file)
                sys.stdin = open(0, closefd=False)  # the old one may have read further requests
                return wanted
            for file in files:
                os.close(file)
            os.write(told, b"%d\\n" % child)
            os.write(told, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
    os._exit(0)

gc.freeze()  # what is there stays: looking through it again as a child ends takes a second
old = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
wanted = asked()
os.chdir(wanted["folder"])
os.environ.clear()
os.environ.update(wanted["env"])
if os.environ.get("PYTHONFAULTHANDLER"):
    faulthandler.enable()
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
_servers: dict[tuple[str, ...], subprocess.Popen] = {}
_lock = threading.Lock()


def python(*arguments, cwd=None, env=None, timeout=None, imports=()) -> subprocess.CompletedProcess:
    """What ``python ARGUMENTS`` prints, and how it ends: ``-c CODE``, ``-m MODULE`` or a file, and their arguments.

    Args:
        cwd: where it runs. Default: here.
        env: its environment. Default: ours.
        timeout: seconds after which it is killed, and subprocess.TimeoutExpired raised.
        imports: modules that it begins with beside torch.
    """
    command = [sys.executable, *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start(command, imports, cwd=cwd, env=env, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(command, code, out.read().decode(), err.read().decode())


class Forked:
    """Such a process, with what subprocess.Popen has: a command that begins with ours, and PIPE or files as there."""

    def __init__(self, command, imports, cwd=None, env=None, stdin=None, stdout=None, stderr=None):
        assert command[0] == sys.executable
        theirs, files, pipes = [], [], []
        for number, given in enumerate((stdin, stdout, stderr)):
            pipes.append(None)
            if given == subprocess.PIPE:
                end, own = os.pipe() if number == 0 else reversed(os.pipe())
                pipes[-1] = os.fdopen(own, "rb" if number else "wb")
                theirs.append(end)
                given = end
            elif given == subprocess.STDOUT:
                files.append(files[-1])
                continue
            files.append(os.devnull if given is None else _path(given))
        self.stdin, self.stdout, self.stderr = pipes
        self.returncode: int | None = None
        told, tells = os.pipe()
        self._told = os.fdopen(told)
        wanted = {"arguments": [str(part) for part in command[1:]], "folder": str(cwd or os.getcwd()), "files": files}
        wanted |= {"env": dict(os.environ if env is None else env), "told": _path(tells)}
        with _lock:
            server = _server(tuple(imports))
            server.stdin.write(json.dumps(wanted) + "\n")
            server.stdin.flush()
            self.pid = self._begun(server)
        for end in (*theirs, tells):
            os.close(end)

    def _begun(self, server: subprocess.Popen) -> int:
        """Its number, once it is there."""
        while not select.select([self._told], [], [], 1)[0]:
            if server.poll() is not None:
                raise RuntimeError(
                    f"expected a process to fork from, but it ended with {server.returncode}: {server.args[3:]}"
                )
        told = self._told.readline().strip()
        if not told.isdecimal():
            raise RuntimeError(f"no process began: {told}")
        return int(told)

    def wait(self, timeout=None) -> int:
        """Its exit status; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = int(self._told.readline())
            self._told.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it by force."""
        self.send_signal(signal.SIGKILL)


def start(command, imports=(), **options) -> Forked | subprocess.Popen:
    """Such a process, with subprocess.Popen's options; what it prints is not shown by default.

    An ordinary one where the environment has what only a process's start reads: libraries to preload, malloc's settings.
    """
    env = options.get("env") or os.environ
    forks = FORKS and not any(
        env.get(name) != os.environ.get(name) for name in env if name.startswith(("LD_", "MALLOC_"))
    )
    return Forked(command, imports, **options) if forks else subprocess.Popen(command, **options)


def _path(file) -> str:
    """Of an open file or pipe, for other processes."""
    return f"/proc/{os.getpid()}/fd/{file if isinstance(file, int) else file.fileno()}"


def _server(imports: tuple[str, ...]) -> subprocess.Popen:
    if imports not in _servers or _servers[imports].poll() is not None:
        command = [sys.executable, "-c", SERVER, *imports]
        _servers[imports] = server = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        atexit.register(server.communicate)  # it ends where its stdin does
    return _servers[imports]
