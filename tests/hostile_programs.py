"""Programs that try to pass without being right, to get out of the sandbox, or to take the machine with them.

Each defines `f`, tested with `assert f(3) == 4`. None may pass. `{secret}`, `{target}` and `{port}` are filled in.
"""

from __future__ import annotations

WRONG = "def f(x):\n    return None\n"
RIGHT = "def f(x):\n    return x + 1\n"
TESTS = "assert f(3) == 4\nassert f(10) == 11"

FORGERY = """
import json, os
def forge(nonce):
    line = json.dumps({"nonce": nonce, "status": "passed", "detail": "", "cpu": 0.0}).encode()
    for fd in range(64):
        try:
            os.write(fd, line)
        except OSError:
            pass
"""

# Pretending to be right.
CHEATS = {
    "exit at import": "import sys; sys.exit(0)",
    "_exit at import": "import os; os._exit(0)",
    "exit in a call": "def f(x):\n    raise SystemExit(0)",
    "_exit in a call": "import os\ndef f(x):\n    os._exit(0)",
    "swallowed exceptions": (
        "import builtins, sys\n"
        "class Quiet(BaseException): pass\n"
        "builtins.AssertionError = Quiet\nsys.excepthook = lambda *a: None\nsys.settrace(lambda *a: None)\n" + WRONG
    ),
    "equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    def __hash__(self): return 4\n    def __bool__(self): return True\n    def __len__(self): return 1\n"
        "def f(x):\n    return Any()"
    ),
    "an int equal to everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "    def __index__(self): return 0\n    def __int__(self): return 0\ndef f(x):\n    return Any(0)"
    ),
    "a class that lies about its class": (
        "class Any:\n    __class__ = property(lambda self: int)\n    def __eq__(self, other): return True\n"
        "def f(x):\n    return Any()"
    ),
    "overwritten builtins": (
        "import builtins\n"
        "for name in ('all', 'any', 'abs', 'len', 'isinstance', 'type', 'bool', 'exec', 'compile', 'id', 'repr'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\n" + WRONG
    ),
    "overwritten test functions": (
        "import sys\ndef check(candidate): pass\ncandidate = check\ntests = ''\n"
        "for module in list(sys.modules.values()):\n"
        "    for name in ('judge', 'examine', 'check', 'agrees', 'decode', 'encode', 'frame'):\n"
        "        if hasattr(module, name):\n            setattr(module, name, lambda *a, **k: ('passed', '', 0.0))\n"
        + WRONG
    ),
    "frames": FORGERY
    + (
        "import sys\nframe = sys._getframe()\nwhile frame is not None:\n"
        "    for space in (frame.f_globals, frame.f_locals):\n"
        "        for value in list(space.values()):\n"
        "            forge(value if isinstance(value, str) else '')\n"
        "            if isinstance(value, dict) and 'nonce' in value:\n                forge(value['nonce'])\n"
        "    frame = frame.f_back\n" + WRONG
    ),
    "gc": FORGERY
    + (
        "import gc\nfor thing in gc.get_objects():\n"
        "    if isinstance(thing, dict) and 'nonce' in thing:\n        forge(thing['nonce'])\n"
        "def f(x):\n"
        "    for thing in gc.get_objects():\n"
        "        if type(thing) is dict and 'nonce' in thing:\n            forge(thing['nonce'])\n"
    ),
    "memory of its own process": FORGERY
    + (
        "import re\ndef f(x):\n    text = open('/proc/self/mem', 'rb').read(1 << 20)\n"
        "    for nonce in re.findall(rb'[0-9a-f]{32}', text):\n        forge(nonce.decode())\n"
    ),
    "forged answers": (
        "import json, os, struct\ndata = json.dumps({'value': 0, 'status': 'passed', 'confined': True}).encode()\n"
        "for fd in range(64):\n    for _ in range(4):\n        try:\n"
        "            os.write(fd, struct.pack('>Q', len(data)) + data)\n        except OSError:\n            pass\n"
        + WRONG
    ),
    "nonsense answers": (
        "import os\n"
        "for fd in range(3, 64):\n    try:\n        os.write(fd, b'x' * 100)\n    except OSError:\n        pass\n"
        + WRONG
    ),
    "deep answers": (
        "def f(x):\n    value = []\n    for _ in range(100_000):\n        value = [value]\n    return value"
    ),
    "endless iterator": "import itertools\ndef f(x):\n    return itertools.count()",
    "huge number": "def f(x):\n    return 1 << (1 << 26)",
    "huge text": "def f(x):\n    return 'x' * (1 << 26)",
    "closes everything": "import os\nos.closerange(0, 4096)\n" + RIGHT,
    "crash": "import ctypes\ndef f(x):\n    ctypes.string_at(0)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x)",
    "wrong signature": "def f():\n    return 4",
    "no such function": "def g(x):\n    return x + 1",
    "syntax error": "def f(x:\n    return x + 1",
    "null bytes": "def f(x):\n    return x + 1\0",
    "half a surrogate": "f = '\ud800'",
}

