"""The command line, one module a command: ``add_arguments(parser)`` and ``run(args) -> exit code``.

Exit codes: 0, all is well; 1, it ran and what it found is not; 2, it could not run, and standard error says why.
"""


class CannotRun(Exception):
    """What a command needs is not there. Its message says what, and what to do; the exit code is 2."""
