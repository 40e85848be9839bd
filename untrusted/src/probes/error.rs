//! Why there are no probes, by who has to act.

use std::fmt;
use std::path::PathBuf;

/// Why the probes can not run. Each says in one line what is wrong and what to do about it.
#[derive(Debug)]
#[non_exhaustive]
pub enum ProbesUnavailable {
    /// The object file with the programs can not be read, or is none.
    Object {
        /// Where it was looked for.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The process lacks privileges.
    NotPermitted {
        /// What was refused.
        what: String,
    },
    /// The kernel does not describe its types.
    NoTypes {
        /// What reading them said.
        reason: std::io::Error,
    },
    /// The file system of the tracepoints is not there and can not be mounted.
    NoTracefs {
        /// What mounting it said.
        reason: std::io::Error,
    },
    /// The kernel lacks something that the probes are made of.
    Kernel {
        /// What it lacks.
        what: String,
    },
    /// The process that loads them did not.
    Loader {
        /// Its words, or what became of it.
        what: String,
    },
    /// The kernel refused a program or a map.
    Refused {
        /// Which one, and the kernel's words.
        what: String,
    },
}

impl fmt::Display for ProbesUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object { path, reason } => write!(
                f,
                "the probes' object {} can not be used ({reason}): build it by `cargo xtask build`, \
                 or name another one in POSTERN_PROBES",
                path.display()
            ),
            Self::NotPermitted { what } => write!(
                f,
                "not permitted: {what}: start posternd as root, or with CAP_BPF, CAP_PERFMON, \
                 CAP_DAC_READ_SEARCH (for tracefs) and CAP_SYSLOG (for device times), which it \
                 gives up before it serves"
            ),
            Self::NoTypes { reason } => write!(
                f,
                "the kernel's type information /sys/kernel/btf/vmlinux can not be used ({reason}): \
                 use a kernel built with CONFIG_DEBUG_INFO_BTF"
            ),
            Self::NoTracefs { reason } => write!(
                f,
                "tracefs is not mounted and can not be mounted here ({reason}): \
                 as root, `mount -t tracefs tracefs /sys/kernel/tracing`"
            ),
            Self::Kernel { what } => write!(
                f,
                "the kernel lacks {what}: use Linux 5.15 or later with CONFIG_FTRACE_SYSCALLS"
            ),
            Self::Loader { what } => f.write_str(what),
            Self::Refused { what } => write!(
                f,
                "the kernel refused {what}: use probes built from the same version as posternd; \
                 if they are, this is a bug worth reporting with the kernel's version"
            ),
        }
    }
}

impl std::error::Error for ProbesUnavailable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NoTypes { reason } | Self::NoTracefs { reason } => Some(reason),
            _ => None,
        }
    }
}
