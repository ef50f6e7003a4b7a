"""What a conversion child gives up before it touches an uploaded file. Linux; elsewhere less.

Each measure is tried on its own and reported, because what a host or a container allows differs:

    no_new_privileges     prctl: no set-uid program can raise the child again
    capabilities_dropped  capset: root in a container keeps its uid but none of its powers
    memory_limit          RLIMIT_DATA, counted from what the fresh child already holds
    cpu_limit             RLIMIT_CPU
    file_size_limit       RLIMIT_FSIZE
    descriptor_limit      RLIMIT_NOFILE: pipes and files hold memory that no other limit counts
    files_confined        landlock: no write, creation or removal outside the scratch folder, only
                          plain files and folders in it; if asked, no reading of data elsewhere
    system_calls_filtered seccomp: no sockets, programs, processes, signals to others, ptrace, ...

RLIMIT_AS would count what torch only maps (libraries, reserved arenas, a checkpoint mapped from
its file), several times what it uses; RLIMIT_DATA counts private writable memory. RLIMIT_NPROC is
left alone: it counts the whole user and makes OpenMP abort.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib
import os
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446
_FILE_RIGHTS = 0b110 | 1 << 14  # read, write, truncate: all others are rights on folders
# Not all of /dev and /proc: root without its powers still owns the disks' device files.
_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/sys/devices/system"),
    *("/sys/fs/cgroup", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys"),
    *("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"),
)
_MAX_DESCRIPTORS = 256
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
_FIOSETOWN, _SIOCSPGRP = 0x8901, 0x8902
_CLONE_THREAD = 0x00010000
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_IDLE = 3 << 13
_CPU_GRACE_SECONDS = 5  # from SIGXCPU, which tells the reason, to SIGKILL, which cannot be ignored

FEATURES = (
    "no_new_privileges",
    "capabilities_dropped",
    "memory_limit",
    "cpu_limit",
    "file_size_limit",
    "descriptor_limit",
    "files_confined",
    "system_calls_filtered",
)

_DENIED = (
    # network
    *("socket", "socketpair", "connect", "bind", "listen", "accept", "accept4"),
    # other programs and processes
    *("execve", "execveat", "fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev"),
    *("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open", "pidfd_getfd"),
    *("pidfd_send_signal", "kcmp", "setns", "unshare", "process_madvise", "process_mrelease"),
    *("migrate_pages", "move_pages", "get_robust_list"),
    # priorities: its own is set by now, and the same user's other processes are the service
    *("setpriority", "sched_setscheduler", "sched_setparam", "sched_setattr", "ioprio_set"),
    # memory that no limit counts, and ways to talk to other processes
    *("memfd_create", "memfd_secret", "shmget", "shmat", "shmctl", "msgget", "msgsnd", "msgrcv"),
    *("semget", "semop", "mq_open", "mq_unlink"),
    # links, by which the service could be led to other files
    *("symlink", "symlinkat", "link", "linkat"),
    # file metadata, which landlock does not cover
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
    *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
    # the system
    *("mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsmount"),
    *("fsconfig", "fspick", "mount_setattr", "fanotify_init", "name_to_handle_at", "syslog"),
    *("mknod", "mknodat", "open_by_handle_at", "quotactl", "acct", "swapon", "swapoff", "reboot"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "bpf"),
    *("perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "personality"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "settimeofday", "clock_settime"),
    *("adjtimex", "clock_adjtime"),
    *("sethostname", "setdomainname", "iopl", "ioperm", "modify_ldt", "lookup_dcookie", "vhangup"),
)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent goes."""
    with contextlib.suppress(OSError):
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def step_back() -> None:
    """Run only when nothing else wants to: SCHED_IDLE, and the idle class of disk access.

    A process of that policy is put aside at once when any other wakes up, so that inference on the
    same cores waits for nothing. Each is left out where the kernel refuses it.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError, KeyError):
        number = _IOPRIO_SET[os.uname().machine]
        _syscall(number, ctypes.c_int(1), ctypes.c_int(0), ctypes.c_int(_IOPRIO_IDLE))


def confine(
    scratch: Path,
    *,
    memory_bytes: int,
    cpu_seconds: int,
    file_bytes: int,
    readable: Sequence[Path] | None = None,
) -> dict[str, bool]:
    """Confine this process for good; returns which of `FEATURES` are active.

    `scratch` is where it may still write, `readable` are the files and folders that it may read
    beside the system's and Python's own (None: everything). `memory_bytes` of private memory may
    be added to what the process has now; `cpu_seconds` of all its threads together end it with
    SIGXCPU; `file_bytes` is the longest file it may write.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    active = dict.fromkeys(FEATURES, False)
    steps = {
        "memory_limit": lambda: _limit(resource.RLIMIT_DATA, _data_bytes() + memory_bytes),
        "cpu_limit": lambda: _limit(resource.RLIMIT_CPU, cpu_seconds, grace=_CPU_GRACE_SECONDS),
        "file_size_limit": lambda: _limit(resource.RLIMIT_FSIZE, file_bytes),
        "descriptor_limit": lambda: _limit(resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS),
        "no_new_privileges": lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1),
        "files_confined": lambda: _confine_files(scratch, readable),
        "capabilities_dropped": _drop_capabilities,
        "system_calls_filtered": _filter_system_calls,
    }
    for name, step in steps.items():
        # OSError: the kernel says no; ImportError and AttributeError: the library is not there.
        with contextlib.suppress(OSError, ImportError, AttributeError, ValueError):
            step()
            active[name] = True
    return active


