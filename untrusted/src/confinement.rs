//! What the daemon may still do once it is set up: a hostile enclave that takes it over finds a
//! process that can serve host files and nothing else.
//!
//! Three walls, each as high as the kernel has it: Landlock (Linux 5.13) leaves the files and
//! directories that the operator allowed, no TCP (6.7) and no abstract sockets or signals to
//! others (6.12); a seccomp filter leaves the calls that serving needs, no new program, no new
//! process, no new executable memory; of the capabilities none stays, but to root CAP_DAC_OVERRIDE,
//! if it was there: a daemon of root serves other users' files.
//!
//! Holds: everything applies to the calling thread and to what it starts later, so it is set up
//! before the first lane; nothing here is needed by what was opened before. A call outside the
//! filter answers `EPERM`.

use std::collections::BTreeMap;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::daemon::Options;
use crate::engine::{Interface, now_ns};
use crate::problem::log;

/// The newest Landlock whose rights are asked for; an older kernel gives what it has.
const LANDLOCK: ABI = ABI::V6;

/// What a program that serves files on descriptors, sockets and threads calls.
const CALLS: &[i64] = &[
    // Files.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_open,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_preadv2,
    libc::SYS_lseek,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fcntl,
    libc::SYS_dup,
    // Native AIO.
    libc::SYS_io_setup,
    libc::SYS_io_destroy,
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    // Connections that were accepted; none is made.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_membarrier,
    libc::SYS_getrandom,
    libc::SYS_getrlimit,
    libc::SYS_prlimit64,
    libc::SYS_uname,
    libc::SYS_geteuid,
    // To see whether clone3 is there; see `NO_SUCH_CALL`.
    libc::SYS_clone3,
];

/// What the io_uring engine calls beside. A filter sees no request in a ring: Landlock is what
/// remains then of the wall around files and connections.
const URING: &[i64] =
    &[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// Its argument lies in memory, where a filter cannot look: told to be missing, so that clone(2)
/// is taken, which a filter can judge.
const NO_SUCH_CALL: [i64; 1] = [libc::SYS_clone3];

/// bpf(2) commands that read what was loaded before: `BPF_MAP_LOOKUP_ELEM`,
/// `BPF_OBJ_GET_INFO_BY_FD`.
const BPF_READS: [u64; 2] = [1, 15];

/// Confines the calling thread and all that it starts. What the kernel does not have is said and
/// left out.
pub fn confine(options: &Options, interface: Interface) {
    let without = |wall: &str, why: &dyn std::fmt::Display| {
        let remedy = "the daemon runs with the rights of its user there; use a newer kernel";
        log(format_args!("{wall} is not in force ({why})"), "this process", remedy);
    };
    // The first look at the clock finds the kernel's function in this process, by a call that the
    // filter refuses: a later one would have each look be a system call.
    let _ = now_ns();
    if let Err(e) = drop_capabilities() {
        without("the drop of capabilities", &e);
    }
    match restrict_paths(options) {
        Ok(RulesetStatus::NotEnforced) => without("Landlock", &"this kernel does not have it"),
        Ok(_) => {}
        Err(e) => without("Landlock", &e),
    }
    if let Err(e) = filter_calls(interface) {
        without("the filter of system calls", &e);
    }
}

fn drop_capabilities() -> rustix::io::Result<()> {
    let now = rustix::thread::capabilities(None)?;
    let root = rustix::process::geteuid().is_root();
    let wanted = if root { CapabilitySet::DAC_OVERRIDE } else { CapabilitySet::empty() };
    let keep = wanted & now.permitted;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: keep & now.effective,
            permitted: keep,
            inheritable: CapabilitySet::empty(),
        },
    )
}

fn restrict_paths(options: &Options) -> Result<RulesetStatus, RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    let file = AccessFs::ReadFile | AccessFs::WriteFile;
    for pair in &options.files {
        // Checked when the catalogue was made.
        if let Some((_, path)) = pair.to_str().and_then(|pair| pair.split_once('=')) {
            rules = allow(rules, Path::new(path), file)?;
        }
    }
    for root in &options.roots {
        rules = allow(rules, root, file)?;
    }
    let make = AccessFs::ReadDir | AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::Truncate;
    for pair in &options.directories {
        if let Some((_, path)) = pair.to_str().and_then(|pair| pair.split_once('=')) {
            rules = allow(rules, Path::new(path), file | make)?;
        }
    }
    // The number of processors, to read the probes' maps, and what the probes cost.
    for facts in ["/sys/devices/system/cpu", "/proc/self/fdinfo"] {
        rules = allow(rules, Path::new(facts), AccessFs::ReadFile.into())?;
    }
    // The control socket goes at the end; so may what else lies there.
    let socket = options.socket.parent().filter(|parent| !parent.as_os_str().is_empty());
    rules = allow(rules, socket.unwrap_or(Path::new(".")), AccessFs::RemoveFile.into())?;
    Ok(rules.restrict_self()?.ruleset)
}

/// Allows `access` to `path` and what is beneath. What is not there yet may come later under that
/// name: then its directory is allowed.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let missing = |e: &dyn std::fmt::Display| {
        log(
            format_args!("not there yet ({e}), so all of its directory is open to this process"),
            path.display(),
            "put it there before posternd starts",
        );
    };
    let place = PathFd::new(path).or_else(|e| {
        missing(&e);
        PathFd::new(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
    });
    match place {
        Ok(place) => rules.add_rule(PathBeneath::new(place, access)),
        Err(_) => Ok(rules),
    }
}

fn filter_calls(interface: Interface) -> Result<(), Box<dyn std::error::Error>> {
    let errno = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
    // First, because the other one lets no further filter in.
    let missing = NO_SUCH_CALL.into_iter().map(|call| (call, Vec::new())).collect();
    apply(missing, SeccompAction::Allow, errno(libc::ENOSYS))?;
    apply(rules(interface)?, errno(libc::EPERM), SeccompAction::Allow)
}

fn apply(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<(), Box<dyn std::error::Error>> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let program: seccompiler::BpfProgram =
        SeccompFilter::new(rules, otherwise, listed, arch)?.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

fn rules(
    interface: Interface,
) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let more = if interface == Interface::Uring { URING } else { &[] };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().chain(more).map(|call| (*call, Vec::new())).collect();
    let argument = |number, how, value| {
        let condition = SeccompCondition::new(number, SeccompCmpArgLen::Dword, how, value)?;
        SeccompRule::new(vec![condition])
    };
    // Only threads.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![argument(0, SeccompCmpOp::MaskedEq(thread), thread)?]);
    // No memory that can be executed.
    let execute = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![argument(2, execute.clone(), 0)?]);
    }
    // A thread's name.
    let name = argument(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?;
    rules.insert(libc::SYS_prctl, vec![name]);
    let reads = BPF_READS.into_iter().map(|command| argument(0, SeccompCmpOp::Eq, command));
    rules.insert(libc::SYS_bpf, reads.collect::<Result<_, _>>()?);
    Ok(rules)
}