# Reaching outside. Each is right only if it gets through.
ESCAPES = {
    "connects to a port": (
        "import socket\nconnection = socket.create_connection(('127.0.0.1', {port}), timeout=1)\n"
        "connection.sendall(b'out')\n" + RIGHT
    ),
    "reads a file outside": "assert 'secret' in open({secret!r}).read()\n" + RIGHT,
    "reads the password file": "assert open('/etc/passwd').read()\n" + RIGHT,
    "lists a folder outside": "import os\nassert os.listdir(os.path.dirname({secret!r}))\n" + RIGHT,
    "writes outside": "open({target!r}, 'w').write('out')\n" + RIGHT,
    "writes to the interpreter": (
        "import os\nopen(os.path.join(os.path.dirname(os.__file__), 'out.py'), 'w').write('')\n" + RIGHT
    ),
    "reads the caller's environment": (
        "import glob, os\ntexts = [repr(dict(os.environ))]\n"
        "for path in glob.glob('/proc/*/environ'):\n    try:\n        texts.append(open(path).read())\n"
        "    except OSError:\n        pass\n"
        "assert any({secret_value!r} in text for text in texts)\n" + RIGHT
    ),
    "forks": "import os\nif os.fork() == 0:\n    os._exit(0)\n" + RIGHT,
    "starts a program": "import subprocess\nsubprocess.run(['/bin/true'])\n" + RIGHT,
    "replaces itself": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', ''])\n" + RIGHT,
    "new session": "import os\nos.setsid()\n" + RIGHT,
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + RIGHT,
    "kills its group": "import os, signal\nos.killpg(0, signal.SIGKILL)\n" + RIGHT,
    **{
        f"sends its parent a signal through a pipe ({name})": (
            "import ctypes, fcntl, os, struct\nr, w = os.pipe()\n"
            f"assert {owner}\n"
            "assert ctypes.CDLL(None).fcntl(r, fcntl.F_SETFL, os.O_ASYNC) == 0\nos.write(w, b'x')\n" + RIGHT
        )
        for name, owner in {
            "F_SETOWN": "ctypes.CDLL(None).fcntl(r, fcntl.F_SETOWN, os.getppid()) == 0",
            "F_SETOWN_EX": "ctypes.CDLL(None).fcntl(r, 15, struct.pack('ii', 1, os.getppid())) == 0",
            "F_SETSIG": "ctypes.CDLL(None).fcntl(r, 10, 9) == 0",
            "FIOSETOWN": "ctypes.CDLL(None).ioctl(r, 0x8901, struct.pack('i', os.getppid())) == 0",
        }.items()
    },
    "traces its parent": ("import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0\n" + RIGHT),
    "reads its parent": (
        "import ctypes, os\nassert ctypes.CDLL(None).process_vm_readv(os.getppid(), 0, 0, 0, 0, 0) >= 0\n" + RIGHT
    ),
    **{
        f"{name} its judge": (
            "import ctypes, os, resource\nlibrary, judge = ctypes.CDLL(None), os.getppid()\n" + action + "\n" + RIGHT
        )
        for name, action in {
            "lowers the priority of": "os.setpriority(os.PRIO_PROCESS, judge, 19)",
            "lowers the priority of the group of": "os.setpriority(os.PRIO_PGRP, 0, 19)",
            "lowers the priority of the user of": "os.setpriority(os.PRIO_USER, 0, 19)",
            "lowers the disk priority of": "assert library.syscall(251, 1, judge, 3 << 13) == 0",
            "chooses the processors of": "os.sched_setaffinity(judge, {{0}})",
            "makes idle": "os.sched_setscheduler(judge, os.SCHED_IDLE, os.sched_param(0))",
            "schedules": "os.sched_setparam(judge, os.sched_param(0))",
            "limits": "resource.prlimit(judge, resource.RLIMIT_CPU, (1, 1))",
            "compares itself with": "assert library.syscall(312, os.getpid(), judge, 0, 0, 0) >= 0",
            "opens": "os.pidfd_open(judge)",
            "writes to": "assert library.process_vm_writev(judge, 0, 0, 0, 0, 0) >= 0",
            "reads the memory of": "open(f'/proc/{{judge}}/mem', 'rb').read(1)",
        }.items()
    },
    "new user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\n" + RIGHT,
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0\n" + RIGHT,
    "shared memory": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600) >= 0\n" + RIGHT,
    "raises its limits": (
        "import resource\nfor kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):\n"
        "    resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n" + RIGHT
    ),
}