def _limit(kind: int, value: int, grace: int = 0) -> None:
    hard = resource.getrlimit(kind)[1]
    most = value + grace if hard == resource.RLIM_INFINITY else min(value + grace, hard)
    resource.setrlimit(kind, (min(value, most), most))


def _data_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError(errno.ENOSYS, "no VmData in /proc/self/status")


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _syscall(number: int, *arguments: object) -> int:
    return _check(_libc().syscall(ctypes.c_long(number), *arguments))


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc().prctl(option, ctypes.c_ulong(value), zero, zero, zero))


def _drop_capabilities() -> None:
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    nothing = ctypes.create_string_buffer(24)  # effective, permitted, inheritable, twice 32 bits
    _check(_libc().capset(header, nothing))


def _confine_files(scratch: Path, readable: Sequence[Path] | None) -> None:
    """landlock (kernel 5.13 and later): handle every right that changes files, grant it below
    `scratch` alone, and likewise the rights to read. From version 4 of the interface it also takes
    away TCP, from version 6 signals and abstract sockets across its border; it always takes away
    looking into processes outside. See the kernel's userspace-api/landlock document.
    """
    version = _syscall(_SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    write_file, truncate = 1 << 1, 1 << 14
    special = 0b1111001 << 6  # make devices, sockets, pipes and links: who reads them is misled
    changes = write_file | 0x1FF0  # remove and make, every kind
    changes |= 1 << 13 if version >= 2 else 0  # link or rename between folders
    changes |= truncate if version >= 3 else 0
    network, scopes = (0b11 if version >= 4 else 0), (0b11 if version >= 6 else 0)
    fields = 3 if version >= 6 else 2 if version >= 4 else 1
    grants = [(scratch, changes & ~special), (Path("/dev/null"), write_file | truncate)]
    handled = changes
    if readable is not None:
        read_file, read_folder = 1 << 2, 1 << 3
        handled |= read_file | read_folder
        grants += [(path, read_file | read_folder) for path in (scratch, *readable, *_system())]
        grants += [(Path(entry or "."), read_folder) for entry in sys.path]  # imports list these
    attributes = struct.pack("=3Q", handled, network, scopes)[: 8 * fields]
    rules = _syscall(
        _SYS_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)
    )
    try:
        for path, rights in grants:
            if not path.exists():
                continue
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                of_files = handled if path.is_dir() else _FILE_RIGHTS & handled
                rule = struct.pack("=Qi", rights & of_files, place)
                _syscall(_SYS_LANDLOCK_ADD, ctypes.c_int(rules), 1, rule, ctypes.c_uint(0))
            finally:
                os.close(place)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _syscall(_SYS_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0))
    finally:
        os.close(rules)


@functools.cache
def load_seccomp() -> ModuleType:
    """The library behind the filter. Looking for it may run programs, so it is done early.

    Raises ImportError when libseccomp or its binding is missing.
    """
    try:
        return importlib.import_module("pyseccomp")
    except (RuntimeError, OSError) as error:
        raise ImportError(str(error)) from error


def _system() -> Iterator[Path]:
    """Where Python, its packages, the libraries below and the kernel's own files are."""
    for text in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *_SYSTEM}:
        yield Path(text)
    yield Path(__file__).parents[1]
    for name in ("torch", "pyseccomp"):
        module = sys.modules.get(name)
        if module is not None and module.__file__:
            yield Path(module.__file__).parent


def _filter_system_calls() -> None:
    pyseccomp = load_seccomp()
    refuse = pyseccomp.ERRNO(errno.EPERM)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _DENIED:
        # A call that this architecture or this libseccomp does not know cannot be made by name.
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            rules.add_rule(refuse, name)
    # Threads may be made, processes not. clone3 hides its flags in memory: without it glibc falls
    # back to clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(refuse, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    rules.add_rule(refuse, "tgkill", pyseccomp.Arg(0, pyseccomp.NE, os.getpid()))
    rules.add_rule(refuse, "prlimit64", pyseccomp.Arg(0, pyseccomp.NE, 0))
    rules.add_rule(refuse, "sched_setaffinity", pyseccomp.Arg(0, pyseccomp.NE, 0))
    # A descriptor can be told to signal another process, and with which signal.
    for command in (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX):
        rules.add_rule(refuse, "fcntl", pyseccomp.Arg(1, pyseccomp.EQ, command))
    for command in (_FIOSETOWN, _SIOCSPGRP):
        rules.add_rule(refuse, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, command))
    rules.load()
