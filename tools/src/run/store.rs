//! What the daemon of a run has the launcher keep for the next one: the descriptors of its probes.
//!
//! The daemon's standard input is a pair of datagram sockets' other end; over it go the words of
//! sd_notify(3), as to systemd. What came in is looked at when a daemon has died, and goes back over
//! the same socket before the next one starts.
//!
//! Holds: what a daemon sends is never read, written or mapped, only held and handed on; of a daemon
//! that sends more than [`MOST`] the rest is closed.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Most descriptors that are kept.
const MOST: usize = 64;
/// Longest message that is understood, bytes.
const LONGEST: usize = 256;

/// The launcher's end, and what is kept.
pub struct Store {
    ours: OwnedFd,
    /// The end that daemons get. Held, so that what is under way between two of them stays there.
    theirs: OwnedFd,
    /// Name that the daemon gave them, and the descriptors.
    kept: Option<(String, Vec<OwnedFd>)>,
}

impl Store {
    /// Nothing kept.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        Ok(Self { ours, theirs, kept: None })
    }

    /// The standard input of the next daemon. What is kept waits for it there.
    ///
    /// # Errors
    /// As dup(2).
    pub fn input(&mut self) -> io::Result<OwnedFd> {
        self.collect();
        // What the one before has not read.
        let theirs = self.theirs.as_fd();
        while receive(theirs).is_some() {}
        if let Some((name, descriptors)) = &self.kept {
            let descriptors: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
            // Without them it loads its own.
            let _ = send(self.ours.as_fd(), &format!("FDNAME={name}"), &descriptors);
        }
        self.theirs.try_clone()
    }

    /// Follows what came in.
    fn collect(&mut self) {
        while let Some((text, descriptors)) = receive(self.ours.as_fd()) {
            let value =
                |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            let Some(name) = value("FDNAME") else { continue };
            if value("FDSTOREREMOVE") == Some("1") {
                self.kept.take_if(|(kept, _)| kept == name);
            } else if value("FDSTORE") == Some("1") {
                self.kept = Some((name.to_owned(), descriptors));
            }
        }
    }
}

fn send(socket: BorrowedFd<'_>, text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, flags)?;
    Ok(())
}

/// The next message, if one is there; what is no text is empty.
fn receive(socket: BorrowedFd<'_>) -> Option<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).ok()?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    let text = bytes.get(..message.bytes).and_then(|bytes| std::str::from_utf8(bytes).ok());
    Some((text.unwrap_or_default().to_owned(), descriptors))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    /// What file each of the descriptors is.
    fn files(descriptors: &[OwnedFd]) -> Vec<String> {
        let link = |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        descriptors.iter().map(|fd| link(fd).unwrap().to_str().unwrap().to_owned()).collect()
    }

    fn opened(path: &str) -> OwnedFd {
        std::fs::File::open(path).unwrap().into()
    }

    #[test]
    fn what_one_daemon_has_kept_the_next_ones_get_until_it_is_to_be_forgotten() {
        let mut store = Store::new().unwrap();
        let first = store.input().unwrap();
        assert!(receive(first.as_fd()).is_none(), "nothing was kept yet");
        let (null, zero) = (opened("/dev/null"), opened("/dev/zero"));
        let say = |text: &str, descriptors: &[&OwnedFd]| {
            let descriptors: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
            send(first.as_fd(), text, &descriptors).unwrap();
        };
        say("FDSTORE=1\nFDNAME=x\nFDPOLL=0", &[&null, &zero]);
        say("READY=1", &[]);
        drop((null, zero));
        for _ in 0..2 {
            let next = store.input().unwrap();
            let (text, kept) = receive(next.as_fd()).unwrap();
            assert_eq!(
                (text.as_str(), files(&kept)),
                ("FDNAME=x", vec!["/dev/null".into(), "/dev/zero".into()])
            );
            assert!(receive(next.as_fd()).is_none());
        }
        // One that did not take them leaves none behind for the next but one.
        let _ = store.input().unwrap();
        say("FDSTOREREMOVE=1\nFDNAME=x", &[]);
        let next = store.input().unwrap();
        assert!(receive(next.as_fd()).is_none());
    }

    #[test]
    fn what_is_no_message_changes_nothing_and_too_much_is_closed() {
        let mut store = Store::new().unwrap();
        let daemon = store.input().unwrap();
        let null = opened("/dev/null");
        send(daemon.as_fd(), "FDSTORE=1\nFDNAME=x", &[null.as_fd()]).unwrap();
        for text in ["", "FDSTORE=1", "FDNAME=y", "FDSTORE=2\nFDNAME=y", "\u{0}", "FDSTOREREMOVE=1"]
        {
            send(daemon.as_fd(), text, &[null.as_fd()]).unwrap();
            let next = store.input().unwrap();
            assert_eq!(receive(next.as_fd()).unwrap().0, "FDNAME=x", "{text:?}");
        }
        rustix::net::send(&daemon, &[0xff; 9], SendFlags::empty()).unwrap();
        rustix::net::send(&daemon, &[b'F'; 4 * LONGEST], SendFlags::empty()).unwrap();
        store.collect();
        assert_eq!(store.kept.as_ref().unwrap().1.len(), 1);
    }
}