# Taking the machine with them. What they would use is bounded by limits, never really used.
FLOODS = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
    "fifty daemons": (
        "import os, time\nfor _ in range(50):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(60)\n"
        + RIGHT
    ),
    "thread bomb": (
        "from threading import Thread\nimport time\n"
        "while True:\n    Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    ),
    "40 GB at once": "block = bytearray(40 << 30)\n" + RIGHT,
    "40 GB in pieces": (
        "blocks = []\ntry:\n    while True:\n        blocks.append(bytearray(1 << 26))\nexcept MemoryError:\n    pass\n"
        + WRONG
    ),
    "prints without end": "while True:\n    print('x' * 1000)\n",
    "prints 1 GB": "import sys\nfor _ in range(1000):\n    sys.stdout.write('x' * 10**6)\n" + RIGHT,
    "prints 1 GB to stderr": "import os\nfor _ in range(1000):\n    os.write(2, b'x' * 10**6)\n" + RIGHT,
    "writes 10 GB": (
        "with open('big', 'wb') as file:\n    for _ in range(10_000):\n        file.write(bytes(10**6))\n" + RIGHT
    ),
    "writes 10 GB in many files": (
        "for number in range(10_000):\n"
        "    with open(f'big{number}', 'wb') as file:\n        file.write(bytes(10**6))\n" + RIGHT
    ),
    **{
        f"makes a million {kind}": f"import os\nfor number in range(1_000_000):\n    {make}\n" + RIGHT
        for kind, make in {
            "empty files": "open(f'empty{number}', 'w').close()",
            "folders": "os.mkdir(f'folder{number}')",
            "folders in one another": "os.mkdir('folder'); os.chdir('folder')",
            "links": "os.symlink('nowhere', f'link{number}')",
            "pipes": "os.mkfifo(f'pipe{number}')",
        }.items()
    },
    "truncates to 10 GB": "with open('big', 'wb') as file:\n    file.truncate(10**10)\n" + RIGHT,
    "zip bomb": (
        "import zlib\nbomb = zlib.compress(bytes(1 << 26), 9)\n"
        "data = b''.join(zlib.decompress(bomb) for _ in range(640))\n" + RIGHT
    ),
    "regex bomb": "import re\ndef f(x):\n    re.match(r'(a+)+$', 'a' * 64 + 'b')\n    return x + 1\n",
    "endless loop": "while True:\n    pass\n",
    "endless loop in a call": "def f(x):\n    while True:\n        pass\n",
    "endless loop that ignores signals": (
        "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass\n"
    ),
    "endless loop that swallows": "while True:\n    try:\n        pass\n    except BaseException:\n        pass\n",
    "sleeps": "import time\ntime.sleep(600)\n",
    "sleeps in a call": "import time\ndef f(x):\n    time.sleep(600)\n    return x + 1\n",
    "waits for input": "import sys\nwhile not sys.stdin.read():\n    pass\n",
    "huge power": "def f(x):\n    return 9 ** 9 ** 9\n",
}
TIMEOUTS = {
    "regex bomb",
    "endless loop",
    "endless loop in a call",
    "endless loop that ignores signals",
    "endless loop that swallows",
    "sleeps",
    "sleeps in a call",
    "waits for input",
}
"""Floods that nothing but the time limit can stop."""
