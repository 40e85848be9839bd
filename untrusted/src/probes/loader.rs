//! The process that loads the probes: the same executable, started by the daemon before it serves.
//!
//! It keeps the capabilities that loading needs and no other, loads, attaches, hands the descriptors
//! of maps, programs and links over a socket, and ends. The kernel keeps a program attached as long
//! as somebody has its link open: that is the daemon, which needs no capability for it, nor to read
//! the maps.
//!
//! Holds: the daemon never loads or attaches anything itself; it takes what came from its own child
//! alone, and only descriptors of the kinds that it expects.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aya::maps::{Array, Map, MapData, PerCpuArray};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

use super::{
    Attached, COUNTERS_MAP, GATE_MAP, Gate, HISTOGRAMS, MAPS, Probes, ProbesUnavailable, TARGET_MAP,
};
use crate::engine::Interface;
use crate::passing;

/// First argument of the executable that makes it a loader; the number of the process to trace, the
/// interface that it does its I/O by and, if one was named, the object follow. Its standard input is the socket.
pub const ARGUMENT: &str = "--load-probes";

/// What the loader says; the descriptors come with it: the maps, the programs, the links.
#[derive(Debug, Serialize, Deserialize)]
enum Said {
    Loaded { notes: Vec<String>, programs: Vec<String> },
    Failed { what: String },
}

/// To load programs, to attach them to tracepoints, to read their formats, to read the addresses of
/// kernel functions, and to mount tracefs where it is not.
fn needed() -> CapabilitySet {
    CapabilitySet::BPF
        | CapabilitySet::PERFMON
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::SYSLOG
        | CapabilitySet::SYS_ADMIN
}

impl Probes {
    /// Has a process of its own load the probes for this one. See [`Probes::load`].
    ///
    /// # Errors
    /// As there, in that process's words.
    pub fn start(object: Option<&Path>, interface: Interface) -> Result<Self, ProbesUnavailable> {
        let lost = |what: String| ProbesUnavailable::Loader { what };
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|e| lost(format!("no socket for the probes' loader ({e})")))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(ARGUMENT).arg(std::process::id().to_string());
        command.arg(word_for(interface)).args(object);
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        let mut child = command
            .spawn()
            .map_err(|e| lost(format!("the probes' loader could not be started ({e})")))?;
        // The child has the other end alone: its death ends the wait.
        drop(command);
        let received = receive(&ours);
        let ended = child.wait();
        match received {
            Ok((Said::Loaded { notes, programs }, descriptors)) => {
                Self::of(notes, programs, descriptors)
                    .ok_or_else(|| lost("the probes' loader handed over something else".to_owned()))
            }
            Ok((Said::Failed { what }, _)) => Err(lost(what)),
            Err(e) => {
                let ended = ended.map_or_else(|e| e.to_string(), |status| status.to_string());
                Err(lost(format!("the probes' loader said nothing ({e}; {ended})")))
            }
        }
    }

    /// Puts together what was handed over: the maps, the programs that have these names, the links.
    pub(super) fn of(
        notes: Vec<String>,
        names: Vec<String>,
        descriptors: Vec<OwnedFd>,
    ) -> Option<Self> {
        let mut descriptors = descriptors.into_iter();
        let mut next = |kind: &str| descriptors.next().filter(|fd| is_a(fd.as_fd(), kind));
        let maps: Vec<OwnedFd> = MAPS.iter().map(|_| next("bpf-map")).collect::<Option<_>>()?;
        let map = |name| {
            let at = MAPS.iter().position(|known| *known == name)?;
            let fd = maps.get(at)?.try_clone().ok()?;
            Map::from_map_data(MapData::from_fd(fd).ok()?).ok()
        };
        let histograms = PerCpuArray::try_from(map(HISTOGRAMS)?).ok()?;
        let counters = PerCpuArray::try_from(map(COUNTERS_MAP)?).ok()?;
        let target = Some(Array::try_from(map(TARGET_MAP)?).ok()?);
        let at = MAPS.iter().position(|name| *name == GATE_MAP)?;
        let gate = Gate::of(maps.get(at)?.as_fd()).ok()?;
        let programs: Option<Vec<_>> =
            names.into_iter().map(|name| Some((name, next("bpf-prog")?))).collect();
        let (programs, links) = (programs?, descriptors.collect::<Vec<_>>());
        let attached = Attached::Elsewhere { links };
        Some(Self { histograms, counters, target, gate, notes, maps, programs, attached })
    }

    /// What is handed over for these probes.
    fn parts(&self) -> std::io::Result<(Said, Vec<OwnedFd>)> {
        let mut descriptors = Vec::new();
        for map in &self.maps {
            descriptors.push(map.try_clone()?);
        }
        let mut names = Vec::new();
        for (name, program) in &self.programs {
            names.push(name.clone());
            descriptors.push(program.try_clone()?);
        }
        descriptors.extend(open_links()?);
        Ok((Said::Loaded { notes: self.notes.clone(), programs: names }, descriptors))
    }
}

