//! `--no-host-writes`: the program changes nothing on the host's file systems, whatever it tries.
//! `--no-host-files`: it reads nothing there either.
//!
//! Landlock refuses each way to make, write, cut, rename or remove a file or directory outside the
//! paths that the operator lists; a seccomp filter refuses the calls that change what Landlock does
//! not look at: modes, owners, times, extended attributes, mounts. Both are the kernel's own walls:
//! they hold for system call instructions of the program's own, for static programs and for every
//! child, and nobody takes them off.
//!
//! Holds: bytes of the program reach the host's file systems through the port alone, through listed
//! paths, and through descriptors that it was started with (standard output).
//! With `--no-host-files` no content and no list of names comes from there, but from what a program
//! cannot start without (its own file, libraries, its keys, /proc) and what the operator lists.
//! Does not hold: other ways out of a program that is not an enclave: the network, and sockets of
//! other programs. Whether a path exists, and its attributes, can always be asked: Landlock does not
//! look at that.

use std::{
    collections::BTreeMap,
    fmt::Display,
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use landlock::{
    ABI, AccessFs, BitFlags, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetError, RulesetStatus,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::error::{Exit, Failure};

/// Landlock with every right that changes a file system: since Linux 6.2.
const LANDLOCK: ABI = ABI::V3;

/// Devices that keep nothing.
const DEVICES: [&str; 6] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

/// Where the dynamic linker finds libraries, and what tells it so.
const LIBRARIES: [&str; 7] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
];

/// What the simulated enclave and the C library ask of the kernel.
const KERNEL: [&str; 2] = ["/proc", "/sys/devices/system/cpu"];

/// fchmodat2(2) and later calls, whose numbers are the same on all architectures.
const FCHMODAT2: i64 = 452;
const SETXATTRAT: i64 = 463;
const REMOVEXATTRAT: i64 = 466;
const FILE_SETATTR: i64 = 469;

/// What changes a file system and Landlock does not look at.
const REFUSED: [i64; 37] = [
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    FCHMODAT2,
    libc::SYS_chown,
    libc::SYS_fchown,
    libc::SYS_lchown,
    libc::SYS_fchownat,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    SETXATTRAT,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    REMOVEXATTRAT,
    FILE_SETATTR,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
];

/// What a program may read of the host.
pub struct Reads<'a> {
    /// Files without which it could not start: its own, the enclave's library, the run's, keys.
    pub needed: Vec<PathBuf>,
    /// What the operator lists.
    pub let_read: &'a [PathBuf],
}

/// Walls that are ready to be put around a program.
pub struct Seal {
    rules: RulesetCreated,
    filter: BpfProgram,
}

impl Seal {
    /// Walls that let the program write beneath `writes` and nowhere else, and read anywhere, or
    /// what `reads` says and what it may write.
    ///
    /// # Errors
    /// [`Exit::Internal`] on a kernel without them; [`Exit::Usage`] for a path that is not there.
    pub fn make(writes: &[PathBuf], reads: Option<&Reads<'_>>) -> Result<Self, Failure> {
        let filter = filter().map_err(|e| impossible(&e))?;
        Ok(Self { rules: rules(writes, reads)?, filter })
    }

    /// Has the program that `command` starts walled in right before it becomes itself.
    pub fn install_in(self, command: &mut Command) {
        let Self { rules, filter } = self;
        let mut rules = Some(rules);
        // SAFETY: 1. Between fork and exec: system calls on what was made before; nothing
        //    allocates unless it fails, and then the program does not start.
        unsafe {
            command.pre_exec(move || {
                let rules = rules.take().ok_or(io::ErrorKind::Unsupported)?;
                let status = rules.restrict_self().map_err(io::Error::other)?;
                if status.ruleset != RulesetStatus::FullyEnforced {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                seccompiler::apply_filter(&filter).map_err(io::Error::other)
            });
        }
    }
}

fn impossible(why: &dyn Display) -> Failure {
    Failure::new(
        Exit::Internal,
        format_args!("the wall around the program can not be enforced ({why})"),
        "this kernel",
        "use Linux 6.2 or later with Landlock and seccomp, or run without the option",
    )
}

fn filter() -> Result<BpfProgram, Box<dyn std::error::Error>> {
    let refused: BTreeMap<_, _> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let eperm = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(refused, SeccompAction::Allow, eperm, architecture)?.try_into()?)
}

fn rules(writes: &[PathBuf], reads: Option<&Reads<'_>>) -> Result<RulesetCreated, Failure> {
    let (write, read) = (AccessFs::from_write(LANDLOCK), AccessFs::from_read(LANDLOCK));
    let handled = if reads.is_some() { write | read } else { write };
    let made = || -> Result<RulesetCreated, RulesetError> {
        Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(handled)?
            .create()
    };
    let rules = made().map_err(|e| impossible(&e))?;
    let mut rules = Rules { rules, handled };
    for device in DEVICES {
        rules.allow_if_there(Path::new(device), AccessFs::WriteFile | AccessFs::ReadFile)?;
    }
    for path in writes {
        rules.allow(path, write | read, "--allow-write")?;
    }
    if let Some(Reads { needed, let_read }) = reads {
        let fixed = LIBRARIES.iter().chain(&KERNEL).map(Path::new);
        for path in fixed.chain(needed.iter().map(PathBuf::as_path)) {
            rules.allow_if_there(path, read)?;
        }
        for path in *let_read {
            rules.allow(path, read, "--let-read")?;
        }
    }
    Ok(rules.rules)
}

/// Rules being made.
struct Rules {
    rules: RulesetCreated,
    handled: BitFlags<AccessFs>,
}

impl Rules {
    /// Allows `access`, as far as it means anything there, to a path and what is beneath.
    fn allow(
        &mut self,
        path: &Path,
        access: BitFlags<AccessFs>,
        option: &str,
    ) -> Result<(), Failure> {
        let place = PathFd::new(path).map_err(|error| {
            Failure::new(
                Exit::Usage,
                format_args!("what {option} names can not be opened ({error})"),
                path.display(),
                "name a file or directory that exists",
            )
        })?;
        let access = access & self.handled;
        let access = if path.is_dir() { access } else { access & AccessFs::from_file(LANDLOCK) };
        (&mut self.rules)
            .add_rule(PathBeneath::new(place, access))
            .map(drop)
            .map_err(|e| impossible(&e))
    }

    /// The same for what need not be there.
    fn allow_if_there(&mut self, path: &Path, access: BitFlags<AccessFs>) -> Result<(), Failure> {
        if path.exists() { self.allow(path, access, "the run") } else { Ok(()) }
    }
}
