//! Probes that outlive their daemon: whoever started it keeps their descriptors too, and hands them
//! to the next one.
//!
//! So the death of a daemon takes no program off, which the kernel does one after the other and
//! before it tells of the death; the next daemon loads nothing, needs no capability for it, and goes
//! on with what was counted. Beside maps, programs and links a file in memory is kept, the *ledger*:
//! what the probes are, then the names of the volumes by number, a line each.
//!
//! Holds: probes are taken over only if they are what this daemon would load (the same object, on the
//! same kernel, for the same interface). What stands in ledger and maps was written by a daemon that
//! an enclave may have taken over: it is bounded and checked for its form, and what is false in it makes
//! false names and numbers, nothing else.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Probes, loader, object_path};
use crate::activation::Manager;
use crate::engine::{Interface, now_ns};
use crate::volumes::{MOST_VOLUMES, OTHERS};

/// What the descriptors are called where they are kept.
pub const NAME: &str = "postern-probes";

/// Of the ledger, and of what daemons write into the maps.
const FORMAT: u32 = 1;
/// Longest ledger, bytes.
const LONGEST: usize = 1 << 20;

/// First line of the ledger.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    format: u32,
    /// See [`identity`].
    identity: String,
    notes: Vec<String>,
    /// The kernel's numbers of the maps, in the order in which they are handed over.
    maps: Vec<u64>,
    /// Name of each program, and the kernel's number.
    programs: Vec<(String, u64)>,
    links: usize,
}

/// The ledger, open for writing.
#[derive(Debug)]
pub struct Ledger(File);

impl Ledger {
    fn begin(about: &About) -> std::io::Result<Self> {
        let file = File::from(memfd_create(NAME, MemfdFlags::CLOEXEC)?);
        // Whoever goes on with it writes at its end.
        fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::APPEND)?;
        let ledger = Self(file);
        ledger.line(about)?;
        Ok(ledger)
    }

    /// Notes the name of the next number. What can not be noted is missing after the daemon's death.
    pub fn append(&self, name: &str) {
        let _ = self.line(&name);
    }

    fn line(&self, what: &impl Serialize) -> std::io::Result<()> {
        let mut text = serde_json::to_vec(what)?;
        text.push(b'\n');
        (&self.0).write_all(&text)
    }

    /// What stands in the ledger of a daemon that has died, and the ledger to go on with.
    fn reopen(kept: BorrowedFd<'_>) -> Option<(Self, About, Vec<String>)> {
        let file = File::from(kept.try_clone_to_owned().ok()?);
        let mut text = vec![0; LONGEST + 1];
        let mut length = 0;
        loop {
            match file.read_at(&mut text[length..], length as u64).ok()? {
                0 => break,
                n => length += n,
            }
        }
        text.truncate(length);
        if length > LONGEST {
            return None;
        }
        // The last line may have been cut short.
        let whole = text.iter().rposition(|byte| *byte == b'\n')? + 1;
        if whole < length {
            file.set_len(whole as u64).ok()?;
            text.truncate(whole);
        }
        let mut lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let about = serde_json::from_slice(lines.next()?).ok()?;
        let mut names: Vec<String> = Vec::new();
        for line in lines {
            let name: String = serde_json::from_slice(line).ok()?;
            if names.len() == MOST_VOLUMES || name == OTHERS || names.contains(&name) {
                return None;
            }
            names.push(name);
        }
        Some((Self(file), about, names))
    }
}

/// Probes that were taken over.
#[derive(Debug)]
pub struct TakenOver {
    /// They follow this process.
    pub probes: Probes,
    /// Names of volumes by number, from 1.
    pub names: Vec<String>,
    /// Where further ones are noted.
    pub ledger: Ledger,
}

