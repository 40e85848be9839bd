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
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aya::maps::{Map, MapData, PerCpuArray};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

use super::{Attached, Gate, Probes, ProbesUnavailable};
use crate::engine::Interface;

/// First argument of the executable that makes it a loader; the number of the process to trace, the
/// interface that it does its I/O by and, if one was named, the object follow. Its standard input is the socket.
pub const ARGUMENT: &str = "--load-probes";

/// Most descriptors of one hand-over, and longest text with them, bytes.
const MOST_DESCRIPTORS: usize = 64;
const MOST_BYTES: usize = 16 << 10;

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

    /// Puts together what was handed over.
    fn of(notes: Vec<String>, names: Vec<String>, descriptors: Vec<OwnedFd>) -> Option<Self> {
        let mut descriptors = descriptors.into_iter();
        let mut next = |kind: &str| descriptors.next().filter(|fd| is_a(fd.as_fd(), kind));
        let map = |fd| Map::from_map_data(MapData::from_fd(fd).ok()?).ok();
        let histograms = PerCpuArray::try_from(map(next("bpf-map")?)?).ok()?;
        let counters = PerCpuArray::try_from(map(next("bpf-map")?)?).ok()?;
        let gate = Gate::of(next("bpf-map")?.as_fd()).ok()?;
        let programs: Option<Vec<_>> =
            names.into_iter().map(|name| Some((name, next("bpf-prog")?))).collect();
        let (programs, links) = (programs?, descriptors.collect::<Vec<_>>());
        let attached = Attached::Elsewhere { _links: links };
        Some(Self { histograms, counters, gate, notes, programs, attached })
    }

    /// What is handed over for these probes.
    fn parts(&self) -> std::io::Result<(Said, Vec<OwnedFd>)> {
        let mut descriptors = Vec::new();
        if let Attached::Here { maps, .. } = &self.attached {
            for map in maps {
                descriptors.push(map.try_clone()?);
            }
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
    let said = |said: &Said, descriptors: &[OwnedFd]| match send(socket.as_fd(), said, descriptors)
    {
        Ok(()) => 0,
        Err(_) => 1,
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
fn is_a(fd: BorrowedFd<'_>, kind: &str) -> bool {
    use std::os::fd::AsRawFd as _;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let name = link.ok().and_then(|link| link.to_str().map(str::to_owned));
    name.is_some_and(|name| {
        name.strip_prefix("anon_inode:").is_some_and(|n| n.trim_matches(['[', ']']) == kind)
    })
}

/// The links of this process, or, where the kernel has none (before 5.15), its perf events, which
/// do the same. The library does not give them out.
fn open_links() -> std::io::Result<Vec<OwnedFd>> {
    let mut links = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let Some(number) = entry?.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // SAFETY: borrowed for this statement. The number was open a moment ago and this process has
        //    one thread; the directory's own is no link and is not kept.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        if is_a(fd, "bpf_link") || is_a(fd, "bpf-link") || is_a(fd, "perf_event") {
            links.push(fd.try_clone_to_owned()?);
        }
    }
    Ok(links)
}

fn send(socket: BorrowedFd<'_>, said: &Said, descriptors: &[OwnedFd]) -> std::io::Result<()> {
    let text = serde_json::to_vec(said)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    sendmsg(socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> std::io::Result<(Said, Vec<OwnedFd>)> {
    let mut bytes = vec![0; MOST_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let descriptors = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if message.bytes == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    bytes.truncate(message.bytes);
    Ok((serde_json::from_slice(&bytes)?, descriptors))
}
