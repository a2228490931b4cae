"""Puts the zygote under sandlock's Landlock rules and seccomp filter (argv: settings as JSON).

This process stays outside as the filter's supervisor; the zygote inherits its standard streams.
"""

import json
import os
import sys


def main():
    """Ends with the zygote."""
    settings = json.loads(sys.argv[1])
    from sandlock import Sandbox

    sandbox = Sandbox(
        fs_readable=settings["readable"],
        fs_writable=settings["writable"],
        cwd=settings["workdir"],
        clean_env=True,
        env=settings["environment"],
        max_processes=settings["processes"],
        extra_deny_syscalls=settings["deny"],
    )
    sys.exit(sandbox.run_interactive(settings["command"]))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"guard: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(3)
