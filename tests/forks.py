"""A process that imports modules once and runs each script in a fork of itself.

Importing vLLM or PEFT takes ten seconds, which several tests in one file would otherwise all spend.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SERVER = """
import json, os, sys, traceback
{imports}
for line in sys.stdin:
    script, arguments, variables, output = json.loads(line)
    if not (process := os.fork()):
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
        os.dup2(1, 2)
        os.environ.update(variables)
        sys.argv[1:] = arguments
        status = 0
        try:
            exec(script, {{"__name__": "__main__"}})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
os._exit(0)  # without the garbage collection at exit, which takes seconds
"""


@dataclass(frozen=True)
class Forks:
    """Runs scripts, each in a new process in which the imports are already done.

    Attributes:
        server: the process that is forked.
        output: file that gets what a script prints.
    """

    server: subprocess.Popen[str]
    output: Path

    def run(self, script: str, *arguments: str, **variables: str) -> str:
        """Run a script with arguments and environment variables, and return what it prints. Fail if it raises."""
        assert self.server.stdin
        assert self.server.stdout
        request = json.dumps([script, arguments, variables, str(self.output)])
        print(request, file=self.server.stdin, flush=True)
        status = self.server.stdout.readline().strip()
        printed = self.output.read_text("utf-8")
        assert status == "0", printed
        return printed


@contextmanager
def forking(imports: str, folder: Path) -> Iterator[Forks]:
    """Start a process that has run the given import statements, and stop it at the end."""
    command = [sys.executable, "-c", _SERVER.format(imports=imports)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe) as server:
        yield Forks(server, folder / "printed.txt")
        assert server.stdin
        server.stdin.close()