/// The loader: what `posternd --load-probes` does with the arguments behind that one. Answers the
/// exit code.
#[must_use]
pub fn main(mut arguments: impl Iterator<Item = std::ffi::OsString>) -> u8 {
    let process = arguments.next().and_then(|number| number.to_str()?.parse().ok());
    let interface = arguments.next();
    let interface = [Interface::Libaio, Interface::Uring]
        .into_iter()
        .find(|known| interface.as_deref() == Some(OsStr::new(word_for(*known))));
    let object = arguments.next().map(PathBuf::from);
    let (Some(process), Some(interface)) = (process, interface) else { return 2 };
    let socket = std::io::stdin();
    let said = |said: &Said, descriptors: &[OwnedFd]| {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let text = serde_json::to_vec(said).map_err(std::io::Error::from);
        let sent = text.and_then(|text| passing::send(&socket, &text, &descriptors));
        u8::from(sent.is_err())
    };
    let failed = |what: String| said(&Said::Failed { what }, &[]);
    if let Err(e) = keep_only(needed()) {
        return failed(format!("the probes' loader can not give up capabilities ({e})"));
    }
    match Probes::load(object.as_deref(), process, interface) {
        Ok(probes) => match probes.parts() {
            Ok((loaded, descriptors)) => said(&loaded, &descriptors),
            Err(e) => failed(format!("the probes can not be handed over ({e})")),
        },
        Err(unavailable) => failed(unavailable.to_string()),
    }
}

const fn word_for(interface: Interface) -> &'static str {
    match interface {
        Interface::Libaio => "libaio",
        Interface::Uring => "io_uring",
    }
}

fn keep_only(kept: CapabilitySet) -> rustix::io::Result<()> {
    let now = rustix::thread::capabilities(None)?;
    let permitted = kept & now.permitted;
    let inheritable = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: permitted, permitted, inheritable },
    )
}

/// Whether a descriptor is one of the kernel's anonymous files of this kind.
pub(super) fn is_a(fd: BorrowedFd<'_>, kind: &str) -> bool {
    use std::os::fd::AsRawFd as _;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let name = link.ok().and_then(|link| link.to_str().map(str::to_owned));
    name.is_some_and(|name| {
        name.strip_prefix("anon_inode:").is_some_and(|n| n.trim_matches(['[', ']']) == kind)
    })
}

/// Whether a descriptor keeps a program attached: a link, or, where the kernel has none (before
/// 5.15), a perf event, which does the same.
pub(super) fn is_link(fd: BorrowedFd<'_>) -> bool {
    ["bpf_link", "bpf-link", "perf_event"].iter().any(|kind| is_a(fd, kind))
}

/// The links of this process. The library does not give them out.
fn open_links() -> std::io::Result<Vec<OwnedFd>> {
    let mut links = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let Some(number) = entry?.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // SAFETY: borrowed for this statement. The number was open a moment ago and this process has
        //    one thread; the directory's own is no link and is not kept.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        if is_link(fd) {
            links.push(fd.try_clone_to_owned()?);
        }
    }
    Ok(links)
}

fn receive(socket: &OwnedFd) -> std::io::Result<(Said, Vec<OwnedFd>)> {
    let (text, descriptors) = passing::receive(socket, RecvFlags::empty())?;
    if text.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok((serde_json::from_slice(&text)?, descriptors))
}