impl Probes {
    /// Has `manager` keep what these probes are made of. `None` if there is nobody to keep it.
    ///
    /// # Errors
    /// Why it can not be kept.
    pub fn keep(
        &self,
        manager: &Manager,
        object: Option<&Path>,
        interface: Interface,
    ) -> std::io::Result<Option<Ledger>> {
        if !manager.is_there() {
            return Ok(None);
        }
        let number = |fd: &OwnedFd, key: &str| {
            number_of(fd.as_fd(), key)
                .ok_or_else(|| std::io::Error::other("descriptors without a number"))
        };
        let (maps, links) = (&self.maps, self.links());
        let about = About {
            format: FORMAT,
            identity: identity(object, interface)?,
            notes: self.notes.clone(),
            maps: maps.iter().map(|map| number(map, "map_id")).collect::<Result<_, _>>()?,
            programs: self
                .programs
                .iter()
                .map(|(name, program)| Ok((name.clone(), number(program, "prog_id")?)))
                .collect::<std::io::Result<_>>()?,
            links: links.len(),
        };
        let ledger = Ledger::begin(&about)?;
        let programs = self.programs.iter().map(|(_, program)| program);
        let mut all = vec![ledger.0.as_fd()];
        all.extend(maps.iter().chain(programs).chain(links).map(AsFd::as_fd));
        manager.keep(NAME, &all)?;
        Ok(Some(ledger))
    }

    /// Goes on with the probes of a daemon that has died, if `kept` is all of them and they are what
    /// [`Probes::start`] would load. From then on they follow this process.
    #[must_use]
    pub fn take_over(
        kept: &[OwnedFd],
        object: Option<&Path>,
        interface: Interface,
    ) -> Option<TakenOver> {
        let of_kind = |kind: &'static str| {
            kept.iter().map(AsFd::as_fd).filter(move |fd| loader::is_a(*fd, kind))
        };
        let memory = kept.iter().map(AsFd::as_fd).find(|fd| is_ledger(*fd))?;
        let (ledger, about, names) = Ledger::reopen(memory)?;
        if about.format != FORMAT || Some(about.identity) != identity(object, interface).ok() {
            return None;
        }
        let numbered = |kind, key: &'static str, number: u64| {
            of_kind(kind).find(|fd| number_of(*fd, key) == Some(number))
        };
        let maps = about.maps.iter().map(|number| numbered("bpf-map", "map_id", *number));
        let programs =
            about.programs.iter().map(|(_, number)| numbered("bpf-prog", "prog_id", *number));
        let mut parts = maps.chain(programs).collect::<Option<Vec<_>>>()?;
        let links = kept.iter().map(AsFd::as_fd).filter(|fd| loader::is_link(*fd));
        let links: Vec<_> = links
            .filter(|fd| {
                // A perf event does not tell.
                number_of(*fd, "prog_id")
                    .is_none_or(|of| about.programs.iter().any(|(_, number)| *number == of))
            })
            .collect();
        if links.len() != about.links {
            return None;
        }
        parts.extend(links);
        let parts = parts.iter().map(|fd| fd.try_clone_to_owned().ok()).collect::<Option<_>>()?;
        let names_of_programs = about.programs.into_iter().map(|(name, _)| name).collect();
        let mut probes = Self::of(about.notes, names_of_programs, parts)?;
        // Nothing more comes of what was in flight, and the new target has begun nothing yet.
        let in_flight = probes.under_way();
        probes.gate.take_over(now_ns(), in_flight);
        if !probes.follow(std::process::id()) {
            return None;
        }
        Some(TakenOver { probes, names, ledger })
    }
}

/// What decides which programs are loaded, as a digest: the object, the interface, and the namespace
/// that process numbers are of. The kernel is the same one, or nothing would have been kept.
fn identity(object: Option<&Path>, interface: Interface) -> std::io::Result<String> {
    let path = object_path(object).map_err(|e| std::io::Error::other(e.to_string()))?;
    let namespace = std::fs::metadata("/proc/self/ns/pid").map_or(0, |space| space.ino());
    let mut digest = Sha256::new();
    digest.update(namespace.to_le_bytes());
    digest.update([u8::from(interface == Interface::Uring)]);
    digest.update(std::fs::read(path)?);
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What the kernel tells of a descriptor under `key`.
fn number_of(fd: BorrowedFd<'_>, key: &str) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t")?.parse().ok())
}

fn is_ledger(fd: BorrowedFd<'_>) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let wanted = format!("/memfd:{NAME}");
    link.is_ok_and(|link| link.to_str().is_some_and(|link| link.starts_with(&wanted)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        About {
            format: FORMAT,
            identity: "abc".to_owned(),
            notes: vec!["a note".to_owned()],
            maps: vec![1, 2],
            programs: vec![("enter".to_owned(), 3)],
            links: 1,
        }
    }

    fn names(ledger: &Ledger) -> Option<Vec<String>> {
        let (_, found, names) = Ledger::reopen(ledger.0.as_fd())?;
        assert_eq!(found, about());
        Some(names)
    }

    #[test]
    fn a_ledger_keeps_the_names_in_their_order_whoever_writes_on() {
        let ledger = Ledger::begin(&about()).unwrap();
        assert!(is_ledger(ledger.0.as_fd()));
        ledger.append("a");
        ledger.append("b\"\n");
        let (next, _, _) = Ledger::reopen(ledger.0.as_fd()).unwrap();
        next.append("c");
        assert_eq!(names(&ledger).unwrap(), ["a", "b\"\n", "c"]);
    }

    #[test]
    fn a_line_that_was_cut_short_is_left_out_and_the_next_one_stands_by_itself() {
        let ledger = Ledger::begin(&about()).unwrap();
        ledger.append("a");
        (&ledger.0).write_all(b"\"half").unwrap();
        assert_eq!(names(&ledger).unwrap(), ["a"]);
        ledger.append("b");
        assert_eq!(names(&ledger).unwrap(), ["a", "b"]);
    }

    #[test]
    fn a_ledger_of_another_form_is_refused_whoever_wrote_it() {
        for text in ["", "\n", "x\n", "{}\n", "[1]\n"] {
            let file = File::from(memfd_create(NAME, MemfdFlags::CLOEXEC).unwrap());
            (&file).write_all(text.as_bytes()).unwrap();
            assert!(Ledger::reopen(file.as_fd()).is_none(), "{text:?}");
        }
        let with = |lines: &[&str]| {
            let ledger = Ledger::begin(&about()).unwrap();
            lines.iter().for_each(|line| (&ledger.0).write_all(line.as_bytes()).unwrap());
            names(&ledger)
        };
        assert!(with(&["7\n"]).is_none());
        assert!(with(&["\"a\"\n\"a\"\n"]).is_none(), "one name, two numbers");
        assert!(with(&[&format!("\"{OTHERS}\"\n")]).is_none());
        let many: String = (0..=MOST_VOLUMES).map(|n| format!("\"{n}\"\n")).collect();
        assert!(with(&[&many]).is_none());
        assert!(with(&[&"\n".repeat(LONGEST)]).is_none());
    }

    #[test]
    fn descriptors_that_are_something_else_are_not_taken_over() {
        let ledger = Ledger::begin(&about()).unwrap();
        let object = std::env::current_exe().unwrap();
        let take = |kept: Vec<OwnedFd>| {
            Probes::take_over(&kept, Some(&object), Interface::Libaio).is_some()
        };
        assert!(!take(Vec::new()));
        assert!(!take(vec![ledger.0.try_clone().unwrap().into()]), "made of another object");
        let mut same = about();
        same.identity = identity(Some(&object), Interface::Libaio).unwrap();
        assert_ne!(same.identity, identity(Some(&object), Interface::Uring).unwrap());
        let other = Ledger::begin(&same).unwrap();
        let file = File::open("/dev/null").unwrap();
        assert!(!take(vec![other.0.into(), file.into()]), "without the maps");
    }
}
